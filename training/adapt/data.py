"""Makes the data of a training: dialogues, texts to recall from, and those that are held out."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from losart.errors import DataError

from .base_model import Base, read_base
from .chat_format import chat_format
from .recall_texts import RecallTexts, single_turns
from .sampler import Sampler, Sampling, dialogues
from .step_texts import DIALOGUES, HELD_OUT, OWN, recall_name
from .texts import Texts, collect, load_texts, read_jsonl

FACTS = 0.75  # share of the texts to recall from; in the others the conversation itself is repeated
TEXTS_A_PART = 50


@dataclass(frozen=True)
class DataPlan:
    """What is made.

    Attributes
    ----------
    seconds : float
        Of sampling.
    steps : int
        Of sampling, at most.
    sampling : Sampling
    lengths : tuple of int
        Of texts to recall from.
    recall_tokens : int
        Of each length.
    quoted : float
        See `RecallTexts`.
    held_out : int
        Dialogues.
    seed : int
    workers : int
        Processes that write texts to recall from.
    """

    seconds: float
    steps: int = 100_000
    sampling: Sampling = field(default_factory=Sampling)
    lengths: tuple[int, ...] = (512, 1024, 4096, 8192)
    recall_tokens: int = 6_000_000
    quoted: float = 0.0
    held_out: int = 1000
    seed: int = 0
    workers: int = max(1, (os.cpu_count() or 2) - 2)


def make_data(
    base: Base,
    directory: Path,
    plan: DataPlan,
    device: Any,
    dtype: Any,
    own: Path | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Write NAME.npz of each kind of text into `directory`, and data.json; `own` is a user's JSONL file."""
    directory.mkdir(parents=True, exist_ok=True)
    chat = chat_format(base)
    if own is not None:
        texts = read_jsonl(own, base, chat, max(plan.lengths))
        texts.save(directory / f"{OWN}.npz")
        say(f"own: {len(texts)} texts, {len(texts.ids)} tokens")
    with ProcessPoolExecutor(plan.workers, multiprocessing.get_context("spawn")) as pool:
        facts = {length: _submit(pool, base, plan, length, "facts", None) for length in plan.lengths}
        weights = base.weights(device, dtype)
        sampler = Sampler(base, weights, chat, plan.sampling, plan.seed, plan.steps)
        drawn = sampler.run(plan.seconds, say)
        del sampler, weights
        found, counts = dialogues(drawn, chat, plan.sampling.most_repeated)
        say(f"dialogues: {json.dumps(counts)}")
        if not len(found):
            raise DataError("no dialogue was kept: sample longer, or drop fewer")
        order = np.random.default_rng(plan.seed).permutation(len(found))
        split = min(plan.held_out, len(found) // 5)
        file = directory / f"{DIALOGUES}.npz"
        found.chosen(order[:split]).save(directory / f"{HELD_OUT}.npz")
        found.chosen(order[split:]).save(file)
        say(f"{split} dialogues held out, {len(found) - split} to train on, {len(found.ids)} tokens in all")
        for length in plan.lengths:
            repeats = _submit(pool, base, plan, length, "repeats", file)
            parts = [part for job in (*facts[length], *repeats) for part in job.result()]
            texts = collect(parts)
            texts.save(directory / f"{recall_name(length)}.npz")
            say(f"{recall_name(length)}: {len(texts)} texts, {len(texts.ids)} tokens")
    described = asdict(plan) | {"dialogues": counts}
    (directory / "data.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _submit(
    pool: ProcessPoolExecutor, base: Base, plan: DataPlan, length: int, kind: str, file: Path | None
) -> list[Any]:
    share = FACTS if kind == "facts" else 1 - FACTS
    count = max(1, round(plan.recall_tokens * share / length))
    starts = range(0, count, TEXTS_A_PART)
    given = (base.directory, plan.quoted, length, file)
    return [
        pool.submit(
            _part, *given, (plan.seed, length, start, kind == "facts"), min(TEXTS_A_PART, count - start)
        )
        for start in starts
    ]


def _part(
    directory: Path, quoted: float, length: int, file: Path | None, seed: tuple[int, ...], count: int
) -> list[tuple[Any, Any]]:
    """Some texts to recall from: of facts, or with a file of dialogues such as repeat them."""
    base = read_base(directory)
    writer, rng = RecallTexts(base.tokenizer, chat_format(base), quoted), np.random.default_rng(seed)
    if file is None:
        made = [writer.facts(rng, length) for _ in range(count)]
    else:
        turns = _some_turns(load_texts(file), rng, writer, length * count)
        made = []
        for _ in range(count):
            order = rng.permutation(len(turns))[: length // 8]
            made.append(writer.repeats(rng, length, [turns[i] for i in order]))
    return [(np.asarray(ids, np.int32), np.asarray(answers, bool)) for ids, answers in made if any(answers)]


def _some_turns(
    texts: Texts, rng: np.random.Generator, writer: RecallTexts, tokens: int
) -> list[tuple[list[int], list[int]]]:
    """First turns of dialogues with about so many tokens."""
    count = max(16, int(tokens / max(texts.lengths.mean(), 1)))
    chosen = texts.chosen(rng.permutation(len(texts))[:count])
    return list(single_turns(chosen, writer.chat))
