"""What training minimises: cross-entropy of the masked tokens, and doubt where the guess is right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .decoder import Shape, rms_norm

CERTAIN_TEMPERATURE = 0.5


def losses(
    shape: Shape, x: Tensor, final_norm: Tensor, head: Tensor, targets: Tensor, certain: bool
) -> tuple[Tensor, Tensor]:
    """Of each target.

    Parameters
    ----------
    x : [targets, hidden]
        Rows that predict.
    head : [vocab, hidden]
    targets : int64 [targets]
    certain : bool
        Whether the second is wanted.

    Returns
    -------
    cross_entropy : float32 [targets]
    doubt : float32 [targets]
        Where the likeliest token is the right one, the entropy of the sharpened distribution, else 0: a pass
        may fix only tokens that the model is sure of, and cross-entropy leaves it as unsure as the data are
        (dParallel, arXiv 2509.26488).
    """
    found = F.linear(rms_norm(x, final_norm, shape.eps), head).float()
    cross_entropy = F.cross_entropy(found, targets, reduction="none")
    if not certain:
        return cross_entropy, torch.zeros_like(cross_entropy)
    sharp = (found / CERTAIN_TEMPERATURE).log_softmax(-1)
    entropy = -(sharp.exp() * sharp).sum(-1)
    return cross_entropy, torch.where(found.argmax(-1) == targets, entropy, 0.0)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean by weights."""
    return (values * weights).sum() / weights.sum().clamp(min=1e-6)
