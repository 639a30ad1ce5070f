"""How products of E4M3 codes are cut into tiles, and who takes them; needs no device."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest

from losart.backends.cuda.float8_plans import float8_plan, float8_plans, gated_float8_plan, multiplies_float8
from losart.backends.cuda.quantized import QuantizedForm, quantized_form
from losart.backends.cuda.variants import CARDS, plans
from losart.config.precision import FORMATS, Precision
from losart.kernels_cu import constants as cu

HOPPER = CARDS["sm_90a"]
ROWS = QuantizedForm(4096, 4096, "float8", 4096, False, True)
UNITS = replace(ROWS, group=128)


@pytest.mark.parametrize(
    ("form", "taken"),
    [
        (ROWS, True),
        (UNITS, True),
        (replace(ROWS, group=256), True),
        (replace(ROWS, group=64), False),
        (replace(ROWS, wide_scales=False), False),
        (replace(ROWS, dtype="int8"), False),
    ],
)
def test_what_is_taken(form, taken):
    assert {name for name, card in CARDS.items() if multiplies_float8(card, form)} == (
        {"sm_90a"} if taken else set()
    )


@pytest.mark.parametrize("sms", [1, 2, 57, 132])
@pytest.mark.parametrize("tokens", [65, 128, 129, 512, 2048])
@pytest.mark.parametrize("rows", [1, 2048, 4096, 6144, 151936])
@pytest.mark.parametrize("form", [ROWS, UNITS], ids=["rows", "units"])
def test_no_thread_block_is_without_a_tile(form, sms, tokens, rows):
    card, form = replace(HOPPER, sms=sms), replace(form, rows=rows)
    found = [plan for _, plan in float8_plans(card, form, tokens)]
    assert float8_plan(card, form, tokens) in found
    known = {(plan.kernel, plan.defines) for plan in plans(HOPPER, Precision.of("bfloat16"))}
    for plan in found:
        cluster, stages = (dict(plan.defines)[name] for name in ("CLUSTER", "STAGES"))
        clusters, rest = divmod(*plan.grid, cluster)
        tiles = ceil(tokens / (cu.TILE_TOKENS * cluster)) * ceil(rows / cu.FLOAT8_TILE_ROWS)
        assert not rest and 1 <= clusters <= plan.parts * tiles and plan.grid[0] <= sms
        assert stages >= 4 and plan.shared <= card.shared_per_block
        assert (plan.kernel, plan.defines) in known


def test_gates_and_ups_have_whole_boxes():
    for ffn in (16, 48, 2736):
        assert gated_float8_plan(HOPPER, replace(ROWS, rows=2 * ffn), 2048) is None
    plan = gated_float8_plan(HOPPER, replace(ROWS, rows=2 * 12288), 2048)
    assert plan is not None and plan.parts == 1


@pytest.mark.parametrize("scales", ["bfloat16", "float16", "float32"])
def test_scales_are_wide_where_they_are_multiplied_so(scales):
    class Matrix:
        dtype, shape, group, scale_dtype = "float8", (512, 256), 256, scales
        in_order, uses_zeros, has_invalid_codes = True, False, False

    for wide in (False, True):
        form = quantized_form((Matrix,), FORMATS["bfloat16"], wide_float8=wide)
        assert form is not None and form.wide_scales == (wide or scales != "bfloat16")
        assert not wide or multiplies_float8(HOPPER, form)
