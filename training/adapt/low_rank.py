"""A change of matrices as products of low rank (singular value decomposition), within a size if need be."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from .decoder import MATRICES, Weights

BYTES = 2  # of a number in an adapter's file


def factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest products of a rank.

    Parameters
    ----------
    change : [layers, out, in]

    Returns
    -------
    a : [layers, rank, in]
    b : [layers, out, rank]
        Both carry the root of the singular values.
    values : [layers, rank]
        Singular values, the largest first.
    """
    wide = change.double()
    flipped = wide.shape[1] > wide.shape[2]
    if flipped:
        wide = wide.transpose(1, 2)
    squares, left = torch.linalg.eigh(wide @ wide.transpose(1, 2))  # smallest first
    left, squares = left.flip(-1)[..., :rank], squares.flip(-1)[..., :rank].clamp(min=0)
    values = squares.sqrt()
    roots = values.clamp(min=1e-30).maximum(1e-6 * values[..., :1]).sqrt()  # not by what is only rounding
    right = left.transpose(1, 2) @ wide / roots[..., None]
    b, a = left * roots[:, None], right
    if flipped:
        b, a = a.transpose(1, 2), b.transpose(1, 2)
    return a.float(), b.float(), values.float()


def ranks_within(values: dict[str, Tensor], sizes: dict[str, int], room: int) -> dict[str, list[int]]:
    """How many singular values of each matrix to keep, to keep most of the change in so many bytes.

    Parameters
    ----------
    values : dict of [layers, rank]
        By kind of matrix.
    sizes : dict of int
        out + in of each kind: the numbers that one more rank takes.
    room : int
        Bytes. Every matrix keeps one value at least.
    """
    ranks = {kind: [1] * len(of_kind) for kind, of_kind in values.items()}
    room -= sum(BYTES * sizes[kind] * len(of_kind) for kind, of_kind in values.items())
    gains = {kind: (of_kind.square() / sizes[kind]).tolist() for kind, of_kind in values.items()}
    heap = [
        (-of_layer[1], kind, number)
        for kind, of_kind in gains.items()
        for number, of_layer in enumerate(of_kind)
        if len(of_layer) > 1
    ]
    heapq.heapify(heap)
    while heap:
        _, kind, number = heapq.heappop(heap)
        if room < BYTES * sizes[kind]:
            continue
        room -= BYTES * sizes[kind]
        rank = ranks[kind][number] = ranks[kind][number] + 1
        if rank < len(gains[kind][number]):
            heapq.heappush(heap, (-gains[kind][number][rank], kind, number))
    return ranks


def products(
    base: Weights, weights: Weights, rank: int, room: int | None = None
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Of each kind of matrix that changed, each layer's (a [rank, in], b [out, rank]).

    Parameters
    ----------
    base, weights : dict
    rank : int
        Of each matrix at most.
    room : int, optional
        Bytes of all together at most; ranks then differ.
    """
    found = {}
    for kind in MATRICES:
        change = weights[kind].float() - base[kind].float()
        if change.any():
            found[kind] = factors(change, min(rank, *change.shape[1:]))
    ranks = {kind: [values.shape[1]] * len(values) for kind, (_, _, values) in found.items()}
    if room is not None:
        sizes = {kind: a.shape[2] + b.shape[1] for kind, (a, b, _) in found.items()}
        ranks = ranks_within({kind: values for kind, (_, _, values) in found.items()}, sizes, room)
    return {
        kind: [
            (one_a[:count], one_b[:, :count]) for one_a, one_b, count in zip(a, b, ranks[kind], strict=True)
        ]
        for kind, (a, b, _) in found.items()
    }


def added(base: Weights, found: dict[str, list[tuple[Tensor, Tensor]]]) -> Weights:
    """A base's matrices with products added."""
    return {
        kind: torch.stack(
            [matrix.float() + b @ a for matrix, (a, b) in zip(base[kind], of_kind, strict=True)]
        )
        for kind, of_kind in found.items()
    }
