"""How mixtures of experts are divided among thread blocks; needs no device."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from losart.backends.cuda.expert_plans import ExpertShape, expert_plans, quantized_expert_plans
from losart.backends.cuda.variants import CARDS, EXPERTS, FORMS, plans
from losart.config.precision import Precision
from losart.kernels_cu import constants as cu

SHAPES = st.builds(
    ExpertShape,
    experts=st.integers(1, 300),
    slots=st.integers(1, 9),
    width=st.sampled_from([4, 64, 512, 768, 4096]),
    hidden=st.sampled_from([60, 64, 2048, 4096]),
)


@given(
    st.sampled_from(list(CARDS.values())), SHAPES, st.integers(1, 4096), st.sampled_from([None, False, True])
)
def test_there_is_room_for_all_work(card, shape, tokens, many):
    if shape.slots > shape.experts:
        return
    found = expert_plans(card, True, shape, tokens, many)
    # The most items of any routing: experts have a row more than whole items.
    places = tokens * shape.slots
    used = min(shape.experts, places)
    worst = used + (places - used) // found.tile
    assert worst <= shape.items(tokens, found.tile)
    for plan, outputs, gated in ((found.gate_up, shape.width, True), (found.down, shape.hidden, False)):
        assert plan.shared <= card.shared_per_block and all(0 < size < 1 << 31 for size in plan.grid)
        assert len(plan.grid) == 1 or plan.grid[1] >= worst
        if plan.kernel == "experts_tensor":
            defines = dict(plan.defines)
            of_unit = cu.EXPERT_UNIT_BYTES + found.tile * (4 if gated else 8)
            stages = defines["STAGES"] * (cu.EXPERT_PANEL + found.tile) * cu.STEP_COLUMNS * 2
            units = worst * ceil((1 + gated) * outputs / cu.EXPERT_PANEL)
            assert defines["STAGES"] >= cu.MIN_STAGES and defines["LINEAR_TILES"] * 8 == found.tile
            assert ceil(units / plan.grid[0]) * of_unit <= plan.shared - stages


@given(
    st.sampled_from(list(CARDS.values())),
    SHAPES,
    st.integers(1, 4096),
    st.tuples(st.sampled_from(FORMS), st.sampled_from(FORMS)),
)
def test_there_is_room_for_all_work_by_codes(card, shape, tokens, forms):
    if shape.slots > shape.experts:
        return
    gate_up = replace(forms[0], rows=2 * shape.width, inner=shape.hidden)
    down = replace(forms[1], rows=shape.hidden, inner=shape.width)
    found = quantized_expert_plans(card, shape, gate_up, down, tokens)
    assert found.sorted
    for plan in (found.gate_up, found.down):
        defines = dict(plan.defines)
        assert 0 < plan.grid[0] <= defines["RESIDENT"] * card.sms
        assert plan.shared <= card.shared_per_block
        assert defines["RESIDENT"] * (plan.shared + 1024) <= card.shared_per_sm
        assert defines["LINEAR_TILES"] * 8 == found.tile
        assert (defines["X_STAGES"] - 1) * defines["X_UNITS"] >= defines["STAGES"] - 1 >= 1
        assert defines["LINEAR_TILES"] * 8 * cu.QUANTIZED_UNIT // 8 % plan.threads == 0


@pytest.mark.parametrize("architecture", CARDS)
def test_variants_by_codes_are_those_of_any_model(architecture):
    card, shape = CARDS[architecture], ExpertShape(128, 8, 768, 2048)
    known = {(plan.kernel, plan.defines) for plan in plans(card, Precision.of("bfloat16"))}
    for gate_up, down in product(FORMS, FORMS):
        for tokens in (1, 100, 1024):
            found = quantized_expert_plans(card, shape, gate_up, down, tokens)
            assert {(plan.kernel, plan.defines) for plan in (found.gate_up, found.down)} <= known


@pytest.mark.parametrize("architecture", CARDS)
def test_variants_are_those_of_any_model(architecture):
    """Compile-time constants depend on the card and on how many rows an expert may have, not on the model."""
    card = CARDS[architecture]
    known = {(plan.kernel, plan.defines) for plan in plans(card, Precision.of("bfloat16"))}
    for shape in (*EXPERTS, ExpertShape(128, 8, 768, 2048), ExpertShape(64, 6, 1408, 2048)):
        for tokens in (1, 4, 16, 33, 64, 100, 512, 1024, 4096):
            for many in (None, False, True):
                found = expert_plans(card, True, shape, tokens, many)
                for plan in (found.gate_up, found.down):
                    assert (plan.kernel, plan.defines) in known
