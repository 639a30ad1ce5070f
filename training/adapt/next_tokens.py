"""Greedy answers of the base model itself, token by token, and how likely it finds a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .decoder import Cache, Shape, Weights, forward, logits


def padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> torch.Tensor:
    """Rows of ids with `fill` after the shorter ones, int64 [rows, tokens]."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], device=device)


def until_end(rows: Sequence[list[int]], end_id: int) -> list[list[int]]:
    """Each row up to and with its first end token."""
    return [row[: row.index(end_id) + 1] if end_id in row else row for row in rows]


@torch.no_grad()
def answer(
    shape: Shape,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    count: int,
    end_id: int,
) -> list[list[int]]:
    """Greedy answers of `count` tokens at most, each with its end token if it came to one."""
    device = weights["embed"].device
    ids = padded(prompts, end_id, device)
    rows, longest = ids.shape
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = Cache(shape, rows, longest + count, weights["embed"])
    x = forward(shape, weights, ids, torch.arange(longest, device=device).expand(rows, -1), cache=cache)
    x = x[torch.arange(rows, device=device), lengths - 1]
    places = torch.arange(longest + count, device=device)
    out: list[torch.Tensor] = []
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    for step in range(count):
        token = torch.where(done, end_id, logits(shape, weights, x).argmax(-1))
        out.append(token)
        done |= token == end_id
        if step + 1 == count or (step % 16 == 15 and bool(done.all())):
            break
        at = (lengths + step)[:, None]
        seen = (places <= at)[:, None, None]
        x = forward(shape, weights, token[:, None], at, seen, cache)[:, 0]
    return until_end(torch.stack(out, 1).tolist(), end_id)


@torch.no_grad()
def nll(
    shape: Shape,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    end_id: int,
    batch: int = 64,
) -> tuple[float, int]:
    """The sum of -log p of all answers' tokens under the base model, and their number."""
    device = weights["embed"].device
    total, count = 0.0, 0
    for start in range(0, len(prompts), batch):
        pairs = list(zip(prompts[start : start + batch], answers[start : start + batch], strict=True))
        ids = padded([[*prompt, *given] for prompt, given in pairs], end_id, device)
        places = torch.arange(ids.shape[1], device=device)
        first = torch.tensor([len(prompt) for prompt, _ in pairs], device=device)[:, None]
        last = first + torch.tensor([len(given) for _, given in pairs], device=device)[:, None]
        scored = ((places >= first) & (places < last))[:, 1:]
        x = forward(shape, weights, ids, places.expand(len(pairs), -1))[:, :-1][scored]
        total += F.cross_entropy(
            logits(shape, weights, x).float(), ids[:, 1:][scored], reduction="sum"
        ).item()
        count += int(scored.sum())
    return total, count
