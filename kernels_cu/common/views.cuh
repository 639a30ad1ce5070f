/* Structs that kernels take by value. kernels_cu/views.py mirrors them; every compilation checks that sizes and offsets
 * agree. Member functions are defined in the headers of the folders that use them. */
using u64 = unsigned long long;

struct PageBounds;
struct ExpertItem;

/* A layer of one KV cache: addresses of chunks, and how many positions are committed, or several lengths where
 * sequences of a pass see more or less of it. All lie in device memory, so that a captured pass sees the cache as it is
 * when it runs. cache/layout.cuh and cache/pages.cuh have the layout of chunks. */
struct CacheView {
    const u64 *kv_chunks, *bound_chunks;
    const int *length;
    int layer, kv_heads, head_dim, chunk_positions, page_size;

    __device__ KVValue *group(int kind, int head, int position) const;
    __device__ size_t values_after_keys() const;
    __device__ KVValue *at(int kind, int head, int position, int channel) const;
    __device__ float *scale(int kind, int head, int position) const;
    __device__ float value(int kind, int head, int position, int channel) const;
    __device__ int chunk_groups() const;
    __device__ PageBounds bounds(int head, int group, int chunk_groups) const;
    __device__ int pages(int positions) const;
    __device__ int full_groups(int positions) const;
};

/* A layer of the caches of a pass's sequences. */
struct CachesView {
    const u64 *tables;  /* [sequences], of page tables: addresses of chunks, of bounds `max_chunks` after those of keys
                         * and values; 0: there is no cache */
    const u64 *table;   /* of one cache, which the host has copied here; then `tables` is null */
    const int *lengths; /* [sequences] */
    int layer, kv_heads, head_dim, chunk_positions, page_size, max_chunks;

    __device__ __forceinline__ CacheView of(int sequence) const
    {
        const u64 *chunks = tables ? (const u64 *)tables[sequence] : table;
        return {chunks, chunks + max_chunks, lengths + sequence, layer, kv_heads, head_dim, chunk_positions, page_size};
    }
};

/* What the host copies to the device before a pass. Rows that propose tokens are numbered together, of all
 * sequences. */
struct BatchView {
    const double *uniforms, *top_p; /* [proposed], uniforms in [0, 1) */
    const int *ids, *positions;     /* [tokens] */
    const float *rotations;         /* [tokens, 2, rotated / 2]: norm/rotations.cu */
    const int *proposed_count;
    const int *proposed, *logits;  /* [proposed], their rows among all, and of the logits */
    const int *mask_token, *top_k; /* [proposed] */
    const float *temperature;      /* [proposed] */
};

/* A matrix [rows, inner]. */
struct WeightView {
    const void *values;
    int rows, inner;

    __device__ __forceinline__ const WeightValue *data() const { return (const WeightValue *)values; }
};

/* A matrix [rows, inner] of codes, with `groups` scales for each row, one for `group` columns: matmul/quantized.cuh.
 */
struct QuantizedView {
    void *codes, *scales, *zeros; /* zeros null where all are 0 */
    int rows, inner, group, groups;
};

/* The result of a matmul [tokens, rows] as partial sums, accumulated by the kernel that reads it: matmul/planes.cuh. */
struct MatmulView {
    const float *planes, *bias; /* planes [planes, tokens, rows], or null; bias [rows], or null */
    int tokens, rows, panel_rows, steps, share;

    __device__ int panel_planes(int panel) const;
    template <class T, int N> __device__ void at(int token, const int (&first_rows)[N], T (&sums)[N]) const;
    template <class T> __device__ T at(int token, int row) const;
};

/* Attention over the prefix in parts that are not merged yet: attention/parts.cuh. */
struct PartsView {
    float *o;             /* [parts, tokens, heads, head_dim], unnormalised */
    float *tops, *totals; /* [parts, tokens, heads]: the highest score, and the sum of weights relative to it */
    const int *first;     /* [caches + 1], each cache's first part; null: all have `parts` */
    int parts, tokens;

    __device__ __forceinline__ int first_part(int cache) const { return first ? first[cache] : cache * parts; }
};

/* An array in each sequence's slot. The slots' addresses are read from device memory, so that a captured pass belongs
 * to no sequence. The host copies it before the pass: reading it needs no wait for the previous kernel. */
struct StoredView {
    const u64 *slot;
    long long offset;

    __device__ __forceinline__ u64 address(int sequence) const { return slot ? slot[sequence] : 0; }

    /* The array in the slot of this address, which is not 0; null without a slot. */
    template <class T> __device__ __forceinline__ T *at(u64 address) const
    {
        /* Relative to a pointer that the compiler knows to be global: accesses are then global ones too. */
        return slot ? (T *)((char *)slot + (address + offset - (u64)slot)) : nullptr;
    }
    template <class T> __device__ __forceinline__ T *of(int sequence) const { return at<T>(address(sequence)); }
};

/* Pages that each kv head of each sequence reads: marks [sequences, kv_heads, words] with one bit per page, or, where
 * `top` has a slot, the pages int32 [kv_heads, rows, count] that rows selected, -1 for none. */
struct PagesView {
    const unsigned *marks;
    StoredView top;
    int words, rows, count;
};

/* Which experts the tokens of a pass go to, and which rows experts have: experts/routing.cuh. `slots` experts of each
 * token, shared ones included. */
struct RoutingView {
    int *experts;    /* [tokens, slots] */
    float *weights;  /* the same */
    int *places;     /* [tokens * slots], token * slots + slot, by experts, those of one ascending */
    int *items;      /* [item_count, 3]: an expert, the first of `places`, and how many are an item of work */
    int *item_count; /* [1] */
    int tokens, slots;

    __device__ ExpertItem item(int i) const;
    __device__ int token(int row) const;
    __device__ size_t row_of_planes(int place) const;
};
