/* Tensor-core and asynchronous-copy instructions of compute capability 8.0 and later. Operands are of OPERAND_FORMAT,
 * one of 16 bits; sums are float32. */
#if OPERAND_FORMAT == BFLOAT16
#define OPERAND_PTX "bf16"
#else
#define OPERAND_PTX "f16"
#endif
using Operand = TypeOf<OPERAND_FORMAT>::type;
static_assert(sizeof(Operand) == 2, "tensor cores take operands of 16 bits");

template <class T> __device__ __forceinline__ unsigned pack(float low, float high);
template <> __device__ __forceinline__ unsigned pack<BFloat16>(float low, float high)
{
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <> __device__ __forceinline__ unsigned pack<Float16>(float low, float high)
{
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/* c [16][8] += a [16][16] b [16][8]. With lane = 4 g + t: a0 (row g, k 2t), a1 (g + 8, 2t), a2 (g, 2t + 8),
 * a3 (g + 8, 2t + 8), b0 (k 2t, column g), b1 (2t + 8, g), c0 and c1 (g, 2t), c2 and c3 (g + 8, 2t); pairs are
 * neighbours along k, in c along the columns. */
__device__ __forceinline__ void mma(float *c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                    unsigned b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32." OPERAND_PTX "." OPERAND_PTX
        ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* The same, with c = 0 before. */
__device__ __forceinline__ void mma_from_zero(float *c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                              unsigned b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32." OPERAND_PTX "." OPERAND_PTX
        ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.0f));
}

__device__ __forceinline__ unsigned shared_address(const void *pointer)
{
    return (unsigned)__cvta_generic_to_shared(pointer);
}

/* Four 8x8 matrices; lane i gives the address of row i % 8 of matrix i / 8. */
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], unsigned address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], unsigned address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

/* Volatile, to stay in their place: after the wait for what they load, and among the mma, so that not all results
 * take registers at once. */
__device__ __forceinline__ uint4 load_shared_uint4(unsigned address)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ uint2 load_shared_uint2(unsigned address)
{
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ float load_shared(unsigned address)
{
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ void store_shared(unsigned address, unsigned x)
{
    asm volatile("st.shared.u32 [%0], %1;" : : "r"(address), "r"(x) : "memory");
}

__device__ __forceinline__ void store_shared_uint4(unsigned address, uint4 x)
{
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}

__device__ __forceinline__ float2 load_shared_float2(unsigned address)
{
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
    return v;
}

/* Writes zeros unless `copies`; the address must be valid all the same. */
__device__ __forceinline__ void copy_16_bytes_async(unsigned shared, const void *global, bool copies = true)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared), "l"(global), "r"(copies ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }

/* Waits until at most PENDING of this thread's committed groups of copies are in flight. */
template <int PENDING> __device__ __forceinline__ void wait_copies()
{
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

/* Copies of items first <= i < last through a ring of BUFFERS buffers of shared memory, each started by load(i). One is
 * free, so that the next item's copy does not wait until all threads are done with the current one. */
template <int BUFFERS, class Load>
__device__ __forceinline__ void start_copies(int first, int last, const Load &load)
{
#pragma unroll 1 /* it runs once: short code will do */
    for (int i = 0; i < BUFFERS - 1; i++) {
        if (first + i < last) load(first + i);
        commit_copies();
    }
}

/* Waits for item i, which all threads may then read, and starts the next copy where item i - 1 was. */
template <int BUFFERS, class Load> __device__ __forceinline__ void advance_copies(int i, int last, const Load &load)
{
    wait_copies<BUFFERS - 2>();
    __syncthreads();
    if (i + BUFFERS - 1 < last) load(i + BUFFERS - 1);
    commit_copies();
}
