/* Pages of a KV cache, and what bounds their keys.
 *
 *     bounds chunk  [layers, kv_heads, pages of the chunk / 16] of PageBounds
 *
 * Bounds of the keys of a group of 16 pages, with `kind` 0 the smallest, 1 the largest: as they are, codes' rounded
 * outwards, and where a prefix fills the group as base + code * step of their channel, rounded to their format. Codes
 * of 4 bits are rounded outwards, so that these are bounds too. In a group that can't be coded all bases are NaN.
 *
 *     exact       [16 pages, 2, head_dim] of KVOperand
 *     base, step  [head_dim] of KVOperand each
 *     codes       [2, 16 pages, head_dim / 8]: channel c of 8 is in the bits from 4 * (c / 2) + 16 * (c % 2) on */
struct PageBounds {
    KVOperand *start;
    int head_dim;

    __device__ __forceinline__ KVOperand *exact(int page, int kind) const
    {
        return start + (page % GROUP_PAGES * 2 + kind) * head_dim;
    }
    __device__ __forceinline__ KVOperand *base() const { return start + 2 * GROUP_PAGES * head_dim; }
    __device__ __forceinline__ KVOperand *step() const { return base() + head_dim; }
    __device__ __forceinline__ unsigned *codes(int page, int kind) const
    {
        return (unsigned *)(step() + head_dim) + (kind * GROUP_PAGES + page % GROUP_PAGES) * (head_dim / 8);
    }
    __device__ __forceinline__ size_t values() const
    {
        return (2 * GROUP_PAGES + 2) * head_dim + GROUP_PAGES * head_dim / sizeof(KVOperand);
    }
};

__device__ __forceinline__ int code_shift(int channel) { return channel % 8 / 2 * 4 + channel % 2 * 16; }

/* base + code * step, rounded once; of float32 the product is exact. */
__device__ __forceinline__ float coded_bound(float base, float step, int code) { return base + code * step; }
__device__ __forceinline__ BFloat16 coded_bound(BFloat16 base, BFloat16 step, int code)
{
    BFloat16 value, factor = narrow<BFloat16>(code);
    asm("fma.rn.bf16 %0, %1, %2, %3;" : "=h"(value.bits) : "h"(factor.bits), "h"(step.bits), "h"(base.bits));
    return value;
}
__device__ __forceinline__ Float16 coded_bound(Float16 base, Float16 step, int code)
{
    Float16 value, factor = narrow<Float16>(code);
    asm("fma.rn.f16 %0, %1, %2, %3;" : "=h"(value.bits) : "h"(factor.bits), "h"(step.bits), "h"(base.bits));
    return value;
}

/* Groups of pages in a chunk. Kernels compute it once: it takes a division. */
__device__ __forceinline__ int CacheView::chunk_groups() const { return chunk_positions / (page_size * GROUP_PAGES); }

__device__ __forceinline__ PageBounds CacheView::bounds(int head, int group, int chunk_groups) const
{
    PageBounds bounds = {(KVOperand *)bound_chunks[group / chunk_groups], head_dim};
    bounds.start += (((size_t)layer * kv_heads + head) * chunk_groups + group % chunk_groups) * bounds.values();
    return bounds;
}

/* Pages that hold so many positions. */
__device__ __forceinline__ int CacheView::pages(int positions) const { return (positions + page_size - 1) / page_size; }

/* Groups of pages that so many positions fill. */
__device__ __forceinline__ int CacheView::full_groups(int positions) const
{
    return positions / (page_size * GROUP_PAGES);
}
