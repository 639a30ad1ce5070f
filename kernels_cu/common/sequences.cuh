/* Whose rows a thread block has: of which sequence, from which row on, and that sequence's tokens (null: all). */
struct SequenceRows {
    int sequence, first_row;
    const int *tokens;

    /* tokens [sequences, count], null: all; a grid's z counts blocks of block_rows of the count * group rows. */
    __device__ __forceinline__ SequenceRows(const int *tokens, int count, int group, int block_rows)
    {
        int blocks = (count * group + block_rows - 1) / block_rows;
        sequence = blockIdx.z / blocks, first_row = blockIdx.z % blocks * block_rows;
        this->tokens = tokens ? tokens + sequence * count : nullptr;
    }
};

/* What part number `part` takes of some tiles. */
struct TileRange {
    int first, last;
};

__device__ __forceinline__ TileRange tiles_of_part(int tiles, int part, int parts)
{
    return {(int)((long long)tiles * part / parts), (int)((long long)tiles * (part + 1) / parts)};
}
