"""How kernels are launched: grids and compile-time constants for a shape on a card.

Nothing here needs a device, so that every variant that a card would run can be compiled without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from losart.errors import DeviceError
from losart.kernels_cu import Defines
from losart.kernels_cu.launch import OVERLAP_CAPABILITY

SKINNY_TOKENS = 64  # linear_tensor.cu takes products of no more tokens
PANEL = 128  # product.cuh
COLUMNS = 64  # of weights that linear*.cu take at a time
TILE_TOKENS = 128  # linear_tiles.cu, linear_hopper.cu
TILE_WIDTHS = (256, 192, 128, 64)  # rows of a tile; linear_hopper.cu
# Of a processor of capability 9.0: bytes that it gets of the L2 cache in a clock when all ask (on an H100 no
# tile was seen to wait for so many) and when few do; clocks of a wgmma for a row of a tile and a step of
# 64 columns.
L2_BYTES, MOST_L2_BYTES, CLOCKS_PER_ROW = 48, 64, 4
LEAST_SHARE = 16  # linear_tensor.cu: units of a block, where each processor gets one, for sums cost too
TENSOR_HEAD_DIMS = (64, 128)
PLAIN_ROWS, PLAIN_TILE = 16, 32  # attention.cuh
TENSOR_TILE = 64  # tensor_attention.cuh
LEAST_STAGES = 2  # tensor_attention.cuh
FIXED_SHARED = 1024  # at most, of kernels whose dynamic shared memory is aligned to as much
BARRIER_BYTES = 16  # of a stage; hopper_attention.cuh, linear_hopper.cu


@dataclass(frozen=True)
class Card:
    """What plans need to know of a device.

    Attributes
    ----------
    capability : (int, int)
    processors : int
    shared_per_block, shared_per_processor : int
        Bytes.
    """

    capability: tuple[int, int]
    processors: int
    shared_per_block: int
    shared_per_processor: int

    @property
    def hopper(self) -> bool:
        """Whether it has a warpgroup's products."""
        return self.capability == (9, 0)

    @property
    def overlaps(self) -> bool:
        """Whether a kernel may start while the one before it still runs."""
        return self.capability >= OVERLAP_CAPABILITY


@dataclass(frozen=True)
class Plan:
    """One kernel's launch, but for its arguments.

    Attributes
    ----------
    parts : int
        linear_tensor: planes of partial sums; prefix attention: parts to be merged.
    share : int
        linear_tensor: units of a block.
    capacity : int
        sparse attention: pages of a thread block's share of a list.
    boxes : (int, int) or ()
        linear_hopper: rows of x and of the weights that are copied at a time, by tensor maps.
    """

    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    defines: Defines = ()
    parts: int = 1
    share: int = 1
    capacity: int = 0
    boxes: tuple[int, ...] = ()


@lru_cache(1024)  # it is asked for each product of each layer, which may take less time than a plan
def product_plan(card: Card, tensor: bool, tokens: int, rows: int, inner: int) -> Plan:
    """A matrix product [tokens, inner] x [rows, inner]; `tensor`: of 16-bit values."""
    if not tensor or inner % 8:
        return Plan("linear", (ceil(rows / 8), ceil(tokens / 16)), 256, 0)
    if tokens > SKINNY_TOKENS and card.hopper:
        return min(hopper_product_plans(card, tokens, rows), key=lambda found: found[0])[1]
    if tokens > SKINNY_TOKENS:
        stage = 2 * TILE_TOKENS * COLUMNS * 2
        stages = min(4, card.shared_per_block // stage)
        grid = (ceil(tokens / TILE_TOKENS), ceil(rows / 128))
        return Plan("linear_tiles", grid, 256, stages * stage, (("STAGES", stages),))
    tiles, steps = ceil(tokens / 8), ceil(inner / COLUMNS)
    stage = (PANEL + tiles * 8) * COLUMNS * 2
    units = ceil(rows / PANEL) * steps
    share, room = ceil(units / card.processors), card.shared_per_block
    # By whole passes on an H100. More would leave no room for the kernels before and after it, which overlap;
    # with fewer a processor may get two of the next product's blocks, for which all others then wait.
    stages = 8
    half = card.shared_per_processor // 2 - 1024
    if (tiles > 4 or not card.overlaps) and half >= 3 * stage:
        # Two blocks a processor: one computes, which takes long with many tokens, while the other waits.
        share, room, stages = max(ceil(share / 2), min(LEAST_SHARE, share)), half, 12
    stages = min(stages, room // stage)
    return Plan(
        "linear_tensor",
        (ceil(units / share),),
        256,
        stages * stage,
        (("LINEAR_TILES", tiles), ("STAGES", stages)),
        parts=(steps - 1) // share + 2,
        share=share,
    )


def hopper_product_plans(card: Card, tokens: int, rows: int) -> Iterator[tuple[float, Plan]]:
    """Ways to cut a product of many tokens into tiles, each with the clocks that a step of all of them takes.

    A last wave of few tiles and the L2 cache's speed decide; what else there is to do is the same for all.
    """
    for cluster in (2, 1):  # of equals the one that copies less
        most = card.processors // cluster
        for width in TILE_WIDTHS if most else ():
            tiles = ceil(tokens / (TILE_TOKENS * cluster)) * ceil(rows / width)
            clusters = min(tiles, most)
            copied = (TILE_TOKENS + width // cluster) * COLUMNS * 2
            speed = min(MOST_L2_BYTES, L2_BYTES * card.processors / (clusters * cluster))
            clocks = ceil(tiles / clusters) * max(CLOCKS_PER_ROW * width, copied / speed)
            stage = (TILE_TOKENS + width) * COLUMNS * 2 + BARRIER_BYTES
            stages = min(8, card.shared_per_block // stage)
            defines = (("WIDTH", width), ("CLUSTER", cluster), ("STAGES", stages))
            grid, boxes = (clusters * cluster,), (TILE_TOKENS, width // cluster)
            yield clocks, Plan("linear_hopper", grid, 3 * 128, stages * stage, defines, boxes=boxes)


def prefix_plan(card: Card, tensor: bool, tokens: int, heads: int, kv_heads: int, head_dim: int) -> Plan:
    """Attention of a block's queries over the prefix."""
    rows = tokens * (heads // kv_heads)
    if card.hopper and tensor and head_dim in TENSOR_HEAD_DIMS:
        row_groups = 1 if rows <= 64 else 2
        blocks = ceil(rows / (64 * row_groups))
        splits = max(1, card.processors // (kv_heads * blocks))
        defines, shared = _hopper_defines(card, head_dim, 64, row_groups, 32, 6)
        grid = (kv_heads, splits, blocks)
        return Plan("prefix_attention_hopper", grid, 256 + 32, shared, defines, parts=splits)
    return _split_plan(card, "prefix_attention", tensor, rows, kv_heads, head_dim)


def sparse_plan(
    card: Card,
    tensor: bool,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    pages: int,
    page_size: int,
    words: int,
) -> Plan:
    """Attention of some tokens' queries over a list of `pages` at most; `words` of marks of its own."""
    shape = (card, "sparse_attention", tensor, tokens * (heads // kv_heads), kv_heads, head_dim)
    tile = TENSOR_TILE if tensor and head_dim in TENSOR_HEAD_DIMS else PLAIN_TILE
    plan = _split_plan(*shape)
    parts = plan.parts
    while True:
        capacity = ceil(ceil(ceil(pages * page_size / tile) / parts) * tile / page_size) + 1
        plan = _split_plan(*shape, extra=4 * (capacity + words))
        # Shares of a long list may leave no room for two tiles, one to read while the other comes.
        fits = plan.shared <= card.shared_per_block - FIXED_SHARED
        if fits and dict(plan.defines).get("STAGES", LEAST_STAGES) >= LEAST_STAGES:
            return replace(plan, grid=(kv_heads, parts, plan.grid[2]), parts=parts, capacity=capacity)
        if parts * tile >= pages * page_size:
            raise DeviceError(f"a prefix of {32 * words} pages is too long for this GPU's shared memory")
        parts *= 2


def masses_plan(card: Card, tensor: bool, tokens: int, heads: int, kv_heads: int, head_dim: int) -> Plan:
    """Masses of pages."""
    return _split_plan(card, "page_masses", tensor, tokens * (heads // kv_heads), kv_heads, head_dim)


def _split_plan(
    card: Card, kernel: str, tensor: bool, rows: int, kv_heads: int, head_dim: int, extra: int = 0
) -> Plan:
    """A kernel whose thread blocks share keys and values out among them, for all rows of a kv head.

    `extra`: bytes of shared memory after the tiles.
    """
    if not tensor or head_dim not in TENSOR_HEAD_DIMS:
        parts = max(1, 2 * card.processors // kv_heads)
        grid = (kv_heads, parts, ceil(rows / PLAIN_ROWS))
        return Plan(kernel, grid, 256, _plain_shared(head_dim) + extra, parts=parts)
    row_warps = next((n for n in (1, 2, 4) if 16 * n >= rows), 8)
    key_warps = 4 if row_warps == 1 else 8 // row_warps
    blocks = ceil(rows / (16 * row_warps))
    splits = max(1, card.processors // (kv_heads * blocks))
    defines, shared = _tensor_defines(card, head_dim, row_warps, key_warps, extra)
    # Where the tiles were, each warp leaves its sums.
    shared = max(shared + extra, row_warps * key_warps * 4 * (16 * (head_dim + 8) + 32))
    grid, threads = (kv_heads, splits, blocks), 32 * row_warps * key_warps
    return Plan(f"{kernel}_tensor", grid, threads, shared, defines, parts=splits)


def scores_plan(card: Card, tensor: bool, rows: int, kv_heads: int, head_dim: int) -> Plan:
    """Bounds of pages for `rows` queries a kv head."""
    blocks = 2 * card.processors
    if not tensor or head_dim not in TENSOR_HEAD_DIMS:
        grid = (kv_heads, max(1, blocks // kv_heads), ceil(rows / PLAIN_ROWS))
        return Plan("page_scores", grid, 256, PLAIN_ROWS * 2 * head_dim * 4)
    tiles = ceil(rows / 8) if rows <= 32 else 8
    slices = ceil(rows / (8 * tiles))
    grid = (kv_heads, max(1, blocks // (kv_heads * slices)), slices)
    defines = (("HEAD_DIM", head_dim), ("ROW_TILES", tiles))
    return Plan("page_scores_tensor", grid, 256, head_dim // 16 * 2 * tiles * 512, defines)


def top_pages_plan(kernel: str, rows: int, kv_heads: int, pages: int) -> Plan:
    """The top pages of `rows` rows a kv head, of `pages` at most."""
    return Plan(kernel, (rows, kv_heads), 512, 0, (("KEYS", min(16, ceil(pages / 512))),))


def causal_plan(card: Card, tensor: bool, tokens: int, heads: int, kv_heads: int, head_dim: int) -> Plan:
    """Block-causal attention of a piece of the prompt."""
    rows = tokens * (heads // kv_heads)
    if not tensor or head_dim not in TENSOR_HEAD_DIMS:
        return Plan("causal_attention", (kv_heads, ceil(rows / PLAIN_ROWS)), 256, _plain_shared(head_dim))
    grid = (ceil(rows / 128), kv_heads)
    if card.hopper:
        defines, shared = _hopper_defines(card, head_dim, 128, 2, 128, 3)
        return Plan("causal_attention_hopper", grid, 256 + 128, shared, defines)
    defines, shared = _tensor_defines(card, head_dim, 8, 1)
    return Plan("causal_attention_tensor", grid, 256, shared, defines)


def _plain_shared(head_dim: int) -> int:
    return 4 * (PLAIN_ROWS * head_dim + 2 * 32 * (head_dim + 1))


def _hopper_defines(
    card: Card, head_dim: int, tile: int, row_groups: int, copy_threads: int, stages: int
) -> tuple[Defines, int]:
    stage = 2 * tile * head_dim * 2 + BARRIER_BYTES
    queries = 64 * row_groups * head_dim * 2
    stages = min(stages, (card.shared_per_block - queries) // stage)
    defines = (
        ("HEAD_DIM", head_dim),
        ("TILE", tile),
        ("ROW_GROUPS", row_groups),
        ("KEY_GROUPS", 2 // row_groups),
        ("COPY_THREADS", copy_threads),
        ("STAGES", stages),
    )
    return defines, stages * stage + queries


def _tensor_defines(
    card: Card, head_dim: int, row_warps: int, key_warps: int, extra: int = 0
) -> tuple[Defines, int]:
    stage = 2 * TENSOR_TILE * head_dim * 2
    stages = min(5, (card.shared_per_block - FIXED_SHARED - extra) // stage)
    defines = (
        ("HEAD_DIM", head_dim),
        ("ROW_WARPS", row_warps),
        ("KEY_WARPS", key_warps),
        ("STAGES", stages),
    )
    return defines, stages * stage
