"""Numbers that the CUDA sources and the Python that launches them agree on.

`define_lines` turns each into a macro of the same name, in front of every source.
"""

from __future__ import annotations

from losart.config import precision
from losart.config.precision import FORMATS, KV_FORMATS

WARP = 32
WARPGROUP = 128  # threads; capability 9.0
SHARED_ALIGNMENT = 1024  # of dynamic shared memory, and the most static shared memory before it
BARRIER_BYTES = 16  # per stage: a full and an empty barrier
MIN_STAGES = 2  # one is computed while the next one is copied
LARGEST_HEAD_DIM = 256
WARP_ROWS_THREADS = 128  # split_heads, merge_parts and block_attention: one warp per row ...
WARP_ROWS = 4  # ... which is a head of a token

# cache/
GROUP_PAGES = precision.GROUP_PAGES  # their bounds share a base and a step per channel
CACHE_WRITE_THREADS = 1024  # at most

# matmul/
PANEL_ROWS = 128  # rows of weights that linear_tensor accumulates at a time
STEP_COLUMNS = 64  # columns of x and weights that linear_{tensor,tiles,hopper} copy at a time
INT4, INT8, FLOAT8 = range(3)  # what matrices of codes have
CODE_ROWS = 32  # of a tile of codes
QUANTIZED_PANEL, QUANTIZED_UNIT = 256, 128  # rows and columns that linear_quantized takes at a time
QUANTIZED_STAGE_BITS = 512  # of a row's codes that linear_quantized_hopper copies at a time
QUANTIZED_THREADS = 256
SKINNY_TOKENS = 64  # linear_tensor takes no more
LINEAR_TOKENS = 16  # per thread block
LINEAR_ROWS = 8
LINEAR_THREADS = 256
LINEAR_TENSOR_THREADS = 256
LINEAR_TILES_THREADS = 256
LINEAR_HOPPER_THREADS = 384
TILE_TOKENS = 128  # of a tile of linear_tiles and linear_hopper
TILE_ROWS = 128  # of a tile of linear_tiles
FLOAT8_TILE_ROWS = 192  # of linear_float8_hopper, whose sums and those of a unit take 192 registers
EMBEDDING_THREADS = 256  # one channel each
SILU_THREADS = 128  # four channels each

# experts/
MOST_EXPERTS = 1024  # of a layer: route has a thread for each
LISTS_MAX_THREADS = 1024
EXPERT_ROWS_THREADS = 256
EXPERT_PANEL = 64  # rows of weights that experts_tensor takes at a time
EXPERT_THREADS = 128
EXPERT_UNIT_BYTES = 16  # of shared memory, for a unit of experts_tensor, beside those for its places

# norm/
NORM_MAX_THREADS = 1024
ROTATION_THREADS = 64
NORM_CHANNEL_BYTES = 8  # of dynamic shared memory

# attention/
PLAIN_THREADS = 256
PLAIN_ROWS = 16  # query rows per thread block, also of page_scores
PLAIN_TILE = 32  # positions
TENSOR_TILE = 64  # positions
TENSOR_ROWS = 16  # query rows per warp
HOPPER_ROWS = 64  # query rows per warpgroup
HOPPER_COMPUTE_THREADS = 256
PART_PADDING = 8  # floats after each row of unmerged sums, against bank conflicts

# selection/
MASS_UNIT = 16  # positions that share one mass
SCORES_THREADS = 256
SCORES_ROW_TILE = 8  # rows in one tile of page_scores_tensor
TOP_PAGES_THREADS = 512
QUERY_CHANGE_THREADS = 256
MOST_SHARING = 128  # sequences among which share_of_block divides thread blocks

# sampling/
GATHER_THREADS = 256
SLICE_THREADS = 256
SAMPLE_THREADS = 1024
LOGIT_ROW_BYTES = 32  # of a Row


def define_lines() -> str:
    """These constants and the codes of formats (FLOAT32 and so on) as `#define` lines."""
    constants = {name: value for name, value in globals().items() if isinstance(value, int)}
    codes = {format.name.upper(): format.code for format in FORMATS.values()}
    codes |= {f"KV_{format.name.upper()}": format.code for format in KV_FORMATS.values()}
    return "".join(f"#define {name} {value}\n" for name, value in (constants | codes).items())
