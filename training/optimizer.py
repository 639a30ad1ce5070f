"""AdamW as training uses it."""

from __future__ import annotations

from typing import Any

import torch
from small_sdar import SmallSdar


def make_optimizer(model: SmallSdar, peak: float) -> torch.optim.AdamW:
    """AdamW; matrices decay, gains of q and k learn five times as fast (`times` the learning rate)."""
    groups: dict[str, dict[str, Any]] = {
        "matrix": {"params": [], "weight_decay": 0.1, "times": 1.0, "lr": peak},
        "norm": {"params": [], "weight_decay": 0.0, "times": 1.0, "lr": peak},
        "head norm": {"params": [], "weight_decay": 0.0, "times": 5.0, "lr": peak},
    }
    for name, value in model.named_parameters():
        of_head = "q_norm" in name or "k_norm" in name
        kind = "matrix" if value.ndim > 1 else "head norm" if of_head else "norm"
        groups[kind]["params"].append(value)
    return torch.optim.AdamW(list(groups.values()), betas=(0.9, 0.95), fused=True)
