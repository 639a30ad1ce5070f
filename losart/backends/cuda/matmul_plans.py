"""How matmuls are launched: which kernel, and how its work is divided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from operator import itemgetter

from losart.backends.cuda.plans import Card, Plan
from losart.backends.cuda.quantized import QuantizedForm
from losart.kernels_cu import Defines
from losart.kernels_cu import constants as cu

TILE_WIDTHS = (256, 192, 128, 64)  # rows of a tile of linear_hopper
# Per SM of capability 9.0: bytes per clock that it gets of the L2 cache when all SMs ask (on an H100 no tile
# was seen to wait for that many) and when few do; clocks of a wgmma per row of a tile and step of columns.
L2_BYTES, MAX_L2_BYTES, CLOCKS_PER_ROW = 48, 64, 4
MEMORY_BYTES = 2000  # per clock, of all SMs
TILE_CLOCKS = 2000  # of a tile, before its first step's copies have arrived and after its last one
SPLITS = (1, 2, 3, 4, 6, 8)  # of a tile's columns
LEAST_STEPS = 8  # of a split
SILU_CLOCKS = 4000  # of a launch of silu_gate, but for what it reads and writes
MIDDLING_TOKENS = 256
MOST_SKINNY_ON_HOPPER = 32  # by single matmuls on an H200; of up to 32 tokens linear_tensor sums alike
QUANTIZED_TILES = (2, 4, 8)  # of 8 tokens, by linear_quantized
HOPPER_QUANTIZED_STAGES = 4  # of linear_quantized_hopper, each with a warp that fills it
QUANTIZED_STAGES = 3  # of linear_quantized: more would leave no room for other kernels on the SM
MIN_SHARE = 16  # units per block of linear_tensor with one block per SM: adding up planes costs time too


@lru_cache(1024)  # asked for each matmul of each layer, some of which take less time than a plan
def matmul_plan(
    card: Card, tensor: bool, tokens: int, rows: int, inner: int, splits: int | None = None
) -> Plan:
    """A matmul [tokens, inner] x [rows, inner]; `tensor`: of 16-bit values.

    With `splits` each sum is divided among so many thread blocks, in the same order for any number of tokens;
    only Hopper can do more than one. Else it is divided as is fastest.
    """
    if not tensor or inner % 8:
        grid = (ceil(rows / cu.LINEAR_ROWS), ceil(tokens / cu.LINEAR_TOKENS))
        return Plan("linear", grid, cu.LINEAR_THREADS, 0)
    if card.hopper and (splits or tokens > MOST_SKINNY_ON_HOPPER):
        plans = hopper_matmul_plans(card, tokens, rows, inner)
        return min((one for one in plans if one[1].parts == (splits or one[1].parts)), key=itemgetter(0))[1]
    if splits or tokens > cu.SKINNY_TOKENS:
        stage = (cu.TILE_TOKENS + cu.TILE_ROWS) * cu.STEP_COLUMNS * 2
        stages = min(4, card.shared_per_block // stage)
        grid = (ceil(tokens / cu.TILE_TOKENS), ceil(rows / cu.TILE_ROWS))
        return Plan("linear_tiles", grid, cu.LINEAR_TILES_THREADS, stages * stage, (("STAGES", stages),))
    tiles, steps = ceil(tokens / 8), ceil(inner / cu.STEP_COLUMNS)
    stage = (cu.PANEL_ROWS + tiles * 8) * cu.STEP_COLUMNS * 2
    units = ceil(rows / cu.PANEL_ROWS) * steps
    share, room = ceil(units / card.sms), card.shared_per_block
    # By whole passes on an H100. More would leave no room for the kernels before and after it, which overlap;
    # with fewer an SM may get two of the next matmul's blocks, for which all others then wait.
    stages = 8
    half = card.shared_per_sm // 2 - 1024
    if (tiles > 4 or not card.overlaps) and half >= 3 * stage:
        # Two blocks per SM: one computes, which takes long with many tokens, while the other waits.
        share, room, stages = max(ceil(share / 2), min(MIN_SHARE, share)), half, 12
    stages = min(stages, room // stage)
    return Plan(
        "linear_tensor",
        (ceil(units / share),),
        cu.LINEAR_TENSOR_THREADS,
        stages * stage,
        (("LINEAR_TILES", tiles), ("STAGES", stages)),
        parts=(steps - 1) // share + 2,
        share=share,
    )


@lru_cache(1024)
def quantized_plan(card: Card, form: QuantizedForm, tokens: int, same_sums: bool = False) -> Plan:
    """A matmul [tokens, inner] by a matrix of codes.

    With `same_sums` sums are divided alike for any number of tokens.
    """
    tiles = next(n for n in QUANTIZED_TILES if 8 * n >= tokens)
    panel_units = ceil(form.inner / cu.QUANTIZED_UNIT)
    units = form.padded_rows // cu.QUANTIZED_PANEL * panel_units
    share = ceil(units / card.sms)
    defines = *form.defines, ("ZEROS", int(form.zeros)), ("LINEAR_TILES", tiles)
    if card.hopper and (tiles > 2 or same_sums):  # mma is as fast for few tokens
        kernel, (threads, shared, own) = "linear_quantized_hopper", _hopper_quantized(card, form, tiles)
    else:
        kernel, (threads, shared, own) = "linear_quantized", _mma_quantized(card, form, tiles, same_sums)
    grid, parts = (ceil(units / share),), (panel_units - 1) // share + 2
    return Plan(kernel, grid, threads, shared, (*defines, *own), parts=parts, share=share)


def _hopper_quantized(card: Card, form: QuantizedForm, tiles: int) -> tuple[int, int, Defines]:
    """Threads, shared memory and constants of linear_quantized_hopper."""
    columns = cu.QUANTIZED_STAGE_BITS // form.bits
    groups = max(1, columns // form.group)
    of_row = cu.QUANTIZED_STAGE_BITS // 8 + groups * form.scale_bytes
    x = tiles * 8 * columns * 2
    stage = ceil((x + cu.QUANTIZED_PANEL * of_row) / 1024) * 1024 + cu.BARRIER_BYTES
    # Registers of few tokens' sums leave room for a thread block of the next matmul, which copies meanwhile.
    resident = 2 if tiles == 2 else 1
    room = min(card.shared_per_block, card.shared_per_sm // resident - 1024)
    stages = min(HOPPER_QUANTIZED_STAGES, room // stage)
    copy_warps = 2 if tiles == 2 and stages % 2 == 0 else stages
    own = ("COPY_WARPS", copy_warps), ("STAGES", stages), ("GROUPS", groups), ("RESIDENT", resident)
    return (cu.QUANTIZED_PANEL // 16 + copy_warps) * cu.WARP, stages * stage, own


def _mma_quantized(card: Card, form: QuantizedForm, tiles: int, same_sums: bool) -> tuple[int, int, Defines]:
    """Threads, shared memory and constants of linear_quantized."""
    # Twice as many threads have half as many registers each.
    k_groups = 2 if tiles == 2 and not same_sums else 1
    buffers = _code_buffers(card, form, tiles, k_groups)
    if buffers is None:
        buffers, k_groups = _code_buffers(card, form, tiles, 1), 1
    assert buffers is not None, "quantized_tokens says how many tokens there may be"
    stages, x_units, x_stages, shared = buffers
    own = (
        ("GROUPS", form.unit_groups),
        ("K_GROUPS", k_groups),
        ("STAGES", stages),
        ("X_UNITS", x_units),
        ("X_STAGES", x_stages),
    )
    return cu.QUANTIZED_PANEL // cu.CODE_ROWS * k_groups * cu.WARP, shared, own


def quantized_tokens(card: Card, form: QuantizedForm) -> int:
    """Tokens that `quantized_plan` takes at most."""
    if card.hopper:
        return 8 * QUANTIZED_TILES[-1]
    return 8 * max(n for n in QUANTIZED_TILES if _code_buffers(card, form, n, 1))


def _code_buffers(
    card: Card, form: QuantizedForm, tiles: int, k_groups: int
) -> tuple[int, int, int, int] | None:
    """STAGES, X_UNITS, X_STAGES and shared memory of linear_quantized; None: there is too little of it."""
    steps = cu.QUANTIZED_UNIT // cu.STEP_COLUMNS  # each of which has its scales
    of_row = max(steps, form.unit_groups) * form.scale_bytes
    unit = cu.QUANTIZED_PANEL * (form.bits * cu.QUANTIZED_UNIT // 8 + of_row)
    x = tiles * 8 * (cu.QUANTIZED_UNIT * 2 + 64)
    sums = (k_groups - 1) * tiles * 8 * cu.QUANTIZED_PANEL * 4
    for stages in range(QUANTIZED_STAGES, 1, -1):
        # All threads have as many pieces of x to copy.
        for x_units in (n for n in (4, 2, 1) if 2 * k_groups <= n * tiles <= QUANTIZED_TILES[-1]):
            x_stages = ceil((stages - 1) / x_units) + 1
            shared = stages * unit + x_stages * x_units * x + sums
            if shared <= card.shared_per_block:
                return stages, x_units, x_stages, shared
    return None


def quantized_experts_plan(card: Card, form: QuantizedForm, items: int, tiles: int) -> Plan:
    """Matmuls of some items, up to 8 * `tiles` places each, by their experts' matrices of codes."""
    resident, buffers = 2, None
    if tiles == QUANTIZED_TILES[0]:  # sums of more places take the registers of a whole SM
        half = replace(card, shared_per_block=card.shared_per_sm // 2 - 1024)
        buffers = _code_buffers(half, form, tiles, 1)
    if buffers is None:
        resident, buffers = 1, _code_buffers(card, form, tiles, 1)
    assert buffers is not None, "quantized_tokens says how many places there may be"
    *counts, shared = buffers
    names = "STAGES", "X_UNITS", "X_STAGES"
    defines = (
        *form.defines,
        ("ZEROS", int(form.zeros)),
        ("GROUPS", form.unit_groups),
        ("LINEAR_TILES", tiles),
        ("K_GROUPS", 1),
        *zip(names, counts, strict=True),
        ("RESIDENT", resident),
    )
    blocks = min(resident * card.sms, items * (form.padded_rows // cu.QUANTIZED_PANEL))
    threads = cu.QUANTIZED_PANEL // cu.CODE_ROWS * cu.WARP
    return Plan("experts_quantized", (blocks,), threads, shared, defines)


def embedding_plan(form: QuantizedForm, tokens: int) -> Plan:
    """Rows of a matrix of codes."""
    grid = (ceil(form.inner // 8 / cu.QUANTIZED_THREADS), tokens)
    return Plan("embedding_quantized", grid, cu.QUANTIZED_THREADS, 0, form.defines)


def pack_plan(form: QuantizedForm, count: int) -> Plan:
    """Packing so many rows of codes."""
    grid = (ceil(count * (form.inner // 8) / cu.QUANTIZED_THREADS),)
    return Plan("pack_quantized", grid, cu.QUANTIZED_THREADS, 0, form.defines)


def dequantize_plan(form: QuantizedForm) -> Plan:
    """All of a matrix of codes as numbers of 16 bits."""
    grid = (ceil(form.rows * (form.inner // 8) / cu.QUANTIZED_THREADS),)
    return Plan("dequantize", grid, cu.QUANTIZED_THREADS, 0, form.defines)


def quantize_plan(form: QuantizedForm, count: int) -> Plan:
    """Rounding so many rows of numbers to codes."""
    grid = (ceil(count * form.groups / (cu.QUANTIZED_THREADS // cu.WARP)),)
    return Plan("quantize", grid, cu.QUANTIZED_THREADS, 0, form.defines[:1])


def usual_splits(card: Card, rows: int, inner: int) -> int:
    """The splits that are fastest for a batch of middling size, on Hopper."""
    return matmul_plan(card, True, MIDDLING_TOKENS, rows, inner).parts


@lru_cache(1024)
def gated_matmul_plan(
    card: Card, tensor: bool, tokens: int, ffn: int, inner: int, splits: int | None = None
) -> Plan | None:
    """A matmul by joined gate and up projections that ends with silu(gate) * up.

    None where `matmul_plan` and silu_gate are faster, or have to be: sums that are split are not complete.
    """
    skinny = tokens <= MOST_SKINNY_ON_HOPPER and not splits
    if not (tensor and card.hopper) or inner % 8 or ffn % 2 or skinny or (splits or 1) > 1:
        return None
    gated = min(hopper_matmul_plans(card, tokens, 2 * ffn, inner, gated=True), key=itemgetter(0))
    if splits:
        return gated[1]
    clocks = min(one[0] for one in hopper_matmul_plans(card, tokens, 2 * ffn, inner)) + SILU_CLOCKS
    return gated[1] if gated[0] <= clocks else None


def hopper_matmul_plans(
    card: Card, tokens: int, rows: int, inner: int, gated: bool = False
) -> Iterator[tuple[float, Plan]]:
    """Ways to cut a matmul of many tokens into tiles, each with the clocks that it takes.

    `gated`: rows are gates and as many more, by which the kernel itself multiplies them.
    """
    for tiling in hopper_tilings(card, tokens, rows, ceil(inner / cu.STEP_COLUMNS), TILE_WIDTHS, gated):
        width, cluster = tiling.width, tiling.cluster
        stage = (cu.TILE_TOKENS + width) * cu.STEP_COLUMNS * 2 + cu.BARRIER_BYTES
        stages = min(8, card.shared_per_block // stage)
        defines = (("WIDTH", width), ("CLUSTER", cluster), ("STAGES", stages), ("GATED", int(gated)))
        boxes = cu.TILE_TOKENS, width // (2 if gated else cluster)
        shape = (tiling.blocks,), cu.LINEAR_HOPPER_THREADS, stages * stage, defines
        yield tiling.clocks, Plan("linear_hopper", *shape, parts=tiling.splits, boxes=boxes)


@dataclass(frozen=True)
class Tiling:
    """A way to cut a matmul into tiles of TILE_TOKENS tokens.

    Attributes
    ----------
    clocks : float
        That it takes.
    width : int
        Rows of a tile.
    cluster : int
        Thread blocks of a cluster.
    splits : int
        Of a tile's columns.
    blocks : int
        Thread blocks.
    """

    clocks: float
    width: int
    cluster: int
    splits: int
    blocks: int


def hopper_tilings(
    card: Card, tokens: int, rows: int, steps: int, widths: Sequence[int], gated: bool
) -> Iterator[Tiling]:
    """Ways to cut it, in each step of which a row has 128 bytes of columns.

    A last wave of few tiles, the speed of the L2 cache and of memory, and the planes of partial sums decide;
    all other costs are the same for each.
    """
    step_bytes = cu.STEP_COLUMNS * 2
    for cluster in (2, 1):  # of equals the one that copies less
        max_clusters = card.sms // cluster
        for width in widths if max_clusters else ():
            whole = ceil(tokens / (cu.TILE_TOKENS * cluster)) * ceil(rows / width)
            for splits in (1,) if gated else SPLITS:
                if splits > 1 and steps < splits * LEAST_STEPS:
                    continue
                tiles = whole * splits
                clusters = min(tiles, max_clusters)
                copied = (cu.TILE_TOKENS + width // cluster) * step_bytes
                speed = min(MAX_L2_BYTES, L2_BYTES * card.sms / (clusters * cluster))
                step = max(CLOCKS_PER_ROW * width, copied / speed)
                clocks = ceil(tiles / clusters) * (ceil(steps / splits) * step + TILE_CLOCKS)
                clocks = max(clocks, rows * steps * step_bytes / MEMORY_BYTES)
                # Both of writing and of reading them again.
                written = 2 * tokens * rows // 2 if gated else 4 * splits * tokens * rows
                clocks += 2 * written / (L2_BYTES * card.sms)
                yield Tiling(clocks, width, cluster, splits, clusters * cluster)
