"""LongBench's question answering, scored as LongBench scores it (arXiv 2308.14508)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from losart.errors import OptionError
from losart.eval.evaluation import EvalConfig
from losart.eval.figures import Figures, figures, mean
from losart.eval.longbench_data import PLAIN, read_dataset
from losart.observe.step import Progress, Stats

AVERAGED = ("sparse_density", "density", "active_fraction", "tokens_per_second", "passes_per_question", "f1")
TEMPLATE_ROOM = 128  # tokens left for the chat template, and for what decoding and encoding again add


@dataclass(frozen=True)
class Score(Figures):
    """Figures of one data set with one attention setting.

    Attributes
    ----------
    dataset : str
        "average" for the mean of all.
    f1 : float
        0 to 100, mean over the questions.
    """

    dataset: str
    f1: float


def evaluate_longbench(
    model: Any,
    directory: str | Path,
    datasets: Sequence[str],
    config: EvalConfig,
    *,
    samples: int | None = None,
    max_prompt_tokens: int | None = None,
    on_score: Callable[[Score], None] | None = None,
    progress: Progress | None = None,
) -> list[Score]:
    """Measure a model on data sets of LongBench.

    Parameters
    ----------
    model : losart.Model
    directory : path
        With data/NAME.jsonl, and dataset2prompt.json and dataset2maxlen.json in it or in config/.
    datasets : sequence of str
        Some of `losart.eval.longbench_data.DATASETS`.
    config : EvalConfig
        Its attention settings, seed and options. `max_new_tokens` overrides dataset2maxlen.json.
    samples : int, optional
        Only the first questions of each data set.
    max_prompt_tokens : int, optional
        Longer prompts lose their middle. Default: what the model has positions for.
    on_score : callable, optional
        Called with each score once it is measured; at the end with the averages of each setting.
    progress : callable, optional
        Called after each question with questions done and in all.

    Raises
    ------
    DataError, CheckpointError
        A file is missing or not of LongBench's form.
    OptionError
        An option is unknown or out of range.
    """
    if model.tokenizer is None:
        raise OptionError("the checkpoint has no tokenizer.json: it cannot be asked LongBench's questions")
    sets = [read_dataset(Path(directory), name, samples) for name in datasets]
    settings = config.settings
    options = [config.shared_options(one.max_new_tokens) for one in sets]
    for setting in settings:
        model.session(**options[0], **setting)  # rejects wrong options
    rooms = [_room(model, one["max_new_tokens"], max_prompt_tokens) for one in options]

    done, total = 0, len(settings) * sum(len(one.items) for one in sets)
    scores: list[Score] = []
    for one, shared, room in zip(sets, options, rooms, strict=True):
        answers: list[list[tuple[float, Stats]]] = [[] for _ in settings]
        session = model.session(**shared)  # prefills a prompt once, for all settings
        for item in one.items:
            prompt = make_prompt(model, one.name, item.prompt, room)
            for setting, given in zip(settings, answers, strict=True):
                result = session.generate(prompt, **setting)
                given.append((best_f1(one.name, result.text, item.answers), result.stats))
                done += 1
                if progress is not None:
                    progress(done, total)
        for setting, given in zip(settings, answers, strict=True):
            f1 = 100 * sum(mark for mark, _ in given) / len(given)
            stats = [one_stats for _, one_stats in given]
            scores.append(Score(**figures(setting, stats), dataset=one.name, f1=f1))
            if on_score is not None:
                on_score(scores[-1])
    for index in range(len(settings)):
        scores.append(_average(scores[index : len(settings) * len(sets) : len(settings)]))
        if on_score is not None:
            on_score(scores[-1])
    return scores


def _room(model: Any, new_tokens: int, asked: int | None) -> int:
    room = model.config.max_positions - new_tokens - TEMPLATE_ROOM
    if room < 2 or (asked is not None and not 2 <= asked <= room):
        raise OptionError(
            f"lengths: prompts of LongBench must have 2 to {room} tokens, since the model has "
            f"{model.config.max_positions} positions and answers may have {new_tokens} tokens"
        )
    return room if asked is None else asked


def _average(scores: Sequence[Score]) -> Score:
    """The mean over data sets, with equal weights."""
    means: dict[str, Any] = {name: mean(getattr(score, name) for score in scores) for name in AVERAGED}
    return replace(scores[0], dataset="average", samples=sum(score.samples for score in scores), **means)


def make_prompt(model: Any, dataset: str, text: str, max_tokens: int) -> Any:
    """A prompt as LongBench's pred.py makes it: its middle cut out, then the chat template, if any."""
    ids = model.tokenizer.encode(text)
    if len(ids) > max_tokens:
        half = max_tokens // 2
        text = model.tokenizer.decode(ids[:half]) + model.tokenizer.decode(ids[-half:])
    if model.chat_template is None or dataset in PLAIN:
        return text
    return [{"role": "user", "content": text}]


def best_f1(dataset: str, text: str, answers: Sequence[str]) -> float:
    """The best F1 of a text against any of the answers; of few-shot data sets only the first line counts."""
    if dataset in PLAIN:
        text = text.lstrip("\n").split("\n")[0]
    return max((f1(text, answer) for answer in answers), default=0.0)


def f1(text: str, answer: str) -> float:
    """F1 of the words that two texts share, normalised: LongBench's qa_f1_score."""
    words, wanted = normalise(text).split(), normalise(answer).split()
    shared = sum((Counter(words) & Counter(wanted)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(words), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def normalise(text: str) -> str:
    """Lower case, without punctuation (ASCII's), articles and extra white space."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
