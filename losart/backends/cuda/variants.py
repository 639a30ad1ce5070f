"""Which variants of the kernels the cards of each architecture run; needs no device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from losart.backends.cuda.expert_plans import FEW_TILES, ExpertShape, expert_plans, route_plan
from losart.backends.cuda.float8_plans import float8_plans, multiplies_float8, quantize_tokens_plan
from losart.backends.cuda.matmul_plans import (
    QUANTIZED_TILES,
    dequantize_plan,
    embedding_plan,
    hopper_matmul_plans,
    matmul_plan,
    pack_plan,
    quantize_plan,
    quantized_experts_plan,
    quantized_plan,
    quantized_tokens,
)
from losart.backends.cuda.plans import (
    Card,
    Plan,
    attention_bits,
    block_plan,
    causal_plan,
    masses_plan,
    prefix_plan,
    scores_plan,
    sparse_plan,
    split_heads_plan,
)
from losart.backends.cuda.quantized import CODES, QuantizedForm, is_compiled
from losart.config.precision import Precision
from losart.kernels_cu import Defines
from losart.kernels_cu import constants as cu

# A card of each architecture, by the maker's figures.
CARDS = {
    "sm_80": Card((8, 0), 108, 163 << 10, 164 << 10),
    "sm_86": Card((8, 6), 84, 99 << 10, 100 << 10),
    "sm_87": Card((8, 7), 16, 163 << 10, 164 << 10),
    "sm_89": Card((8, 9), 128, 99 << 10, 100 << 10),
    "sm_90a": Card((9, 0), 132, 227 << 10, 228 << 10),
    "sm_100": Card((10, 0), 148, 227 << 10, 228 << 10),
    "sm_103": Card((10, 3), 148, 227 << 10, 228 << 10),
    "sm_110": Card((11, 0), 20, 227 << 10, 228 << 10),
    "sm_120": Card((12, 0), 170, 99 << 10, 100 << 10),
    "sm_121": Card((12, 1), 48, 99 << 10, 100 << 10),
}
PLANNED = (
    "linear",
    "experts_",
    "route",
    "kv_quantize",
    "prefix_attention",
    "sparse_attention",
    "causal_attention",
    "page_scores",
    "page_masses",
    "block_attention",
    "split_heads",
    "embedding_quantized",
    "pack_quantized",
    "dequantize",
    "quantize",
)
TOKENS = (1, 4, 16, 20, 32, 33, 44, 52, 64)
HEADS = ((8, 8), (16, 8), (32, 8), (8, 1))  # and kv heads
HEAD_DIMS = (64, 80, 128)
EXPERTS = (ExpertShape(257, 9, 512, 2048), ExpertShape(8, 2, 60, 2048))  # by tensor cores, and without
FORMS = tuple(
    QuantizedForm(1024, 1024, dtype, group, zeros, wide)
    for dtype in CODES
    for group in (32, 64, 128)
    for zeros in (False, True)
    for wide in (False, True)
    if is_compiled(dtype, group, zeros, wide)
)


def plans(card: Card, precision: Precision) -> Iterator[Plan]:
    """Launches that stand for all that the card will see of a model in this precision."""
    sixteen, kv_bits = precision.weights.bits == 16, attention_bits(precision)
    for tokens, inner in itertools.product((*TOKENS, 2048), (1024, 1020)):
        yield matmul_plan(card, sixteen, tokens, 1024, inner)
    for head_dim, whole in itertools.product((128, 256), (False, True)):
        yield split_heads_plan(16, 48, head_dim, whole)
    yield route_plan(128, 16)
    for experts, many in itertools.product(EXPERTS, (False, True)):
        for tokens in (*(8 * n for n in FEW_TILES), 2048):
            of_tokens = expert_plans(card, sixteen, experts, tokens, many)
            yield from (of_tokens.gate_up, of_tokens.down)
    for heads, kv_heads in HEADS:
        for head_dim in HEAD_DIMS:
            for tokens in TOKENS:
                shape = (card, kv_bits, tokens, heads, kv_heads, head_dim)
                yield from (plan(*shape) for plan in (prefix_plan, masses_plan))
                yield from (sparse_plan(*shape, pages, 16, pages // 32) for pages in (640, 8192, 1 << 16))
                yield scores_plan(card, kv_bits, tokens * heads // kv_heads, kv_heads, head_dim)
            yield causal_plan(card, kv_bits, 2048, heads, kv_heads, head_dim)
            yield from (block_plan(card, tokens, heads, 16, False) for tokens in (16, 1024))
    if precision.kv.bits == 8:
        yield Plan("kv_quantize", (1, 1), cu.WARP_ROWS_THREADS, 0)
    for form in FORMS if sixteen else ():
        most = quantized_tokens(card, form)
        counts = [8 * n for n in QUANTIZED_TILES if 8 * n <= most]
        yield from (quantized_plan(card, form, count, same) for count in counts for same in (False, True))
        # Of an expert's two matrices the one that takes fewer places decides.
        least = min(quantized_tokens(card, other) for other in FORMS)
        tiles = {QUANTIZED_TILES[0], least // 8, most // 8}
        yield from (quantized_experts_plan(card, form, 1, count) for count in sorted(tiles))
        yield from (
            embedding_plan(form, 1),
            pack_plan(form, 1),
            dequantize_plan(form),
            quantize_plan(form, 1),
        )
    if card.hopper and sixteen:
        for gated in (False, True):
            yield from (plan for _, plan in hopper_matmul_plans(card, 2048, 4096, 4096, gated))
        yield quantize_tokens_plan(2048)
        for form in FORMS:
            if multiplies_float8(card, form):
                of_units = form, replace(form, group=form.inner)
                yield from (plan for one in of_units for _, plan in float8_plans(card, one, 2048))


def variants(name: str, card: Card, precision: Precision) -> dict[Defines, int]:
    """The compile-time constants that a kernel has on a card, and its launches' dynamic shared memory.

    Empty where a model in this precision does not launch it.
    """
    if not name.startswith(PLANNED):
        return {(): 0}
    shared: dict[Defines, int] = {}
    for plan in plans(card, precision):
        if plan.kernel == name:
            shared[plan.defines] = max(plan.shared, shared.get(plan.defines, 0))
    return shared
