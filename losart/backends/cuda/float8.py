"""Products of many tokens' activations, rounded to 8-bit floating-point numbers, by weights held as such."""

from __future__ import annotations

from math import ceil
from typing import Any, TypeGuard

import cupy
import numpy as np

from losart.backends.cuda.float8_plans import (
    float8_plan,
    gated_float8_plan,
    multiplies_float8,
    quantize_tokens_plan,
)
from losart.backends.cuda.kernels import Kernels
from losart.backends.cuda.plans import Plan
from losart.backends.cuda.quantized import QuantizedWeight
from losart.backends.cuda.results import Matmul
from losart.kernels_cu import constants as cu
from losart.kernels_cu.tensor_map import tensor_map


class Float8Products:
    """Takes matmuls of more than `SKINNY_TOKENS` tokens: up to so many, reading the weights takes longest.

    Parameters
    ----------
    kernels : Kernels

    Attributes
    ----------
    on : bool
        Whether activations are to be rounded, and the card can multiply them.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.on = kernels.float8_activations

    def take(self, weight: Any, tokens: int) -> TypeGuard[QuantizedWeight]:
        """Whether a matmul is one of these."""
        many = self.on and tokens > cu.SKINNY_TOKENS
        return (
            many
            and isinstance(weight, QuantizedWeight)
            and multiplies_float8(self._kernels.card, weight.form)
        )

    def linear(self, x: Any, weight: QuantizedWeight, bias: Any | None) -> Matmul:
        """x [tokens, inner] times the transposed matrix."""
        plan = float8_plan(self._kernels.card, weight.form, len(x))
        planes = cupy.empty((plan.parts, len(x), weight.form.rows), np.float32)
        self._launch(plan, x, weight, planes, False)
        return Matmul(planes, bias, plan.parts)

    def gated(self, x: Any, gate_up: QuantizedWeight) -> Any | None:
        """silu(gate) * up, in the format of activations; None where a kernel of its own is faster."""
        plan = gated_float8_plan(self._kernels.card, gate_up.form, len(x))
        if plan is None:
            return None
        y = cupy.empty((len(x), gate_up.form.rows // 2), x.dtype)
        self._launch(plan, x, gate_up, y, True)
        return y

    def quantized(self, x: Any) -> tuple[Any, Any]:
        """Codes of x, uint8 [tokens, inner padded to whole units], and their scales, float32 [tokens]."""
        tokens, inner = x.shape
        padded = ceil(inner / cu.QUANTIZED_UNIT) * cu.QUANTIZED_UNIT
        codes, scales = cupy.empty((tokens, padded), np.uint8), cupy.empty(tokens, np.float32)
        self._kernels.launch_plan(quantize_tokens_plan(tokens), x, codes, scales, inner)
        return codes, scales

    def _launch(self, plan: Plan, x: Any, weight: QuantizedWeight, y: Any, gated: bool) -> None:
        codes, scales = self.quantized(x)
        of_x, of_weight = plan.boxes
        maps = (
            tensor_map(codes.data.ptr, *codes.shape, of_x, itemsize=1),
            # Steps of panels, one below the other.
            tensor_map(
                weight.view.codes,
                weight.form.code_bytes // cu.STEP_COLUMNS,
                cu.STEP_COLUMNS,
                of_weight,
                itemsize=1,
                box_bytes=cu.STEP_COLUMNS,
            ),
        )
        self._kernels.launch_plan(plan, *maps, scales, weight.view, y, len(x), plan.parts, int(gated))
