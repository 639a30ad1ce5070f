"""How kernels are launched: grids and compile-time constants for a shape on a card.

Nothing here needs a device, so that every variant that a card would run can be compiled without one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from losart.config.precision import KV_INT8, Precision
from losart.errors import DeviceError
from losart.kernels_cu import Defines
from losart.kernels_cu import constants as cu
from losart.kernels_cu.launch import OVERLAP_CAPABILITY

TENSOR_HEAD_DIMS = (64, 128)
CODED_ROWS = (16, 32)  # that a warpgroup may have over 8-bit codes in place of HOPPER_ROWS
# Dense prefix attention of several caches: parts in all, beside one for each, over those of one cache by
# itself. Where caches are many, they alone keep all SMs at work.
SPLITS, FEW_SPLITS, FEW = 4, 2, 16
MOST_CAUSAL_PARTS, LEAST_CAUSAL_PART = 8, 1024  # of a piece of the prompt; positions
PART_COST = 0.02  # of the time that a wave takes for the whole prefix,
PART_POSITIONS = 2  # and that of so many positions for each thread block, whose sums are written and read
MOST_BLOCKS = 65535  # in a grid's second dimension
FEW_BLOCKS, MANY_BLOCKS = 4, 8  # of block_attention per SM


@dataclass(frozen=True)
class Card:
    """What plans need to know of a device.

    Attributes
    ----------
    capability : (int, int)
    sms : int
    shared_per_block, shared_per_sm : int
        Bytes.
    """

    capability: tuple[int, int]
    sms: int
    shared_per_block: int
    shared_per_sm: int

    @classmethod
    def of(cls, device: Any) -> Card:
        """A cupy.cuda.Device's."""
        limits = device.attributes
        return cls(
            divmod(int(device.compute_capability), 10),
            limits["MultiProcessorCount"],
            limits["MaxSharedMemoryPerBlockOptin"],
            limits["MaxSharedMemoryPerMultiprocessor"],
        )

    @property
    def hopper(self) -> bool:
        """Whether it has wgmma."""
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
        Matmuls: planes of partial sums; attention over the prefix or to a piece: parts to be merged.
    share : int
        linear_tensor, linear_quantized: units per block; dense prefix attention: parts of one cache by
        itself; page scores and sparse attention: thread blocks per sequence, 0 where they are divided by
        active tokens.
    tile : int
        Dense prefix attention: positions in a tile; 0 where every cache has as many parts.
    capacity : int
        sparse attention: pages of a thread block's share of a list.
    boxes : (int, int) or ()
        linear_hopper, linear_float8_hopper: rows of x and of the weights that are copied at a time, by
        tensor maps.
    """

    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    defines: Defines = ()
    parts: int = 1
    share: int = 1
    tile: int = 0
    capacity: int = 0
    boxes: tuple[int, ...] = ()


def attention_bits(precision: Precision) -> int:
    """Bits of keys and values that tensor cores multiply, 16 or 8; 32 where they can't."""
    return 32 if precision.kv_operands.bits == 32 else precision.kv.bits


def _on_tensor_cores(kv_bits: int, head_dim: int) -> bool:
    return kv_bits < 32 and head_dim in TENSOR_HEAD_DIMS


def prefix_plan(
    card: Card,
    kv_bits: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    caches: int = 1,
    same_sums: bool = False,
) -> Plan:
    """Attention of so many tokens' queries per cache over its prefix.

    Parts of several caches are of about the same size, so that all SMs are at work however lengths differ.
    With `same_sums` a cache has as many parts as by itself.
    """
    rows = tokens * (heads // kv_heads)
    if card.hopper and _on_tensor_cores(kv_bits, head_dim):
        row_groups = 1 if rows <= cu.HOPPER_ROWS else 2
        blocks = ceil(rows / (cu.HOPPER_ROWS * row_groups))
        fitting = (count for count in CODED_ROWS if rows <= count)
        group_rows = next(fitting, cu.HOPPER_ROWS) if kv_bits == 8 else cu.HOPPER_ROWS
        parts = max(1, card.sms // (kv_heads * blocks))
        copy = cu.WARPGROUP if kv_bits == 8 else cu.WARP
        defines, shared = _hopper_defines(
            card, kv_bits, head_dim, cu.TENSOR_TILE, group_rows, row_groups, copy, 6
        )
        grid, threads = (kv_heads, parts, blocks), cu.HOPPER_COMPUTE_THREADS + copy
        plan = Plan("prefix_attention_hopper", grid, threads, shared, defines)
    else:
        plan = _split_plan(card, "prefix_attention", kv_bits, rows, kv_heads, head_dim)
    _, own, blocks = plan.grid
    own = min(own, MOST_BLOCKS // caches)
    tile = cu.TENSOR_TILE if _on_tensor_cores(kv_bits, head_dim) else cu.PLAIN_TILE
    tile = 0 if same_sums else tile
    parts = (
        own * caches if caches == 1 or not tile else caches + own * (FEW_SPLITS if caches > FEW else SPLITS)
    )
    return replace(plan, grid=(kv_heads, parts, blocks), parts=parts, share=own, tile=tile)


def split_heads_plan(tokens: int, heads: int, head_dim: int, whole: bool) -> Plan:
    """Queries, keys and values, `heads` in all, of a matmul that is `whole`, or in planes to be added up."""
    pieces = ceil(head_dim / (4 * cu.WARP))
    # As many as registers do: of a prompt's tokens each waits for memory once.
    blocks = 4 if pieces > 1 else 10 if whole else 8
    defines = (("PIECES", pieces), ("PLANE_BATCH", 1 if whole else 8), ("BLOCKS_PER_SM", blocks))
    return Plan("split_heads", (tokens, ceil(heads / cu.WARP_ROWS)), cu.WARP_ROWS_THREADS, 0, defines)


def block_plan(card: Card, tokens: int, heads: int, block_tokens: int, same_sums: bool) -> Plan:
    """Attention of so many tokens in all over their blocks."""
    grid = (tokens, ceil(heads / cu.WARP_ROWS))
    # Parts are summed in another order. On other architectures registers spill.
    many = not same_sums and card.hopper and grid[0] * grid[1] > 2 * FEW_BLOCKS * card.sms
    parts, keys, blocks = (4, 4, MANY_BLOCKS) if many else (16, 8, FEW_BLOCKS)
    defines = (("PART_BATCH", parts), ("KEY_BATCH", keys), ("BLOCKS_PER_SM", blocks))
    return Plan("block_attention", grid, cu.WARP_ROWS_THREADS, 4 * cu.WARP_ROWS * block_tokens, defines)


def sparse_plan(
    card: Card,
    kv_bits: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    pages: int,
    page_size: int,
    words: int,
    sequences: int = 1,
    same_sums: bool = False,
) -> Plan:
    """Attention of some tokens' queries of each sequence over a list of `pages` at most.

    `words` of marks are the list's own. Several lists have parts by their active tokens, so that all SMs are
    at work; with `same_sums`, and where a part cannot hold a whole list, all have as many.
    """
    shape = (card, "sparse_attention", kv_bits, tokens * (heads // kv_heads), kv_heads, head_dim)
    tile = cu.TENSOR_TILE if _on_tensor_cores(kv_bits, head_dim) else cu.PLAIN_TILE
    own = _split_plan(*shape).parts
    parts = own if same_sums else max(1, own // sequences)
    divided = 1 < sequences <= cu.MOST_SHARING and not same_sums
    while True:
        longest = pages * page_size
        capacity = ceil(ceil(ceil(longest / tile) / (1 if divided else parts)) * tile / page_size) + 1
        capacity = max(capacity, sequences) if divided else capacity
        plan = _split_plan(*shape, extra=4 * (capacity + words))
        # Shares of a long list may leave no room for two tiles, one to compute while the other is copied.
        fits = plan.shared <= card.shared_per_block - cu.SHARED_ALIGNMENT
        if fits and dict(plan.defines).get("STAGES", cu.MIN_STAGES) >= cu.MIN_STAGES:
            count = max(own, sequences) if divided else parts * sequences
            grid, share = (kv_heads, count, plan.grid[2]), 0 if divided else parts
            return replace(plan, grid=grid, parts=count, share=share, capacity=capacity)
        if divided:
            divided = False
            continue
        if parts * tile >= longest:
            raise DeviceError(f"a prefix of {32 * words} pages is too long for this GPU's shared memory")
        parts *= 2


def masses_plan(
    card: Card, kv_bits: int, tokens: int, heads: int, kv_heads: int, head_dim: int, caches: int = 1
) -> Plan:
    """Masses of pages, for some tokens' queries of each cache."""
    plan = _split_plan(card, "page_masses", kv_bits, tokens * (heads // kv_heads), kv_heads, head_dim)
    _, splits, blocks = plan.grid
    if _on_tensor_cores(kv_bits, head_dim):  # without values stages are half as large: two blocks fit an SM
        tiles = dict(plan.defines)["STAGES"] * cu.TENSOR_TILE
        splits, plan = 2 * splits, replace(plan, shared=tiles * _position_bytes(kv_bits, head_dim))
    return replace(plan, grid=(kv_heads, ceil(splits / caches), blocks * caches))


def scores_plan(
    card: Card, kv_bits: int, rows: int, kv_heads: int, head_dim: int, sequences: int = 1
) -> Plan:
    """Bounds of pages for `rows` queries per kv head of each sequence."""
    if not _on_tensor_cores(kv_bits, head_dim):
        slices = ceil(rows / cu.PLAIN_ROWS)
        count, share = divided_blocks(card, kv_heads * slices, sequences)
        shared = cu.PLAIN_ROWS * 2 * head_dim * 4
        return Plan("page_scores", (kv_heads, count, slices), cu.SCORES_THREADS, shared, share=share)
    tiles = ceil(rows / cu.SCORES_ROW_TILE) if rows <= 4 * cu.SCORES_ROW_TILE else 8
    slices = ceil(rows / (cu.SCORES_ROW_TILE * tiles))
    count, share = divided_blocks(card, kv_heads * slices, sequences)
    # A stage per warp: bases and steps, and two kinds of codes of 16 pages, with gaps of 16 bytes.
    stage = 4 * head_dim + 2 * cu.GROUP_PAGES * (head_dim // 2 + 16)
    rings, row_tiles = cu.SCORES_THREADS // cu.WARP * stage, head_dim // 16 * tiles * 512
    stages = 2 if 2 * rings + row_tiles <= card.shared_per_block else 1
    defines = (("HEAD_DIM", head_dim), ("ROW_TILES", tiles), ("STAGES", stages))
    shared = stages * rings + row_tiles
    return Plan(
        "page_scores_tensor", (kv_heads, count, slices), cu.SCORES_THREADS, shared, defines, share=share
    )


def divided_blocks(card: Card, others: int, sequences: int) -> tuple[int, int]:
    """Thread blocks of a grid's y, two per SM in all with `others` in its other dimensions.

    And how many each sequence has; 0: they are divided among the sequences by their active tokens.
    """
    blocks = max(1, 2 * card.sms // others)
    if 1 < sequences <= cu.MOST_SHARING:
        return max(sequences, blocks), 0
    each = max(1, blocks // sequences)
    return each * sequences, each


def causal_plan(
    card: Card, kv_bits: int, tokens: int, heads: int, kv_heads: int, head_dim: int, seen: int = 0
) -> Plan:
    """Block-causal attention of a piece of the prompt.

    Its last token sees `seen` positions; with 0 there is one part. The few thread blocks of a short piece
    would leave SMs idle, each busy for as long as the prefix is.
    """
    rows = tokens * (heads // kv_heads)
    if not _on_tensor_cores(kv_bits, head_dim):
        grid = (kv_heads, ceil(rows / cu.PLAIN_ROWS))
        plan = Plan("causal_attention", grid, cu.PLAIN_THREADS, _plain_shared(head_dim))
    elif card.hopper and kv_bits == 16:
        threads = cu.HOPPER_COMPUTE_THREADS + cu.WARPGROUP
        defines, shared = _hopper_defines(card, kv_bits, head_dim, 128, cu.HOPPER_ROWS, 2, cu.WARPGROUP, 3)
        grid = (ceil(rows / (2 * cu.HOPPER_ROWS)), kv_heads)
        plan = Plan("causal_attention_hopper", grid, threads, shared, defines)
    else:
        row_warps = 8
        defines, shared = _tensor_defines(card, kv_bits, head_dim, row_warps, 1)
        grid = (ceil(rows / (row_warps * cu.TENSOR_ROWS)), kv_heads)
        shared = max(shared, _sums_shared(row_warps, head_dim))
        plan = Plan("causal_attention_tensor", grid, row_warps * cu.WARP, shared, defines)
    blocks = grid[0] * grid[1]
    most = min(MOST_CAUSAL_PARTS, max(1, seen // LEAST_CAUSAL_PART))
    # By waves of thread blocks, each as long as its part of the prefix; parts are written and read again.
    cost = PART_COST + PART_POSITIONS * blocks / max(1, seen)
    parts = min(range(1, most + 1), key=lambda n: ceil(blocks * n / card.sms) / n + cost * n * (n > 1))
    return replace(plan, grid=(*grid, parts), parts=parts)


def _split_plan(
    card: Card, kernel: str, kv_bits: int, rows: int, kv_heads: int, head_dim: int, extra: int = 0
) -> Plan:
    """A kernel whose thread blocks divide keys and values among them, for all rows of a kv head.

    `extra`: bytes of shared memory after the tiles.
    """
    if not _on_tensor_cores(kv_bits, head_dim):
        parts = max(1, 2 * card.sms // kv_heads)
        grid = (kv_heads, parts, ceil(rows / cu.PLAIN_ROWS))
        return Plan(kernel, grid, cu.PLAIN_THREADS, _plain_shared(head_dim) + extra, parts=parts)
    row_warps = next((n for n in (1, 2, 4) if cu.TENSOR_ROWS * n >= rows), 8)
    key_warps = 4 if row_warps == 1 else 8 // row_warps
    blocks = ceil(rows / (cu.TENSOR_ROWS * row_warps))
    splits = max(1, card.sms // (kv_heads * blocks))
    defines, shared = _tensor_defines(card, kv_bits, head_dim, row_warps, key_warps, extra)
    sums = _sums_shared(row_warps * key_warps, head_dim)
    grid, threads = (kv_heads, splits, blocks), cu.WARP * row_warps * key_warps
    return Plan(f"{kernel}_tensor", grid, threads, max(shared + extra, sums), defines, parts=splits)


def _sums_shared(warps: int, head_dim: int) -> int:
    """Where the tiles were, each warp of a part leaves its sums, tops and totals."""
    return warps * 4 * cu.TENSOR_ROWS * (head_dim + cu.PART_PADDING + 2)


def _plain_shared(head_dim: int) -> int:
    return 4 * (cu.PLAIN_ROWS * head_dim + 2 * cu.PLAIN_TILE * (head_dim + 1))


def _position_bytes(kv_bits: int, head_dim: int) -> int:
    """Of a key or a value of one kv head."""
    return head_dim * kv_bits // 8 + (KV_INT8.scale_bytes if kv_bits == 8 else 0)


def _hopper_defines(
    card: Card,
    kv_bits: int,
    head_dim: int,
    tile: int,
    group_rows: int,
    row_groups: int,
    copy_threads: int,
    stages: int,
) -> tuple[Defines, int]:
    stage = 2 * tile * _position_bytes(kv_bits, head_dim) + cu.BARRIER_BYTES
    others = group_rows * row_groups * head_dim * 2  # queries
    if kv_bits == 8:  # each warpgroup's weights and what its warps exchange, and tiles end at a multiple
        others += 2 * (cu.HOPPER_ROWS * tile * 2 + 4 * (cu.HOPPER_ROWS + 1) * 4) + cu.SHARED_ALIGNMENT
    stages = min(stages, (card.shared_per_block - others) // stage)
    defines = (
        ("HEAD_DIM", head_dim),
        ("TILE", tile),
        ("WARPGROUP_ROWS", group_rows),
        ("ROW_GROUPS", row_groups),
        ("KEY_GROUPS", 2 // row_groups),
        ("COPY_THREADS", copy_threads),
        ("STAGES", stages),
    )
    return defines, stages * stage + others


def _tensor_defines(
    card: Card, kv_bits: int, head_dim: int, row_warps: int, key_warps: int, extra: int = 0
) -> tuple[Defines, int]:
    stage = 2 * cu.TENSOR_TILE * _position_bytes(kv_bits, head_dim)
    stages = min(5, (card.shared_per_block - cu.SHARED_ALIGNMENT - extra) // stage)
    defines = (
        ("HEAD_DIM", head_dim),
        ("ROW_WARPS", row_warps),
        ("KEY_WARPS", key_warps),
        ("STAGES", stages),
    )
    return defines, stages * stage
