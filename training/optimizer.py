"""AdamW as training uses it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from small_sdar import SmallSdar
from torch import Tensor


def make_optimizer(model: SmallSdar, peak: float) -> torch.optim.AdamW:
    """AdamW; matrices decay, gains of q and k learn five times as fast (`times` the learning rate)."""

    def pick(wanted: Any) -> Iterator[Tensor]:
        return (value for name, value in model.named_parameters() if wanted(name, value))

    def head_norm(name: str) -> bool:
        return "q_norm" in name or "k_norm" in name

    matrices = list(pick(lambda name, value: value.ndim > 1))
    norms = list(pick(lambda name, value: value.ndim == 1 and not head_norm(name)))
    head_norms = list(pick(lambda name, value: head_norm(name)))
    groups = [
        {"params": matrices, "weight_decay": 0.1, "times": 1.0, "lr": peak},
        {"params": norms, "weight_decay": 0.0, "times": 1.0, "lr": peak},
        {"params": head_norms, "weight_decay": 0.0, "times": 5.0, "lr": peak},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
