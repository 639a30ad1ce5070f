/* Writes k, v [tokens, kv_heads, head_dim] of each cache, `tokens` of every `stride` rows, into it from position
 * `length` on as codes of 8 bits, each key and each value with a scale: that of the largest magnitude is the outermost
 * code. One that is not all finite becomes NaN, and shows in the logits. Where there is no cache nothing is written;
 * with `rides` only of the first *rides caches.
 *
 * Grid: (tokens, kv_heads / WARP_ROWS, caches), one warp per key and its value. Must read k and v and write their codes
 * once. */
#define LANE_CHANNELS (LARGEST_HEAD_DIM / WARP)

__device__ __forceinline__ void write_codes(const CacheView &cache, const float *x, int kind, int head, int position)
{
    int lane = threadIdx.x % WARP;
    float values[LANE_CHANNELS];
    unsigned top = 0; /* bits of the largest magnitude: those of a NaN are larger than any */
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) {
        values[i] = lane + i * WARP < cache.head_dim ? x[lane + i * WARP] : 0.0f;
        top = max(top, __float_as_uint(fabsf(values[i])));
    }
    float largest = __uint_as_float(__reduce_max_sync(~0u, top));
    float scale = largest < INFINITE ? largest / LARGEST_CODE : NOT_A_NUMBER;
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++)
        if (lane + i * WARP < cache.head_dim)
            *cache.at(kind, head, position, lane + i * WARP) = narrow<KVValue>(scale > 0 ? values[i] / scale : 0.0f);
    if (lane == 0) *cache.scale(kind, head, position) = scale;
}

extern "C" __global__ void __launch_bounds__(WARP_ROWS_THREADS)
    kv_quantize(CachesView caches, const float *k, const float *v, int stride, int sequences, const int *rides)
{
    let_next_start();
    wait_for_previous();
    int head = blockIdx.y * WARP_ROWS + threadIdx.x / WARP;
    if (head >= caches.kv_heads || (rides && blockIdx.z >= *rides)) return;
    CacheView cache = caches.of(blockIdx.z * sequences);
    if (!cache.kv_chunks) return;
    size_t from = (((size_t)blockIdx.z * stride + blockIdx.x) * cache.kv_heads + head) * cache.head_dim;
    int position = *cache.length + blockIdx.x;
    write_codes(cache, k + from, CACHED_KEYS, head, position);
    write_codes(cache, v + from, CACHED_VALUES, head, position);
}
