"""Whether few tokens of a block hold most of the change between passes: LoSA's premise, measured."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from losart.attention import DensePolicy
from losart.config.options import generation_config
from losart.engine.batch import PassKind
from losart.engine.engine import Engine
from losart.errors import OptionError
from losart.eval.evaluation import ANSWER_TOKENS, EvalConfig, check_config
from losart.eval.prompts import count_prompts, make_prompts
from losart.observe.step import Progress

TOP = (1, 3, 5, 8)  # tokens of a block
COUNTED = 5  # of the tokens that changed most: what they are
KINDS = ("unmasked", "neighbours", "others")


@dataclass(frozen=True)
class Locality:
    """The change of a layer's queries from pass to pass of dense decoding, means over passes.

    The change of a token is the mean over heads and channels of its query's squared difference.
    Tokens are those just unmasked, their direct neighbours in the block, and all others.

    Attributes
    ----------
    layer : int or None
        None for the mean over all layers.
    passes : int
    top : dict of str to float
        Share of a block's change in its 1, 3, 5 and 8 tokens that changed most.
    change : dict of str to float
        Share of a block's change in each kind of token.
    active : dict of str to float
        Share of each kind among the 5 tokens that changed most.
    tokens : dict of str to float
        Share of each kind among all tokens, to compare with.
    """

    layer: int | None
    passes: int
    top: dict[str, float]
    change: dict[str, float]
    active: dict[str, float]
    tokens: dict[str, float]


class QueryChanges(DensePolicy):
    """Dense attention that notes how queries change.

    Attributes
    ----------
    rows : list of lists of float64 [13]
        For each layer, a row for each pass but a block's first: shares as in `Locality`, in order.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rows: list[list[np.ndarray]] = [[] for _ in range(self.model.num_layers)]
        self._queries: dict[int, np.ndarray] = {}
        self._masked = np.empty(0, np.int32)
        self._kinds = np.empty(0, np.int64)

    @property
    def commits_ride(self) -> bool:
        return False  # a pass has the rows of one block

    def attend(self, backend: Any, layer: int, q: Any, k: Any, v: Any, batch: Any) -> Any:
        (sequence,) = batch.sequences
        if layer == 0:
            masked = np.asarray(sequence.masked, np.int32)
            if batch.kind is not PassKind.FIRST:
                self._kinds = token_kinds(self.block_length, np.setdiff1d(self._masked, masked))
            self._masked = masked
        if batch.kind is PassKind.LATER:
            change = np.square(q.astype(np.float64) - self._queries[layer]).mean(axis=(1, 2))
            if change.sum() > 0:
                self.rows[layer].append(shares(change, self._kinds))
        self._queries[layer] = q.copy()
        return super().attend(backend, layer, q, k, v, batch)


def token_kinds(block_length: int, unmasked: np.ndarray) -> np.ndarray:
    """Index into `KINDS` of each token of a block, of which some were just unmasked."""
    kinds = np.full(block_length, KINDS.index("others"))
    beside = np.concatenate([unmasked - 1, unmasked + 1])
    kinds[beside[(beside >= 0) & (beside < block_length)]] = KINDS.index("neighbours")
    kinds[unmasked] = KINDS.index("unmasked")
    return kinds


def shares(change: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Shares of one pass, `top`, `change`, `active` and `tokens` of `Locality` in a row.

    Parameters
    ----------
    change : float [tokens]
    kinds : int [tokens]
    """
    order = np.argsort(-change, kind="stable")
    within = np.cumsum(change[order]) / change.sum()
    top = [within[min(count, len(change)) - 1] for count in TOP]
    of_kind = kinds == np.arange(len(KINDS))[:, None]
    by_change = of_kind @ change / change.sum()
    active = of_kind[:, order[:COUNTED]].mean(axis=1)
    return np.concatenate([top, by_change, active, of_kind.mean(axis=1)])


def measure_locality(
    model: Any,
    config: EvalConfig | None = None,
    *,
    text: Path | None = None,
    progress: Progress | None = None,
) -> list[Locality]:
    """How a model's queries change while it goes on after prompts, densely, on the CPU.

    Parameters
    ----------
    model : losart.Model
    config : EvalConfig, optional
        Its attention settings are not used.
    text : Path, optional
        A file of text whose pieces are the prompts, in place of questions.
    progress : callable, optional
        Called after each prompt with those done and in all.

    Returns
    -------
    list of Locality
        One for each layer, and one for all.

    Raises
    ------
    OptionError
        As `evaluate`; the model is not on the CPU; or no block has a second pass.
    DataError
        The file is no text, or has too few tokens.
    """
    config = EvalConfig() if config is None else config
    if model.device != "cpu":
        raise OptionError("locality is measured on the CPU: load the model with device='cpu'")
    style = check_config(model, config, questions=text is None)
    options = generation_config(model.config, config.shared_options(ANSWER_TOKENS[style]))
    transformer = copy.copy(model._engine.runner)
    policy = QueryChanges(options.attention, model.config, options.block_length)
    transformer.policies = {(options.attention, options.block_length): policy}
    engine, rows = Engine(transformer), policy.rows
    total = count_prompts(config, text)
    prompts = (ids for length in config.lengths for ids in make_prompts(model, config, style, length, text))
    for done, ids in enumerate(prompts, 1):
        engine.submit(ids, options).result()
        if progress is not None:
            progress(done, total)
    if not all(rows):
        raise OptionError("locality needs blocks of more than one pass: raise denoising_steps")
    layers = [_locality(layer, np.array(passes)) for layer, passes in enumerate(rows)]
    return [*layers, _locality(None, np.concatenate([np.array(passes) for passes in rows]))]


def _locality(layer: int | None, rows: np.ndarray) -> Locality:
    top, *by_kind = np.split(rows.mean(axis=0), np.cumsum([len(TOP), len(KINDS), len(KINDS)]))
    change, active, tokens = (dict(zip(KINDS, part.tolist(), strict=True)) for part in by_kind)
    return Locality(
        layer=layer,
        passes=len(rows),
        top=dict(zip(map(str, TOP), top.tolist(), strict=True)),
        change=change,
        active=active,
        tokens=tokens,
    )
