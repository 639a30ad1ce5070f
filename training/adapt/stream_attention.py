"""Attention over a stream: FlexAttention on a GPU, under the same mask written out elsewhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .stream import Sizes, Stream

TILE = 128
_STRETCHES = ("clean_from", "clean_to", "noisy_from", "noisy_to")


def dense_mask(stream: Stream) -> Tensor:
    """Which token sees which, bool [tokens, tokens]."""
    keys = torch.arange(len(stream.ids), device=stream.ids.device)
    clean_from, clean_to, noisy_from, noisy_to = (getattr(stream, name)[:, None] for name in _STRETCHES)
    return ((keys >= clean_from) & (keys < clean_to)) | ((keys >= noisy_from) & (keys < noisy_to))


def tiles(stream: Stream, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Tiles of which some pairs are seen, and those of which all are; bool [tiles, tiles].

    The former may name tiles of which no pair is seen.
    """
    first = torch.arange(0, sizes.tokens, TILE, device=stream.ids.device)
    stretches = {name: getattr(stream, name).view(-1, TILE) for name in _STRETCHES}
    empty = stretches["clean_from"] >= stretches["clean_to"]
    begins, ends = stretches["clean_from"], stretches["clean_to"]
    lowest = begins.masked_fill(empty, sizes.tokens).amin(1)[:, None]
    highest = ends.masked_fill(empty, 0).amax(1)[:, None]
    some = (first < highest) & (first + TILE > lowest)
    whole = (first >= begins.amax(1)[:, None]) & (first + TILE <= ends.amin(1)[:, None])
    noisy = first >= sizes.clean
    # A noisy block lies within a tile.
    some = torch.where(noisy, torch.eye(len(first), dtype=torch.bool, device=first.device), some)
    some[~noisy] &= ~noisy
    return some & ~whole, whole & ~noisy


class StreamAttention:
    """The mask of the stream at hand, in tensors that stay where they are: compiled code reads them anew.

    Parameters
    ----------
    sizes : Sizes
    device : torch.device
    flex : bool
        Whether to use FlexAttention.
    """

    def __init__(self, sizes: Sizes, device: torch.device, flex: bool) -> None:
        self.sizes, self.flex = sizes, flex
        self.mask: Any = None
        self._stretches = [torch.zeros(sizes.tokens, dtype=torch.int32, device=device) for _ in _STRETCHES]
        clean_from, clean_to, noisy_from, noisy_to = self._stretches

        def sees(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            in_clean = (key >= clean_from[query]) & (key < clean_to[query])
            return in_clean | ((key >= noisy_from[query]) & (key < noisy_to[query]))

        self._sees = sees

    def set(self, stream: Stream) -> None:
        """Take the mask of a stream."""
        if not self.flex:
            self.mask = dense_mask(stream)
            return
        for kept, name in zip(self._stretches, _STRETCHES, strict=True):
            kept.copy_(getattr(stream, name))
        some, whole = tiles(stream, self.sizes)
        made = BlockMask.from_kv_blocks(*_listed(some), *_listed(whole), BLOCK_SIZE=TILE, mask_mod=self._sees)
        if self.mask is None:
            self.mask = made
            return
        for name, value in vars(made).items():
            if isinstance(value, Tensor):
                getattr(self.mask, name).copy_(value)


def attend(mask: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention under a BlockMask, or a bool mask."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _listed(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The number of wanted tiles in each row, and their numbers before those of the others."""
    counts = wanted.sum(1, dtype=torch.int32)
    order = torch.argsort(wanted.int(), dim=1, descending=True, stable=True).int()
    return counts[None, None], order[None, None]
