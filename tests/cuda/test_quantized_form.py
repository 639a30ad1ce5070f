"""Which matrices of codes stay so on a GPU; needs no device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from losart.backends.cuda.matmul_plans import QUANTIZED_TILES, quantized_plan, quantized_tokens
from losart.backends.cuda.quantized import CODES, quantized_form
from losart.backends.cuda.variants import CARDS, FORMS
from losart.config.precision import FORMATS, QUANTIZED


@dataclass(frozen=True)
class Matrix:
    """What of a checkpoint's matrix decides."""

    dtype: str = "int4"
    shape: tuple[int, int] = (512, 256)
    group: int = 64
    scale_dtype: str = "bfloat16"
    in_order: bool = True
    zero: int | None = None
    has_invalid_codes: bool = False
    whole_zeros: bool = True

    @property
    def uses_zeros(self) -> bool:
        return bool(self.zero)


INT4 = Matrix()


@pytest.mark.parametrize(
    ("matrices", "group", "zeros", "wide"),
    [
        ((INT4,), 64, False, False),
        ((INT4, replace(INT4, shape=(8, 256))), 64, False, False),
        ((replace(INT4, group=32),), 32, False, False),
        ((replace(INT4, group=128, scale_dtype="float32"),), 128, False, True),
        ((replace(INT4, group=256),), 256, False, False),
        ((replace(INT4, shape=(8, 200), group=500),), 256, False, False),
        ((replace(INT4, zero=0),), 64, False, False),
        ((replace(INT4, zero=3), INT4), 64, True, False),
        ((replace(INT4, whole_zeros=False),), 64, False, False),
        ((Matrix("int8", group=256, scale_dtype="float16"),), 256, False, True),
        ((Matrix("float8", group=256),), 256, False, False),
    ],
)
def test_what_stays(matrices, group, zeros, wide):
    form = quantized_form(matrices, FORMATS["bfloat16"])
    assert form is not None
    assert (form.group, form.zeros, form.wide_scales) == (group, zeros, wide)
    assert (form.rows, form.inner) == (sum(one.shape[0] for one in matrices), matrices[0].shape[1])
    assert quantized_form(matrices, FORMATS["float32"]) is None


@pytest.mark.parametrize(
    "matrices",
    [
        (Matrix("bfloat16"),),
        (INT4, Matrix("bfloat16")),
        (INT4, replace(INT4, group=128)),
        (replace(INT4, in_order=False),),
        (replace(INT4, shape=(8, 260)),),
        (replace(INT4, group=48),),
        (replace(INT4, group=192, shape=(8, 384)),),
        (replace(INT4, group=32, scale_dtype="float16"),),
        (replace(INT4, zero=1, scale_dtype="float16"),),
        (replace(INT4, zero=1, shape=(8, 192)),),
        (replace(INT4, zero=1, whole_zeros=False),),
        (Matrix("int8", group=32),),
        (Matrix("float8", group=256, has_invalid_codes=True),),
    ],
)
def test_what_does_not(matrices):
    assert quantized_form(matrices, FORMATS["bfloat16"]) is None


def test_codes_are_those_that_info_says():
    assert tuple(CODES) == QUANTIZED["cuda"]


def test_codes_that_are_not_read_count_as_valid():
    matrix = Matrix("float8", group=256, has_invalid_codes=True)
    assert quantized_form((matrix,), FORMATS["bfloat16"], valid=True) is not None


@pytest.mark.parametrize("architecture", CARDS)
@pytest.mark.parametrize("same_sums", [False, True])
def test_plans_are_what_the_kernels_take(architecture, same_sums):
    card = CARDS[architecture]
    for form in FORMS:
        for tokens in (8 * n for n in QUANTIZED_TILES if 8 * n <= quantized_tokens(card, form)):
            plan = quantized_plan(card, form, tokens, same_sums)
            assert plan.shared <= card.shared_per_block and plan.grid[0] <= card.sms
            defines = dict(plan.defines)
            if plan.kernel == "linear_quantized_hopper":
                assert plan.shared * defines["RESIDENT"] <= card.shared_per_sm
                assert 1 < defines["COPY_WARPS"] <= defines["STAGES"]
            else:
                assert defines["X_UNITS"] * defines["LINEAR_TILES"] * 8 * 16 % plan.threads == 0
                assert (defines["X_STAGES"] - 1) * defines["X_UNITS"] >= defines["STAGES"] - 1 >= 1
