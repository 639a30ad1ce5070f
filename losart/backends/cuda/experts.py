"""Mixtures of experts on the device: from router logits to the sum of what each token's experts give.

The host does not know which experts are used: grids have room for the most that there can be, and thread
blocks take their work from lists that are made on the device.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from losart.backends.base import ExpertWeights
from losart.backends.cuda.expert_plans import (
    ExpertShape,
    expert_plans,
    lists_plan,
    quantized_expert_plans,
    route_plan,
)
from losart.backends.cuda.kernels import Kernels
from losart.backends.cuda.plans import Plan
from losart.backends.cuda.quantized import QuantizedWeight
from losart.backends.cuda.results import Matmul
from losart.config.model import ExpertsConfig
from losart.errors import ConfigError
from losart.kernels_cu import constants as cu
from losart.kernels_cu.tensor_map import tensor_map
from losart.kernels_cu.views import RoutingView, WeightView


class ExpertStack:
    """A matrix [rows, inner] of each expert, all alike, in the format of weights.

    Parameters
    ----------
    values : array [experts, rows, inner]

    Attributes
    ----------
    view : WeightView
        As kernels take it: of the first expert, which the others follow.
    """

    def __init__(self, values: Any) -> None:
        self.values = values
        self.view = WeightView(values.data.ptr, *values.shape[1:])


Experts = ExpertStack | QuantizedWeight


class Routing:
    """Which experts tokens go to, and which rows experts have, in arrays for kernels to write.

    Attributes
    ----------
    experts, weights : int32, float32 [tokens, slots]
    places, items, item_count : int32
        As of RoutingView.
    """

    def __init__(self, shape: ExpertShape, tokens: int, tile: int) -> None:
        places = tokens, shape.slots
        self.experts = cupy.empty(places, np.int32)
        self.weights = cupy.empty(places, np.float32)
        self.places = cupy.empty(places, np.int32)
        self.items = cupy.empty((shape.items(tokens, tile), 3), np.int32)
        self.item_count = cupy.empty(1, np.int32)

    @property
    def view(self) -> RoutingView:
        """As kernels take it."""
        arrays = self.experts, self.weights, self.places, self.items, self.item_count
        return RoutingView(*(array.data.ptr for array in arrays), *self.experts.shape)


def check_experts(config: ExpertsConfig) -> None:
    """See that the kernels take these experts.

    Raises
    ------
    ConfigError
    """
    if config.count > cu.MOST_EXPERTS:
        raise ConfigError(f"experts must be {cu.MOST_EXPERTS} at most on CUDA, not {config.count}")


def experts(
    kernels: Kernels, x: Any, logits: Matmul, layer: ExpertWeights, prefill: bool, used: Any
) -> Matmul:
    """What `Backend.experts` gives.

    Parameters
    ----------
    kernels : Kernels
    x : array [tokens, hidden]
    logits : Matmul
        x times the router.
    layer : ExpertWeights
    prefill : bool
    used : int32 [1]
        Grows by the experts that are used, shared ones not among them.
    """
    config, gate_up, down = layer.config, layer.gate_up, layer.down
    tokens, hidden = x.shape
    count, width = config.count + config.shared, config.intermediate_size
    shape = ExpertShape(count, config.per_token + config.shared, width, hidden)
    if isinstance(gate_up, QuantizedWeight):
        plans = quantized_expert_plans(kernels.card, shape, gate_up.form, down.form, tokens)
    else:
        many = prefill if kernels.deterministic else None
        plans = expert_plans(kernels.card, kernels.tensor_matmul, shape, tokens, many)
    routing = Routing(shape, tokens, plans.tile)
    view = routing.view
    kernels.launch_plan(
        route_plan(config.count, tokens),
        *(logits.view, layer.bias, view, config.count, config.per_token, config.groups, config.kept_groups),
        *(int(config.scores == "sigmoid"), int(config.normalize), float(config.scaling)),
    )
    kernels.launch_plan(lists_plan(shape, tokens), view, config.count, plans.tile, used)
    places, bits = tokens * shape.slots, kernels.precision.activations.bits_array
    if plans.sorted:
        sorted_x = cupy.empty((places, hidden), bits)
        kernels.launch("expert_rows", (places,), cu.EXPERT_ROWS_THREADS, x, sorted_x, view, hidden)
        x = sorted_x
    gated = cupy.empty((places, shape.width), bits)
    _multiply(kernels, plans.gate_up, x, gate_up, gated, view)
    planes = cupy.empty((shape.slots, tokens, hidden), np.float32)
    _multiply(kernels, plans.down, gated, down, planes, view)
    return Matmul(planes, None, shape.slots)


def _multiply(kernels: Kernels, plan: Plan, x: Any, stack: Experts, y: Any, routing: RoutingView) -> None:
    if isinstance(stack, QuantizedWeight):
        results = (None, y) if y.dtype == np.float32 else (y, None)
        kernels.launch_plan(plan, x, stack.view, *results, routing)
        return
    if not plan.boxes:
        kernels.launch_plan(plan, x, stack.view, y, routing)
        return
    experts, rows, inner = stack.values.shape
    of_x, of_weights = plan.boxes
    of_x = min(of_x, -(-routing.tokens // 8) * 8)  # an expert has no more places than there are tokens
    maps = (
        tensor_map(x.data.ptr, *x.shape, of_x),
        tensor_map(stack.values.data.ptr, experts * rows, inner, of_weights),
    )
    kernels.launch_plan(plan, *maps, y, routing, rows, inner, of_x)
