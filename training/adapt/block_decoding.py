"""Greedy decoding in blocks, many prompts at once: for measuring while a model is in training.

As Fast-dLLM v2 decodes with one sub-block to a block, if rows are shifted, and as SDAR does otherwise, by a
confidence threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .decoder import Cache, Shape, Weights, forward, logits
from .next_tokens import padded


@dataclass(frozen=True)
class Decoding:
    """How blocks are decoded.

    Attributes
    ----------
    shifted : bool
    block : int
    mask_id, end_id : int
    threshold : float
        Of a token's probability; the likeliest token of a pass is fixed in any case.
    """

    shifted: bool
    block: int
    mask_id: int
    end_id: int
    threshold: float = 0.9


@dataclass(frozen=True)
class Decoded:
    """Answers, each with its end token if it came to one, and passes of all together."""

    answers: list[list[int]]
    passes: int
    commits: int

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(map(len, self.answers))


@torch.no_grad()
def decode(
    shape: Shape, weights: Weights, prompts: Sequence[Sequence[int]], count: int, how: Decoding
) -> Decoded:
    """Answers of `count` tokens at most."""
    device, block = weights["embed"].device, how.block
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    whole = -(-int(lengths.max()) // block) * block
    ids = padded([*prompts, [how.end_id] * whole], how.end_id, device)[:-1]
    rows, size = len(prompts), whole + count + 2 * block
    row = torch.arange(rows, device=device)
    cache = Cache(shape, rows, size, weights["embed"])
    places, offsets = torch.arange(size, device=device), torch.arange(block, device=device)

    def guess(x: Tensor) -> tuple[Tensor, Tensor]:
        found = logits(shape, weights, x).float()
        found[..., how.mask_id] = -torch.inf
        best = found.max(-1)
        return best.indices, (best.values - found.logsumexp(-1)).exp()

    at = places[:whole]
    seen = (at // block <= at[:, None] // block)[None] & (at < lengths[:, None, None])
    seen = (seen | (at == at[:, None]))[:, None]  # what fills up sees itself, so that no row sees nothing
    x = forward(shape, weights, ids, at.expand(rows, -1), seen, cache, how.mask_id)
    start = lengths // block * block
    seed = guess(x[row, (start - 1).clamp(min=0)])[0]
    text = torch.full((rows, size), how.end_id, device=device)
    text[:, :whole] = ids
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    passes = commits = 0
    while True:
        positions = start[:, None] + offsets
        new = positions >= lengths[:, None]
        now = torch.where(new, how.mask_id, text.gather(1, positions))
        if how.shifted:
            now[:, 0] = torch.where(new[:, 0], seed, now[:, 0])
        now = torch.where(done[:, None], how.end_id, now)
        seen = (places <= positions[:, -1:])[:, None, None]
        while True:
            masked = now == how.mask_id
            open_rows = masked.any(1) & ~_ended(now, new, how)
            if not bool(open_rows.any()):
                break
            x = forward(shape, weights, now, positions, seen, cache, how.mask_id)
            if how.shifted:
                x = torch.cat([x[:, :1], x[:, :-1]], 1)
            token, chance = guess(x)
            chance = torch.where(masked, chance, -1.0)
            fixed = (chance > how.threshold) | (offsets == chance.argmax(1, keepdim=True))
            now = torch.where(fixed & masked & open_rows[:, None], token, now)
            passes += int(open_rows.sum())
        text.scatter_(1, positions, torch.where(now == how.mask_id, how.end_id, now))
        start = start + block
        done |= ((now == how.end_id) & new).any(1) | (start >= lengths + count)
        if bool(done.all()):
            break
        commits += int((~done).sum())
        seed = guess(forward(shape, weights, now, positions, seen, cache, how.mask_id)[:, -1])[0]
    answers = []
    for prompt, given in zip(prompts, text.tolist(), strict=True):
        answer = given[len(prompt) : len(prompt) + count]
        ended = how.end_id in answer
        answers.append(answer[: answer.index(how.end_id) + 1] if ended else answer)
    return Decoded(answers, passes, commits)


def _ended(now: Tensor, new: Tensor, how: Decoding) -> Tensor:
    """Whether an end token follows the prompt with no mask before it."""
    ends = (now == how.end_id) & new
    return (ends & ((now == how.mask_id).cumsum(1) == 0)).any(1)
