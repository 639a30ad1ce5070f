"""One token of every row: the model's step and the draw, in Triton on a GPU, else in torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .decoder import Cache, Shape, Weights, forward, fused, logits, rms_norm, rotation


class TorchStep:
    """In torch.

    Parameters
    ----------
    shape : Shape
    weights : dict
    rows, length : int
        Of the cache.
    banned : bool [vocab]
        Tokens that are never drawn.
    min_p : float
        Tokens less likely than this share of the likeliest one's chance, at the temperature, are not drawn.
    seed : int
    """

    def __init__(
        self, shape: Shape, weights: Weights, rows: int, length: int, banned: Tensor, min_p: float, seed: int
    ) -> None:
        self.shape, self.weights, self.banned, self.min_p = shape, weights, banned, min_p
        self.rows, self.length = rows, length
        self.device = weights["embed"].device
        self.generator = torch.Generator(device=self.device).manual_seed(seed)
        self.cache = Cache(shape, rows, length, weights["embed"])

    def begin(self, prefix: list[int]) -> None:
        """Put the tokens that all rows begin with, but for the last of them, into the cache."""
        cache = Cache(self.shape, 1, len(prefix), self.weights["embed"])
        ids = torch.tensor([prefix], device=self.device)
        places = torch.arange(len(prefix), device=self.device)[None]
        forward(self.shape, self.weights, ids, places, cache=cache)
        self.cache.k[:, :, :, : len(prefix)] = cache.k
        self.cache.v[:, :, :, : len(prefix)] = cache.v

    def __call__(self, tokens: Tensor, positions: Tensor, temperatures: Tensor) -> Tensor:
        """The next tokens, int64 [rows], of those at hand, int64, at their positions, int64."""
        seen = (torch.arange(self.length, device=self.device) <= positions[:, None])[:, None, None]
        x = forward(self.shape, self.weights, tokens[:, None], positions[:, None], seen, self.cache)[:, 0]
        found = logits(self.shape, self.weights, x).float().masked_fill(self.banned, -torch.inf)
        found = found / temperatures[:, None]
        found = found.masked_fill(found < found.amax(1, keepdim=True) + math.log(self.min_p), -torch.inf)
        noise = torch.empty_like(found).exponential_(generator=self.generator)
        return (found.softmax(-1) / noise).argmax(-1)


class TritonStep(TorchStep):
    """In Triton, but for the matrices' products. All memory is taken at the start, for a CUDA graph."""

    def __init__(
        self, shape: Shape, weights: Weights, rows: int, length: int, banned: Tensor, min_p: float, seed: int
    ) -> None:
        super().__init__(shape, weights, rows, length, banned, min_p, seed)
        from . import sampler_kernels

        self.kernels = sampler_kernels
        self.layers = fused(shape, weights)
        self.head = weights["embed"] if shape.tied else weights["head"]
        self.no = banned.to(torch.uint8)
        self.tables = [
            part.contiguous() for part in rotation(shape, torch.arange(length, device=self.device))
        ]
        self.seed = seed * 1_000_003 % 2**31
        self.step = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.drawn = torch.zeros(rows, dtype=torch.int64, device=self.device)

    def __call__(self, tokens: Tensor, positions: Tensor, temperatures: Tensor) -> Tensor:
        """As that of `TorchStep`."""
        shape, kernels = self.shape, self.kernels
        x = self.weights["embed"][tokens]
        for number, (input_norm, qkv, out, post_norm, gate_up, down, *more) in enumerate(self.layers):
            h = self._norm(x, input_norm) @ qkv.t()
            if shape.qkv_bias:
                h = h + more[0]
            if shape.head_norms:
                h = self._head_norms(h, more[-2], more[-1])
            queries = h.new_empty(self.rows, shape.heads * shape.head_dim)
            keys, values = self.cache.k[number], self.cache.v[number]
            heads = {"HEADS": shape.heads, "KV": shape.kv_heads, "SIZE": shape.head_dim}
            kernels.rotate_and_store[(self.rows, shape.heads + 2 * shape.kv_heads)](
                h, positions, *self.tables, keys, values, queries, self.length, **heads, num_warps=1
            )
            found = torch.empty_like(queries)
            kernels.attention[(self.rows, shape.kv_heads)](
                *(queries, keys, values, positions, found, self.length, shape.head_dim**-0.5),
                **heads,
                GROUP=max(16, 1 << (shape.heads // shape.kv_heads - 1).bit_length()),
                TILE=64,
                COMPUTE=self._compute_type(h.dtype),
                num_warps=4,
            )
            x = torch.addmm(x, found, out.t())
            h = self._norm(x, post_norm) @ gate_up.t()
            inner = h.new_empty(self.rows, shape.ffn)
            padded = 1 << (shape.ffn - 1).bit_length()
            kernels.silu_times[(self.rows,)](h, inner, shape.ffn, padded, num_warps=4)
            x = torch.addmm(x, inner, down.t())
        found = self._norm(x, self.weights["final_norm"]) @ self.head.t()
        kernels.sample[(self.rows,)](
            *(found, self.no, temperatures, self.step, self.seed, self.drawn, math.log(self.min_p)),
            VOCAB=shape.vocab,
            TILE=2048,
            num_warps=8,
        )
        self.step += 1
        return self.drawn

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        out, size = torch.empty_like(x), x.shape[1]
        padded = 1 << (size - 1).bit_length()
        self.kernels.rms_norm[(len(x),)](x, weight, out, self.shape.eps, size, padded, num_warps=4)
        return out

    def _head_norms(self, h: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
        shape = self.shape
        sizes = [shape.heads, shape.kv_heads, shape.kv_heads]
        q, k, v = h.view(self.rows, -1, shape.head_dim).split(sizes, 1)
        parts = [rms_norm(q, q_norm, shape.eps), rms_norm(k, k_norm, shape.eps), v]
        return torch.cat(parts, 1).view(self.rows, -1)

    def _compute_type(self, dtype: torch.dtype) -> Any:
        import triton.language as tl

        return tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
