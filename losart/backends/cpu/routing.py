"""Which experts a token goes to."""

from __future__ import annotations

import numpy as np

from losart.config.model import ExpertsConfig

LEAST_SUM = np.float32(1e-20)  # of scores that are divided by it, as in the reference implementations


def route(
    logits: np.ndarray, bias: np.ndarray | None, config: ExpertsConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Choose experts, as `ExpertsConfig` says.

    Parameters
    ----------
    logits : float32 [tokens, experts]
    bias : float32 [experts], optional
    config : ExpertsConfig

    Returns
    -------
    chosen : int64 [tokens, per_token]
        By descending score, of equal ones the earlier first. Softmax keeps the order: logits decide.
    weights : float32 [tokens, per_token]
    """
    if config.scores == "sigmoid":
        with np.errstate(over="ignore"):  # exp(-x) = inf gives the right zero
            scores = ranks = 1 / (1 + np.exp(-logits))
    else:
        scores, ranks = np.exp(logits - logits.max(axis=1, keepdims=True)), logits
        scores /= scores.sum(axis=1, keepdims=True)
    if bias is not None:
        ranks = ranks + bias
    if config.groups > 1:
        of_groups = ranks.reshape(len(ranks), config.groups, -1)
        best = np.partition(of_groups, -2, axis=2)[:, :, -2:].sum(axis=2)
        kept = np.zeros(best.shape, bool)
        np.put_along_axis(kept, _highest(best, config.kept_groups), True, axis=1)
        ranks = np.where(kept[:, :, None], of_groups, -np.inf).reshape(ranks.shape)
    chosen = _highest(ranks, config.per_token)
    weights = np.take_along_axis(scores, chosen, axis=1)
    if config.normalize:
        weights /= weights.sum(axis=1, keepdims=True) + LEAST_SUM
    return chosen, weights * np.float32(config.scaling)


def _highest(values: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-values, axis=1, kind="stable")[:, :count]
