"""Triton kernels of a decoding step for many rows at once, each at a position of its own.

bfloat16 in memory, sums in float32. A program reads its tensors once; what a step must move is the matrices,
each row's keys and values so far, and rows * vocab logits. Under Triton's interpreter they run on a CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, weight, out, eps, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """[rows, SIZE] to the like; a program a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    inside = at < SIZE
    value = tl.load(x + row * SIZE + at, mask=inside, other=0.0).to(tl.float32)
    scaled = (value * tl.rsqrt(tl.sum(value * value, 0) / SIZE + eps)).to(out.dtype.element_ty)
    result = scaled.to(tl.float32) * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_and_store(
    qkv, positions, cos, sin, keys, values, queries, length, HEADS: tl.constexpr, KV: tl.constexpr,
    SIZE: tl.constexpr
):  # fmt: skip
    """RoPE of q and k, and k and v into the cache; a program a row and head.

    qkv [rows, HEADS + 2 KV, SIZE]; cos, sin [length, SIZE]; keys, values [rows, KV, length, SIZE];
    queries [rows, HEADS, SIZE].
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = SIZE // 2
    at = tl.arange(0, HALF)
    position = tl.load(positions + row).to(tl.int64)
    source = qkv + (row * (HEADS + 2 * KV) + head) * SIZE
    first, second = tl.load(source + at).to(tl.float32), tl.load(source + HALF + at).to(tl.float32)
    c, s = tl.load(cos + position * SIZE + at), tl.load(sin + position * SIZE + at)
    if head < HEADS + KV:
        rotated = first * c - second * s
        second = second * c + first * s
        first = rotated
    if head < HEADS:
        target = queries + (row * HEADS + head) * SIZE
    elif head < HEADS + KV:
        target = keys + ((row * KV + head - HEADS) * length + position) * SIZE
    else:
        target = values + ((row * KV + head - HEADS - KV) * length + position) * SIZE
    tl.store(target + at, first.to(target.dtype.element_ty))
    tl.store(target + HALF + at, second.to(target.dtype.element_ty))


@triton.jit
def attention(
    queries, keys, values, positions, out, length, scale, HEADS: tl.constexpr, KV: tl.constexpr,
    SIZE: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """A row's token over the cache up to its position; a program a row and kv head.

    queries, out [rows, HEADS, SIZE]; keys, values [rows, KV, length, SIZE]; GROUP is 16 or more.
    """
    row, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    QUERIES: tl.constexpr = HEADS // KV
    group, at = tl.arange(0, GROUP), tl.arange(0, SIZE)
    count = tl.load(positions + row) + 1
    inside = (group < QUERIES)[:, None] & (at >= 0)[None, :]
    place = (row * HEADS + kv * QUERIES + group[:, None]) * SIZE + at[None, :]
    q = tl.load(queries + place, mask=inside, other=0.0).to(COMPUTE)
    k_start, v_start = (keys + (row * KV + kv) * length * SIZE, values + (row * KV + kv) * length * SIZE)
    largest = tl.full([GROUP], -1e30, tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    found = tl.zeros([GROUP, SIZE], tl.float32)
    for start in range(0, count, TILE):
        key = start + tl.arange(0, TILE)
        seen = key < count
        k = tl.load(k_start + key[None, :] * SIZE + at[:, None], mask=seen[None, :], other=0.0).to(COMPUTE)
        scores = tl.where(seen, tl.dot(q, k, input_precision="ieee") * (scale * 1.4426950408889634), -1e30)
        new = tl.maximum(largest, tl.max(scores, 1))
        shrink, weight = tl.exp2(largest - new), tl.exp2(scores - new[:, None])
        v = tl.load(v_start + key[:, None] * SIZE + at[None, :], mask=seen[:, None], other=0.0).to(COMPUTE)
        found = found * shrink[:, None] + tl.dot(weight.to(COMPUTE), v, input_precision="ieee")
        total = total * shrink + tl.sum(weight, 1)
        largest = new
    tl.store(out + place, (found / total[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu_times(gate_up, out, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """silu(gate) * up of [rows, 2 SIZE]; a program a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    inside = at < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + at, mask=inside, other=0.0).to(tl.float32)
    gate = (gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * SIZE + at, (gate * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def sample(logits, banned, temperatures, step, seed, out, log_min_p, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """A token by min-p sampling: the largest of logits / temperature with Gumbel noise; a program a row.

    logits [rows, VOCAB]; banned [VOCAB], not 0 for tokens that are never drawn; temperatures [rows].
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, TILE)
    temperature = tl.load(temperatures + row)
    largest = tl.full([TILE], -1e30, tl.float32)
    for start in range(0, VOCAB, TILE):
        token = start + at
        value = tl.load(logits + row * VOCAB + token, mask=token < VOCAB, other=-1e30).to(tl.float32)
        no = tl.load(banned + token, mask=token < VOCAB, other=1) != 0
        largest = tl.maximum(largest, tl.where(no, -1e30, value))
    top = tl.max(largest, 0)
    lowest = top + log_min_p * temperature
    number = tl.load(step).to(tl.int32) + seed
    best, chosen = -1e30, 0
    for start in range(0, VOCAB, TILE):
        token = start + at
        value = tl.load(logits + row * VOCAB + token, mask=token < VOCAB, other=-1e30).to(tl.float32)
        no = tl.load(banned + token, mask=token < VOCAB, other=1) != 0
        value = tl.where(no, -1e30, value)
        if tl.max(value, 0) >= lowest:
            uniform = tl.maximum(tl.rand(number, (row * VOCAB + token).to(tl.int32)), 1e-10)
            noisy = (value - top) / temperature - tl.log(-tl.log(uniform) + 1e-20)
            noisy = tl.where(value >= lowest, noisy, -1e30)
            here = tl.max(noisy, 0)
            if here > best:
                best = here
                chosen = start + tl.argmax(noisy, 0)
    tl.store(out + row, chosen)
