"""Which texts a step trains on: dialogues, and conversations to recall from, of growing length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from losart.errors import DataError

from .stream import Noise, Sizes, Stream, Text, make_stream, slots, whole_slots
from .texts import Texts, load_texts

DIALOGUES, HELD_OUT, OWN = "dialogues", "held-out", "own"
TRIES = 24  # texts that do not fit before a stream is left as it is


def recall_name(length: int) -> str:
    """Name of the texts to recall from, of a length."""
    return f"recall-{length}"


@dataclass(frozen=True)
class Stage:
    """A part of training.

    Attributes
    ----------
    until : float
        Share of the training at which it ends.
    tokens : mapping of str to float
        Share of the tokens that are of texts of each name.
    """

    until: float
    tokens: Mapping[str, float]


def stages(names: list[str], recall: float, own: float) -> tuple[Stage, ...]:
    """Stages in which texts to recall from get longer; the longest are in the last two fifths.

    Parameters
    ----------
    names : list of str
        Of the texts that there are.
    recall, own : float
        Share of tokens of texts to recall from, and of the user's own; dialogues have the rest.
    """
    lengths = sorted(int(name.removeprefix("recall-")) for name in names if name.startswith("recall-"))
    recall, own = recall if lengths else 0.0, own if OWN in names else 0.0
    others = {DIALOGUES: 1.0 - recall - own} | ({OWN: own} if own else {})
    if not lengths:
        return (Stage(1.0, others),)
    made = []
    for number in range(len(lengths)):
        known = lengths[: number + 1]
        # The newest length has half of the texts to recall from.
        share = {recall_name(one): recall / 2 / max(len(known) - 1, 1) for one in known[:-1]}
        share[recall_name(known[-1])] = recall / (2 if len(known) > 1 else 1)
        until = 1.0 if number + 1 == len(lengths) else 0.6 * (number + 1) / (len(lengths) - 1)
        made.append(Stage(until, others | share))
    return tuple(made)


def load_all(directory: Path) -> dict[str, Texts]:
    """The texts of a data directory by name.

    Raises
    ------
    DataError
        There are no dialogues and none of the user's own.
    """
    found = {file.stem: load_texts(file) for file in sorted(directory.glob("*.npz"))}
    if DIALOGUES not in found and OWN not in found:
        raise DataError(f"{directory}: neither {DIALOGUES}.npz nor {OWN}.npz")
    return found


def draw_texts(
    rng: np.random.Generator, texts: Mapping[str, Texts], stage: Stage, room: int, end_id: int
) -> list[Text]:
    """Texts of a stage that fill so many tokens as well as they can."""
    names = [name for name, share in stage.tokens.items() if share > 0]
    chances = np.array([stage.tokens[name] / texts[name].lengths.mean() for name in names])
    drawn: list[Text] = []
    tries = 0
    while room >= 128 and tries < TRIES:
        of_name = texts[str(rng.choice(names, p=chances / chances.sum()))]
        text = whole_slots(of_name[int(rng.integers(len(of_name)))], end_id)
        if slots(len(text[0])) > room or not text[1].any():
            tries += 1
            continue
        drawn.append(text)
        room -= slots(len(text[0]))
    return drawn


def draw_stream(
    rng: np.random.Generator,
    texts: Mapping[str, Texts],
    stage: Stage,
    sizes: Sizes,
    noise: Noise,
    blocks: tuple[int, ...],
) -> Stream:
    """A step of a stage; each text has one of the block lengths."""
    drawn = draw_texts(rng, texts, stage, sizes.clean, noise.end_id)
    return make_stream(rng, drawn, rng.choice(blocks, len(drawn)).tolist(), sizes, noise)
