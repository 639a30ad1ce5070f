/* Structs that kernels take by value. kernels_cu/views.py mirrors them; every compilation checks that sizes and offsets
 * agree. Member functions are defined in the headers of the folders that use them. */
using u64 = unsigned long long;

struct PageBounds;

/* A layer of a KV cache: addresses of chunks, and how many positions are committed, or several lengths where sequences
 * of a pass see more or less of it. Both lie in device memory, so that a captured pass sees the cache as it is when it
 * runs. cache/layout.cuh has the layout of chunks. */
struct CacheView {
    const u64 *kv_chunks, *bound_chunks;
    const int *length;
    int layer, kv_heads, head_dim, chunk_positions, page_size;

    __device__ KVValue *group(int kind, int head, int position) const;
    __device__ size_t values_after_keys() const;
    __device__ KVValue *at(int kind, int head, int position, int channel) const;
    __device__ int chunk_groups() const;
    __device__ PageBounds bounds(int head, int group, int chunk_groups) const;
    __device__ int pages(int positions) const;
    __device__ int full_groups(int positions) const;
};

/* What the host copies to the device before a pass, and the counts that the device returns. */
struct BatchView {
    const double *uniforms;      /* [sequence_tokens], in [0, 1) */
    const u64 *slot;             /* [sequences], addresses of stored results; 0: none */
    const int *length;           /* [sequences] */
    const int *masked_count;     /* uniforms and masked rows are the last sequence's */
    const int *ids, *masked;     /* [tokens], [sequence_tokens] */
    int *reads;                  /* [2], by sparse attention: positions, and tokens that read them */
    int tokens, sequence_tokens; /* rows in all, and of each sequence */
};

/* A matrix [rows, inner]. */
struct WeightView {
    const void *values;
    int rows, inner;

    __device__ __forceinline__ const WeightValue *data() const { return (const WeightValue *)values; }
};

/* The result of a matmul [tokens, rows] as partial sums, accumulated by the kernel that reads it: matmul/planes.cuh. */
struct MatmulView {
    const float *planes, *bias; /* planes [planes, tokens, rows], or null; bias [rows], or null */
    int tokens, rows, steps, share;

    __device__ int panel_planes(int panel) const;
    template <class T, int N> __device__ void at(int token, const int (&first_rows)[N], T (&sums)[N]) const;
    template <class T> __device__ T at(int token, int row) const;
};

/* Attention over the prefix in parts that are not merged yet: attention/parts.cuh. */
struct PartsView {
    float *o;             /* [parts, tokens, heads, head_dim], unnormalised */
    float *tops, *totals; /* [parts, tokens, heads]: the highest score, and the sum of weights relative to it */
    int parts, tokens;
};

/* An array in a sequence's slot. The slot's address is read from device memory, so that a captured pass belongs to no
 * sequence. The host copies it before the pass: reading it needs no wait for the previous kernel. */
struct StoredView {
    const u64 *slot;
    long long offset;

    __device__ __forceinline__ u64 address() const { return slot ? *slot : 0; }

    /* The array in the slot of this address, which is not 0; null without a slot. */
    template <class T> __device__ __forceinline__ T *at(u64 address) const
    {
        /* Relative to a pointer that the compiler knows to be global: accesses are then global ones too. */
        return slot ? (T *)((char *)slot + (address + offset - (u64)slot)) : nullptr;
    }
    template <class T> __device__ __forceinline__ T *at() const { return at<T>(address()); }
};

/* Pages that each kv head reads: marks [kv_heads, words] with one bit per page, or, where `top` has a slot, the pages
 * int32 [kv_heads, rows, count] that rows selected, -1 for none. */
struct PagesView {
    const unsigned *marks;
    StoredView top;
    int words, rows, count;
};
