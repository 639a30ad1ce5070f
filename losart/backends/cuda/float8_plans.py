"""How products of codes of 8-bit floating-point numbers are launched: both operands are such codes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import ceil
from operator import itemgetter

from losart.backends.cuda.matmul_plans import SILU_CLOCKS, hopper_tilings
from losart.backends.cuda.plans import Card, Plan
from losart.backends.cuda.quantized import QuantizedForm
from losart.kernels_cu import constants as cu


def multiplies_float8(card: Card, form: QuantizedForm) -> bool:
    """Whether a card multiplies activations in E4M3 by a matrix of codes as they are."""
    float8 = form.dtype == "float8" and form.wide_scales
    return card.hopper and float8 and form.group % cu.QUANTIZED_UNIT == 0


@lru_cache(1024)
def float8_plan(card: Card, form: QuantizedForm, tokens: int) -> Plan:
    """A matmul [tokens, inner] by a matrix of codes that `multiplies_float8`."""
    return min(float8_plans(card, form, tokens), key=itemgetter(0))[1]


@lru_cache(1024)
def gated_float8_plan(card: Card, form: QuantizedForm, tokens: int) -> Plan | None:
    """The same by joined gate and up projections, that ends with silu(gate) * up.

    None where `float8_plan` and silu_gate are faster, or have to be.
    """
    if form.rows % (2 * cu.CODE_ROWS):
        return None
    clocks, plan = min(float8_plans(card, form, tokens, True), key=itemgetter(0))
    apart = min(one[0] for one in float8_plans(card, form, tokens)) + SILU_CLOCKS
    return plan if clocks <= apart else None


def float8_plans(
    card: Card, form: QuantizedForm, tokens: int, gated: bool = False
) -> Iterator[tuple[float, Plan]]:
    """Ways to cut it into tiles, each with the clocks that it takes.

    Tensor cores take as long for a unit's columns as for half as many of 16 bits, which are as many bytes.
    """
    units, width = ceil(form.inner / cu.QUANTIZED_UNIT), cu.FLOAT8_TILE_ROWS
    unit_scales = int(form.groups > 1)
    stage = (cu.TILE_TOKENS + width) * cu.QUANTIZED_UNIT + unit_scales * width * 4 + cu.BARRIER_BYTES
    stages = card.shared_per_block // stage
    for tiling in hopper_tilings(card, tokens, form.rows, units, (width,), gated):
        defines = ("CLUSTER", tiling.cluster), ("STAGES", stages), ("UNIT_SCALES", unit_scales)
        shape = (tiling.blocks,), cu.LINEAR_HOPPER_THREADS, stages * stage, (*form.defines, *defines)
        boxes = cu.TILE_TOKENS, cu.CODE_ROWS
        yield tiling.clocks, Plan("linear_float8_hopper", *shape, parts=tiling.splits, boxes=boxes)


def quantize_tokens_plan(tokens: int) -> Plan:
    """Rounding rows of activations to codes."""
    return Plan("quantize_tokens_hopper", (tokens,), cu.QUANTIZED_THREADS, 0)
