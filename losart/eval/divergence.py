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
from losart.engine.logprobs import log_softmax
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


class Follower:
    """A generation by one transformer, whose passes end as somebody says.

    Parameters
    ----------
    runner : Transformer
    ids : list of int
        The prompt's.
    options : GenerationConfig
    prefill_tokens : int
        Of a piece of the prompt.

    Attributes
    ----------
    logits : float32 [masked rows, vocab] or None
        Of the last pass, if it proposed tokens; the mask token's are -inf.
    """

    def __init__(
        self, runner: Transformer, ids: list[int], options: GenerationConfig, prefill_tokens: int
    ) -> None:
        self._runner = runner
        self.logits: np.ndarray | None = None
        expected = min(len(ids) + options.max_new_tokens, runner.config.max_positions)
        self.sequence = Decoded(
            ids,
            options,
            Output(expected - len(ids), options.stop_token_ids),
            runner.new_cache(options, expected),
            prefill_tokens,
            deterministic=runner.deterministic,
        )
        self.sequence.slot = runner.new_slot(options)

    def run(self) -> tuple[list[int], list[int]] | None:
        """Run the next pass; returns the block after it and where it is still masked, if it denoises."""
        self.sequence.cache.reserve(self.sequence.next_end)
        passes = self.sequence.next_pass()
        passes[-1].keeps_logits = True
        proposals = self._runner.forward(PassBatch(passes)).proposals
        self.logits = None if proposals is None else proposals.logits
        return None if proposals is None else remask(proposals, list(passes))[0]


def divergences(reference: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL(reference || found) of each row of logits [rows, vocab], float64, and whether both have one maximum.

    Tokens whose logits are -inf in both do not count.
    """
    p, q = (log_softmax(logits) for logits in (reference, found))
    weights = np.exp(p)
    with np.errstate(invalid="ignore"):  # -inf less -inf, of tokens that weigh nothing
        terms = np.where(weights > 0, weights * (p - q), 0)
    return np.maximum(terms.sum(axis=1), 0), reference.argmax(axis=1) == found.argmax(axis=1)


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
    runners = reference._engine.runner, model._engine.runner
    done, rows = itertools.count(1), list[Divergence]()
    tasks = 1 if text is not None else len(config.tasks)
    total = len(config.lengths) * tasks * config.samples * len(config.settings)
    for length in config.lengths:
        prompts = list(_prompts(model, config, style, length, text))
        for setting in config.settings:
            found = []
            for ids in prompts:
                found.append(_along(runners, ids, shared, setting))
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
    runners: tuple[Transformer, Transformer],
    ids: list[int],
    shared: Mapping[str, Any],
    setting: Mapping[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    """Divergences of all masked positions of all passes over an answer, and whether the best tokens agree."""
    dense, own = (generation_config(runners[0].config, {**shared, **more}) for more in ({}, setting))
    piece = min(runner.prefill_tokens for runner in runners)  # or one would be ahead of the other
    leader, follower = Follower(runners[0], ids, dense, piece), Follower(runners[1], ids, own, piece)
    found = []
    while not leader.sequence.finished:
        after = leader.run()
        follower.run()
        if leader.logits is not None and follower.logits is not None:
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
