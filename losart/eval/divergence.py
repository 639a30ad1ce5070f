"""How far a model's distributions are from another one's along the way that the other takes: no labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from losart.config.options import GenerationConfig, generation_config
from losart.engine.batch import PassBatch
from losart.engine.output import Output
from losart.engine.remasking import remask
from losart.engine.sequence import Sequence as Decoded
from losart.errors import DataError, OptionError
from losart.eval.evaluation import ANSWER_TOKENS, EvalConfig, check_config
from losart.eval.questions import make_questions
from losart.eval.tasks import TASKS
from losart.loaders.tokenizer import prompt_ids
from losart.models.transformer import Transformer
from losart.observe.step import Progress


@dataclass(frozen=True)
class Divergence:
    """Of one attention setting from the reference with dense attention, over all passes' masked positions.

    Attributes
    ----------
    length : int
        Tokens of a prompt.
    attention : str
    budget : int or None
    active : "auto", int, float or None
    samples : int
        Prompts.
    positions : int
    mean, high : float
        Kullback-Leibler divergence KL(reference || model) in nats: its mean, and what 1% of the positions
        exceed.
    agreement : float
        Share of positions at which both find the same token most probable.
    """

    length: int
    attention: str
    budget: int | None
    active: int | float | str | None
    samples: int
    positions: int
    mean: float
    high: float
    agreement: float


class Probe(Transformer):
    """A transformer's passes, one by one, with their logits.

    Attributes
    ----------
    logits : float32 [masked rows, vocab] or None
        Of the last pass, if it proposed tokens; the mask token's are -inf.
    """

    def __init__(self, transformer: Transformer) -> None:
        self.__dict__.update(transformer.__dict__)
        self.logits: np.ndarray | None = None

    def _key(self, batch: PassBatch) -> None:
        return None  # a pass that is replayed would ask for no logits

    def _propose(self, hidden: Any, batch: Any) -> Any:
        self.logits = self.backend.logits(hidden, self.head, batch)
        return super()._propose(hidden, batch)


class Follower:
    """A generation by one transformer, whose passes end as somebody says.

    Parameters
    ----------
    probe : Probe
    ids : list of int
        The prompt's.
    options : GenerationConfig
    prefill_tokens : int
        Of a piece of the prompt.
    """

    def __init__(self, probe: Probe, ids: list[int], options: GenerationConfig, prefill_tokens: int) -> None:
        self._probe = probe
        expected = min(len(ids) + options.max_new_tokens, probe.config.max_positions)
        self.sequence = Decoded(
            ids,
            options,
            Output(expected - len(ids), options.stop_token_ids),
            probe.new_cache(options, expected),
            prefill_tokens,
            deterministic=probe.deterministic,
        )
        self.sequence.slot = probe.new_slot(options)

    def run(self) -> tuple[list[int], list[int]] | None:
        """Run the next pass; returns the block after it and where it is still masked, if it denoises."""
        self.sequence.cache.reserve(self.sequence.next_end)
        passes = self.sequence.next_pass()
        self._probe.logits = None
        proposals = self._probe.forward(PassBatch(passes)).proposals
        return None if proposals is None else remask(proposals, list(passes))[0]

    @property
    def logits(self) -> np.ndarray:
        """Of the pass."""
        assert self._probe.logits is not None
        return self._probe.logits


def divergences(reference: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL(reference || found) of each row of logits [rows, vocab], float64, and whether both have one maximum.

    Tokens whose logits are -inf in both do not count.
    """
    p, q = (_log_softmax(logits) for logits in (reference, found))
    weights = np.exp(p)
    with np.errstate(invalid="ignore"):  # -inf less -inf, of tokens that weigh nothing
        terms = np.where(weights > 0, weights * (p - q), 0)
    return np.maximum(terms.sum(axis=1), 0), reference.argmax(axis=1) == found.argmax(axis=1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def measure_divergence(
    reference: Any,
    model: Any,
    config: EvalConfig | None = None,
    *,
    text: Path | None = None,
    on_row: Callable[[Divergence], None] | None = None,
    progress: Progress | None = None,
) -> list[Divergence]:
    """Let a reference answer, densely, and see what a model makes of each pass on the way.

    Both see the same prompts and blocks; the model has keys, values and stored results of its own.

    Parameters
    ----------
    reference, model : losart.Model
        Of the same vocabulary; perhaps one and the same.
    config : EvalConfig, optional
        What prompts are about, and the attention settings of `model`.
    text : Path, optional
        A file of text whose pieces are the prompts, in place of the tasks' documents.
    on_row : callable, optional
        Called with the figures of each setting.
    progress : callable, optional
        Called after each prompt and setting with those done and in all.

    Raises
    ------
    OptionError
        As `evaluate`; or the models differ in their vocabulary.
    DataError
        The text is none, or too short.
    """
    config = EvalConfig() if config is None else config
    if reference.config.vocab_size != model.config.vocab_size:
        raise OptionError(
            f"the reference has {reference.config.vocab_size} tokens, and the model {model.config.vocab_size}"
        )
    style = check_config(model, config, questions=text is None)
    shared = config.shared_options(ANSWER_TOKENS[style])
    probes = Probe(reference._engine.runner), Probe(model._engine.runner)
    done, rows = itertools.count(1), list[Divergence]()
    tasks = 1 if text is not None else len(config.tasks)
    total = len(config.lengths) * tasks * config.samples * len(config.settings)
    for length in config.lengths:
        prompts = list(_prompts(model, config, style, length, text))
        for setting in config.settings:
            found = []
            for ids in prompts:
                found.append(_along(probes, ids, shared, setting))
                if progress is not None:
                    progress(next(done), total)
            rows.append(_figures(length, setting, found))
            if on_row is not None:
                on_row(rows[-1])
    return rows


def _prompts(
    model: Any, config: EvalConfig, style: str, length: int, text: Path | None
) -> Iterator[list[int]]:
    if text is None:
        for name in config.tasks:
            for question in make_questions(model, TASKS[name], length, config.samples, config.seed, style):
                yield prompt_ids(question.prompt, model.config, model.tokenizer, model.chat_template)
        return
    ids = model.tokenizer.encode_file(text, config.samples * length)
    if len(ids) < config.samples * length:
        raise DataError(f"{text}: has {len(ids)} tokens, not {config.samples} times {length}")
    for first in range(0, config.samples * length, length):
        yield ids[first : first + length]


def _along(
    probes: tuple[Probe, Probe], ids: list[int], shared: Mapping[str, Any], setting: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Divergences of all masked positions of all passes over an answer, and whether the best tokens agree."""
    dense, own = (generation_config(probes[0].config, {**shared, **more}) for more in ({}, setting))
    piece = min(probe.prefill_tokens for probe in probes)  # or one would be ahead of the other
    leader, follower = Follower(probes[0], ids, dense, piece), Follower(probes[1], ids, own, piece)
    found = []
    while not leader.sequence.finished:
        after = leader.run()
        follower.run()
        if after is not None:
            found.append(divergences(leader.logits, follower.logits))
        for one in (leader, follower):
            one.sequence.apply(*after or ())
    kl, agree = zip(*found, strict=True)
    return np.concatenate(kl), np.concatenate(agree)


def _figures(
    length: int, setting: Mapping[str, Any], found: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Divergence:
    kl, agree = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Divergence(
        length=length,
        attention=setting["attention"],
        budget=setting.get("budget"),
        active=setting.get("active"),
        samples=len(found),
        positions=len(kl),
        mean=float(kl.mean()),
        high=float(np.quantile(kl, 0.99)),
        agreement=float(agree.mean()),
    )
