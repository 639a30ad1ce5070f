/* Where piece 0 <= p < 8, of 16 bytes, of a row of STEP_COLUMNS operands lies in shared memory, so that reading has no
 * bank conflicts. */
static_assert(STEP_COLUMNS == 64, "8 threads copy a row, 16 bytes each");
#define ROW_BYTES (STEP_COLUMNS * 2)

/* Where lane 4 g + t of a warp reads piece t, or 4 + t, of row g. */
__device__ __forceinline__ int place_for_lanes(int row, int piece)
{
    return row * ROW_BYTES + (piece ^ ((row & 1) << 2 | (row & 7) >> 1)) * 16;
}

/* Where ldmatrix reads a piece of eight rows. */
__device__ __forceinline__ int place_for_matrices(int row, int piece)
{
    return row * ROW_BYTES + (piece ^ (row & 7)) * 16;
}
