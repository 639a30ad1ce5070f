/* Layout of a KV cache's chunks of keys and values; those of bounds: cache/pages.cuh.
 *
 *     kv chunk  [layers, 2 (keys, values), kv_heads, chunk_positions / 8, group of 8 positions] of KVValue
 *
 * A group is [8 positions][head_dim]. With 16-bit values and head_dim a multiple of 64 it is [head_dim / 64][8
 * positions][64 channels], and the 16-byte pieces of its 128-byte rows are swizzled: piece p of position r is at p ^ r.
 * That is the layout that tensor cores read from shared memory without bank conflicts, so that plain copies bring pages
 * there.
 *
 * Codes of 8 bits are followed by the 8 positions' scales, float32; integers are held from 0 on for -128. With head_dim
 * a multiple of 64 they lie as the lanes of a warp have them, of which lane 4 g + t has, of keys, channels 16 t to 16 t
 * + 15 of position g: [head_dim / 64][lanes][16]; and of values each 8th channel from g on of positions 2t and 2t + 1:
 * [head_dim / 32][lanes][4 channels][2]. Of four codes the second and the third change places, since they are unpacked
 * two at a time (common/codes.cuh). */
enum { CACHED_KEYS, CACHED_VALUES };
#define IS_CODED (LOSART_KV == KV_INT8 || LOSART_KV == KV_FP8)
#define LARGEST_CODE (LOSART_KV == KV_INT8 ? 127.0f : LARGEST_FLOAT8)

/* Values that a position takes, the scale among them. */
__device__ __forceinline__ constexpr int position_values(int head_dim)
{
    return head_dim + (IS_CODED ? sizeof(float) : 0);
}

__device__ __forceinline__ float widen(Code x)
{
    return LOSART_KV == KV_INT8 ? (float)(x.bits - 128) : float8_value(x.bits);
}

/* The nearest code, ties to even. */
template <> __device__ __forceinline__ Code narrow<Code>(float x)
{
    int bits = LOSART_KV == KV_INT8 ? (int)rintf(fminf(fmaxf(x, -127.0f), 127.0f)) + 128 : nearest_float8(x);
    return {(unsigned char)bits};
}

/* The group of 8 positions that begins at `position`; the groups after it in the chunk follow. */
__device__ __forceinline__ KVValue *CacheView::group(int kind, int head, int position) const
{
    size_t rows = ((size_t)(layer * 2 + kind) * kv_heads + head) * chunk_positions + position % chunk_positions;
    return (KVValue *)kv_chunks[position / chunk_positions] + rows / 8 * 8 * position_values(head_dim);
}

/* From a position's keys to its values. */
__device__ __forceinline__ size_t CacheView::values_after_keys() const
{
    return (size_t)kv_heads * chunk_positions * position_values(head_dim);
}

__device__ __forceinline__ KVValue *CacheView::at(int kind, int head, int position, int channel) const
{
    int row = position % 8, index = row * head_dim + channel;
    if (sizeof(KVOperand) == 2 && head_dim % 64 == 0) {
        int c = channel % 64;
        index = channel / 64 * 512;
        if (!IS_CODED)
            index += row * 64 + ((c / 8) ^ row) * 8 + c % 8;
        else if (kind == CACHED_KEYS)
            index += row * 64 + c / 4 * 4 + c % 4 / 2 + c % 2 * 2;
        else
            index += c / 32 * 256 + (c % 8 * 4 + row / 2) * 8 + c / 16 % 2 * 4 + c / 8 % 2 + row % 2 * 2;
    }
    return group(kind, head, position) + index;
}

/* Of codes. */
__device__ __forceinline__ float *CacheView::scale(int kind, int head, int position) const
{
    return (float *)(group(kind, head, position) + 8 * head_dim) + position % 8;
}

__device__ __forceinline__ float CacheView::value(int kind, int head, int position, int channel) const
{
    float value = widen(*at(kind, head, position, channel));
    return IS_CODED ? value * *scale(kind, head, position) : value;
}
