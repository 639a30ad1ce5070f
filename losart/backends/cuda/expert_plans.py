"""How mixtures of experts are launched; needs no device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from losart.backends.cuda.matmul_plans import QUANTIZED_TILES, quantized_experts_plan, quantized_tokens
from losart.backends.cuda.plans import Card, Plan
from losart.backends.cuda.quantized import QuantizedForm
from losart.kernels_cu import Defines
from losart.kernels_cu import constants as cu

FEW_TILES = (1, 2, 4, 8)  # of 8 places, by experts_tensor
BLOCKS_PER_SM = (3, 2, 1)  # of experts_tensor: the most that leave each enough stages
LEAST_STAGES, MOST_STAGES = 3, 6
UNITS_BYTES = 12 << 10  # of its shared memory at most, for the units of a thread block
FEW_CODED = 8  # places of a mean expert, up to which experts_quantized takes fewer at a time
MANY_PLACES = 48  # of a mean expert, from which on tiles are faster, and on Hopper large ones
FEW_WIDTH, MANY_WIDTH = 128, 256  # of experts_hopper, with one and two groups of rows
FEW_HOPPER_STAGES, MOST_HOPPER_STAGES = 8, 8
FEW_LISTED, FEW_THREADS = 2048, 256  # places that expert_lists goes through with so few threads
ROUTER_PLANES = 32  # that route reads at a time


@dataclass(frozen=True)
class ExpertShape:
    """The experts of a layer, shared ones included.

    Attributes
    ----------
    experts, slots : int
        In all, and those that a token goes to.
    width, hidden : int
        Of an expert, and of what goes in and comes out.
    """

    experts: int
    slots: int
    width: int
    hidden: int

    def items(self, tokens: int, tile: int) -> int:
        """Items of work, up to `tile` places of an expert each, at most."""
        places = tokens * self.slots
        return min(self.experts, places) + places // tile


@dataclass(frozen=True)
class ExpertPlans:
    """How the experts of some tokens are launched.

    Attributes
    ----------
    gate_up, down : Plan
    tile : int
        Places of an item, at most.
    sorted : bool
        Whether the first takes rows in the order of the lists.
    """

    gate_up: Plan
    down: Plan
    tile: int
    sorted: bool = False


@lru_cache(1024)
def expert_plans(
    card: Card, tensor: bool, shape: ExpertShape, tokens: int, many: bool | None = None
) -> ExpertPlans:
    """Plans for so many tokens; `tensor`: of 16-bit values.

    With `many` all experts' rows are multiplied in tiles, however few they are, or none; else as is fastest.
    Hopper has one kernel, whose sums are the same for any number of rows.
    """
    if not tensor or shape.hidden % 8 or shape.width % 8:
        return _plans(card, shape, tokens, _linear_plan, cu.LINEAR_TOKENS)
    if card.hopper:
        groups = 1 + (tokens > cu.HOPPER_ROWS and tokens * shape.slots >= MANY_PLACES * shape.experts)
        return replace(_plans(card, shape, tokens, _hopper_plan, groups * cu.HOPPER_ROWS), sorted=True)
    if many is None:
        many = tokens * shape.slots >= MANY_PLACES * shape.experts
    if many:
        return _plans(card, shape, tokens, _tiles_plan, cu.TILE_TOKENS)
    tiles = next((n for n in FEW_TILES if 8 * n >= tokens), FEW_TILES[-1])
    return _plans(card, shape, tokens, _tensor_plan, 8 * tiles)


@lru_cache(1024)
def quantized_expert_plans(
    card: Card, shape: ExpertShape, gate_up: QuantizedForm, down: QuantizedForm, tokens: int
) -> ExpertPlans:
    """Plans for so many tokens and experts' matrices of codes; sums are the same for any number of tokens."""
    tiles = QUANTIZED_TILES[0]
    if tokens * shape.slots > FEW_CODED * shape.experts:
        tiles = min(quantized_tokens(card, form) for form in (gate_up, down)) // 8
    items = shape.items(tokens, 8 * tiles)
    first, second = (quantized_experts_plan(card, form, items, tiles) for form in (gate_up, down))
    return ExpertPlans(first, second, 8 * tiles, sorted=True)


def _plans(card: Card, shape: ExpertShape, tokens: int, plan: Callable[..., Plan], tile: int) -> ExpertPlans:
    items = shape.items(tokens, tile)
    gate_up, down = (
        plan(card, items, tile, outputs, gated)
        for outputs, gated in ((shape.width, True), (shape.hidden, False))
    )
    return ExpertPlans(gate_up, down, tile)


def _linear_plan(card: Card, items: int, tile: int, outputs: int, gated: bool) -> Plan:
    grid = (ceil(outputs / cu.LINEAR_ROWS), items)
    return Plan("experts_linear", grid, cu.LINEAR_THREADS, 0, _defines(gated))


def _tensor_plan(card: Card, items: int, tile: int, outputs: int, gated: bool) -> Plan:
    stage = (cu.EXPERT_PANEL + tile) * cu.STEP_COLUMNS * 2
    for per_sm in BLOCKS_PER_SM:
        room = min(card.shared_per_block, card.shared_per_sm // per_sm - 1024) - UNITS_BYTES
        stages = min(MOST_STAGES, room // stage)
        if stages >= LEAST_STAGES:
            break
    units = items * ceil((1 + gated) * outputs / cu.EXPERT_PANEL)
    of_unit = cu.EXPERT_UNIT_BYTES + tile * (4 if gated else 8)
    blocks = max(min(units, per_sm * card.sms), ceil(units / (UNITS_BYTES // of_unit)))
    defines, shared = _defines(gated, LINEAR_TILES=tile // 8, STAGES=stages), stages * stage
    shared += ceil(units / blocks) * of_unit
    return Plan("experts_tensor", (blocks,), cu.EXPERT_THREADS, shared, defines)


def _tiles_plan(card: Card, items: int, tile: int, outputs: int, gated: bool) -> Plan:
    stage = (cu.TILE_TOKENS + cu.TILE_ROWS) * cu.STEP_COLUMNS * 2
    stages = min(4, card.shared_per_block // stage)
    grid = (ceil((1 + gated) * outputs / cu.TILE_ROWS), items)
    defines = _defines(gated, STAGES=stages)
    return Plan("experts_tiles", grid, cu.LINEAR_TILES_THREADS, stages * stage, defines)


def _hopper_plan(card: Card, items: int, tile: int, outputs: int, gated: bool) -> Plan:
    groups = tile // cu.HOPPER_ROWS
    width, stages = (FEW_WIDTH, FEW_HOPPER_STAGES) if groups == 1 else (MANY_WIDTH, MOST_HOPPER_STAGES)
    stage = (tile + width) * cu.STEP_COLUMNS * 2 + cu.BARRIER_BYTES
    stages = min(stages, card.shared_per_block // stage)
    blocks = min(card.sms, items * ceil((1 + gated) * outputs / width))
    defines = _defines(gated, ROW_GROUPS=groups, WIDTH=width, STAGES=stages)
    threads, boxes = (groups + 1) * cu.WARPGROUP, (cu.HOPPER_ROWS, width // (1 + gated))
    return Plan("experts_hopper", (blocks,), threads, stages * stage, defines, boxes=boxes)


def _defines(gated: bool, **others: int) -> Defines:
    return *others.items(), ("GATED", int(gated))


def lists_plan(shape: ExpertShape, tokens: int) -> Plan:
    """Lists of each expert's places."""
    threads = FEW_THREADS if tokens * shape.slots <= FEW_LISTED else cu.LISTS_MAX_THREADS
    return Plan("expert_lists", (shape.experts,), threads, 4 * shape.experts)


def route_plan(experts: int, tokens: int) -> Plan:
    """The choice among so many experts that are not shared."""
    threads = ceil(experts / cu.WARP) * cu.WARP
    return Plan("route", (tokens,), threads, 3 * 4 * threads, (("PLANE_BATCH", ROUTER_PLANES),))
