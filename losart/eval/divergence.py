"""How far a model's distributions are from another one's along the way that the other takes: no labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from losart.config.options import GenerationConfig, generation_config
from losart.engine.batch import PassBatch
from losart.engine.kv_cache import PagedKVCache
from losart.engine.logprobs import log_softmax
from losart.engine.output import Output
from losart.engine.remasking import remask
from losart.engine.sequence import ReadLog
from losart.engine.sequence import Sequence as Decoded
from losart.errors import OptionError
from losart.eval.evaluation import ANSWER_TOKENS, EvalConfig, check_config
from losart.eval.figures import mean
from losart.eval.prompts import count_prompts, make_prompts
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
    sparse_density, active_fraction : float or None
        As of `Stats`.
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
    sparse_density: float | None
    active_fraction: float | None


@dataclass(frozen=True)
class Along:
    """Of all masked positions of all passes over an answer: divergences, whether the best tokens agree.

    `reads` is what the follower read.
    """

    divergences: np.ndarray
    agree: np.ndarray
    reads: ReadLog


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
    cache : PagedKVCache
        Empty, or with the prompt's first pages.

    Attributes
    ----------
    logits : float32 [masked rows, vocab] or None
        Of the last pass, if it proposed tokens; the mask token's are -inf.
    """

    def __init__(
        self,
        runner: Transformer,
        ids: list[int],
        options: GenerationConfig,
        prefill_tokens: int,
        cache: PagedKVCache,
    ) -> None:
        self._runner = runner
        self.logits: np.ndarray | None = None
        output = Output(_expected(runner, ids, options) - len(ids), options.stop_token_ids)
        self.sequence = Decoded(
            ids, options, output, cache, prefill_tokens, deterministic=runner.deterministic
        )
        self.sequence.slot = runner.new_slot(options)

    def run(self) -> tuple[list[int], list[int]] | None:
        """Run the next pass; returns the block after it and where it is still masked, if it denoises."""
        self.sequence.cache.reserve(self.sequence.next_end)
        passes = self.sequence.next_pass()
        passes[-1].keeps_logits = True
        prefix, runner = self.sequence.cache.length, self._runner
        result = runner.forward(PassBatch(passes))
        for reads in result.reads:
            self.sequence.reads.add(reads, prefix, runner.config.num_kv_heads)
        proposals = result.proposals
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
        The file is no text, or has too few tokens.
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
    total = count_prompts(config, text) * len(config.settings)
    options = generation_config(reference.config, shared)
    for length in config.lengths:
        found: list[list[Along]] = [[] for _ in config.settings]
        for ids in make_prompts(model, config, style, length, text):
            caches = [runner.new_cache(options, _expected(runner, ids, options)) for runner in runners]
            for setting, of_setting in zip(config.settings, found, strict=True):
                of_setting.append(_along(runners, caches, ids, shared, setting))
                if progress is not None:
                    progress(next(done), total)
        for setting, of_setting in zip(config.settings, found, strict=True):
            rows.append(_figures(length, setting, of_setting))
            if on_row is not None:
                on_row(rows[-1])
    return rows


def _expected(runner: Transformer, ids: list[int], options: GenerationConfig) -> int:
    """Positions at the end of a generation."""
    return min(len(ids) + options.max_new_tokens, runner.config.max_positions)


def _along(
    runners: Sequence[Transformer],
    caches: Sequence[PagedKVCache],
    ids: list[int],
    shared: Mapping[str, Any],
    setting: Mapping[str, Any],
) -> Along:
    """Over an answer; the caches are left with the prompt's whole pages, for the next setting."""
    dense, own = (generation_config(runners[0].config, {**shared, **more}) for more in ({}, setting))
    piece = min(runner.prefill_tokens for runner in runners)  # or one would be ahead of the other
    leader, follower = (
        Follower(runner, ids, options, piece, cache)
        for runner, options, cache in zip(runners, (dense, own), caches, strict=True)
    )
    found = []
    while not leader.sequence.finished:
        after = leader.run()
        follower.run()
        if leader.logits is not None and follower.logits is not None:
            found.append(divergences(leader.logits, follower.logits))
        for one in (leader, follower):
            one.sequence.apply(*after or ())
    for one in (leader, follower):
        unit = math.lcm(one.sequence.cache.page_size, dense.block_length)  # a page has bounds of all it held
        one.sequence.cache.length = len(one.sequence.prefix) // unit * unit
    kl, agree = zip(*found, strict=True)
    return Along(np.concatenate(kl), np.concatenate(agree), follower.sequence.reads)


def _figures(length: int, setting: Mapping[str, Any], found: Sequence[Along]) -> Divergence:
    kl = np.concatenate([one.divergences for one in found])
    agree = np.concatenate([one.agree for one in found])
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
        sparse_density=mean(one.reads.sparse_density for one in found),
        active_fraction=mean(one.reads.active_fraction for one in found),
    )
