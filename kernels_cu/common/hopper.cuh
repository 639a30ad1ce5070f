/* Instructions of compute capability 9.0 alone (sm_90a): wgmma, the matmul of a warpgroup (4 warps), bulk copies and
 * their barriers. After tensor.cuh. */

/* wgmma's descriptor of a matrix in shared memory: rows of 128 bytes in groups of 8, 16-byte pieces swizzled within a
 * group (piece p of row r is at p ^ r), groups aligned to 1024 bytes. `group` is the distance in bytes of the next 8
 * rows; `columns`, for b with k along its columns, that of the next 64 columns. */
__device__ __forceinline__ unsigned long long descriptor(unsigned shared, int group, int columns)
{
    return (unsigned long long)(shared >> 4 & 0x3fff) | (unsigned long long)(columns >> 4) << 16 |
           (unsigned long long)(group >> 4) << 32 | 1ull << 62;
}

/* The same of rows of 64 bytes, groups aligned to 512 bytes one after the other; piece p of row r is at p ^ r / 2. */
__device__ __forceinline__ unsigned long long descriptor_of_64_bytes(unsigned shared)
{
    return (unsigned long long)(shared >> 4 & 0x3fff) | (unsigned long long)(512 >> 4) << 32 | 2ull << 62;
}

/* That of a matrix which begins some bytes further. */
__device__ __forceinline__ unsigned long long further(unsigned long long descriptor, int bytes)
{
    return descriptor >> 32 << 32 | (unsigned)descriptor + bytes / 16;
}

/* The accumulators d as asm operands: their numbers, and their constraints. */
#define NUMBERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NUMBERS_16 NUMBERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NUMBERS_32 \
    NUMBERS_16 ", " \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NUMBERS_64 \
    NUMBERS_32 ", " \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NUMBERS_96 \
    NUMBERS_64 ", " \
               "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
               "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NUMBERS_128 \
    NUMBERS_96 ", " \
               "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
               "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define ACCUMULATORS_8_FROM(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define ACCUMULATORS_16_FROM(i) ACCUMULATORS_8_FROM(i), ACCUMULATORS_8_FROM(i + 8)
#define ACCUMULATORS_32_FROM(i) ACCUMULATORS_16_FROM(i), ACCUMULATORS_16_FROM(i + 16)
#define ACCUMULATORS_8 ACCUMULATORS_8_FROM(0)
#define ACCUMULATORS_16 ACCUMULATORS_16_FROM(0)
#define ACCUMULATORS_32 ACCUMULATORS_32_FROM(0)
#define ACCUMULATORS_64 ACCUMULATORS_32, ACCUMULATORS_32_FROM(32)
#define ACCUMULATORS_96 ACCUMULATORS_64, ACCUMULATORS_32_FROM(64)
#define ACCUMULATORS_128 ACCUMULATORS_96, ACCUMULATORS_32_FROM(96)

/* Three functions wgmma for d [64][COLUMNS] += a b, whose N = COLUMNS / 2 accumulators are a thread's; N1 ... N5 are
 * the numbers after N, those of further operands.
 *
 * The first takes a [64][16] and b [COLUMNS][16], with k along its rows, from shared memory; `fresh` zeroes d before.
 * The second takes a from registers, as fragments, and b [16][COLUMNS], with k along its columns, from shared memory,
 * the third a from registers and b as the first. */
#define WGMMA_PTX(COLUMNS, D) \
    "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." OPERAND_PTX "." OPERAND_PTX " {" D "}, "
#define DEFINE_WGMMA(COLUMNS, N, N1, N2, N3, N4, N5) \
    __device__ __forceinline__ void wgmma(float (&d)[N], unsigned long long a, unsigned long long b, bool fresh) \
    { \
        asm volatile("{.reg .pred p; setp.eq.b32 p, %" #N2 \
                     ", 0;\n" WGMMA_PTX(COLUMNS, NUMBERS_##N) "%" #N ", %" #N1 ", p, 1, 1, 0, 0;}" \
                     : ACCUMULATORS_##N \
                     : "l"(a), "l"(b), "r"((int)fresh)); \
    } \
    __device__ __forceinline__ void wgmma(float (&d)[N], const unsigned (&a)[4], unsigned long long b) \
    { \
        asm volatile(WGMMA_PTX(COLUMNS, NUMBERS_##N) "{%" #N ", %" #N1 ", %" #N2 ", %" #N3 "}, %" #N4 ", 1, 1, 1, 1;" \
                     : ACCUMULATORS_##N \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
    } \
    __device__ __forceinline__ void wgmma(float (&d)[N], const unsigned (&a)[4], unsigned long long b, bool fresh) \
    { \
        asm volatile( \
            "{.reg .pred p; setp.eq.b32 p, %" #N5 \
            ", 0;\n" WGMMA_PTX(COLUMNS, NUMBERS_##N) "{%" #N ", %" #N1 ", %" #N2 ", %" #N3 "}, %" #N4 ", p, 1, 1, 0;}" \
            : ACCUMULATORS_##N \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)fresh)); \
    }
DEFINE_WGMMA(16, 8, 9, 10, 11, 12, 13)
DEFINE_WGMMA(32, 16, 17, 18, 19, 20, 21)
DEFINE_WGMMA(64, 32, 33, 34, 35, 36, 37)
DEFINE_WGMMA(128, 64, 65, 66, 67, 68, 69)
DEFINE_WGMMA(192, 96, 97, 98, 99, 100, 101)
DEFINE_WGMMA(256, 128, 129, 130, 131, 132, 133)

/* wgmma for d [64][192] += a b of E4M3 numbers, a [64][32] and b [192][32] from shared memory, with k along the rows of
 * both. */
__device__ __forceinline__ void wgmma_float8(float (&d)[96], unsigned long long a, unsigned long long b, bool fresh)
{
    asm volatile("{.reg .pred p; setp.eq.b32 p, %98, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n192k32.f32.e4m3.e4m3 {" NUMBERS_96 "}, %96, %97, p, 1, 1;}"
                 : ACCUMULATORS_96
                 : "l"(a), "l"(b), "r"((int)fresh));
}

/* Before a warpgroup's first wgmma, and after its registers were written in between. */
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }

/* Keeps the compiler from moving writes of these registers across this point. */
template <int COUNT> __device__ __forceinline__ void pin(float (&registers)[COUNT])
{
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(registers[i])::"memory");
}

/* Waits until at most PENDING committed groups of wgmma are in flight; their registers must not be touched. */
template <int PENDING> __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(PENDING) : "memory");
}

/* Four 8x8 matrices, as load_matrices reads them. */
__device__ __forceinline__ void store_matrices(unsigned address, unsigned a, unsigned b, unsigned c, unsigned d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

/* Makes what threads wrote to shared memory visible to wgmma and bulk copies. */
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

__device__ __forceinline__ void barrier_init(unsigned barrier, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expecting(unsigned barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(barrier), "r"(bytes) : "memory");
}

/* Waits until the phase of this parity has completed. */
__device__ __forceinline__ void barrier_wait(unsigned barrier, int parity)
{
    asm volatile("{.reg .pred done;\n"
                 "again_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again_%=;}"
                 :
                 : "r"(barrier), "r"(parity)
                 : "memory");
}

/* The barriers of STAGES stages of shared memory that copies go through in turn: item i has stage i % STAGES, its copy
 * completes `full`, and its readers arrive at `empty`. */
struct Ring {
    unsigned base;

    __device__ __forceinline__ unsigned full(int stage) const { return base + stage * BARRIER_BYTES; }
    __device__ __forceinline__ unsigned empty(int stage) const { return full(stage) + 8; }

    __device__ __forceinline__ void initialize(int readers) const
    {
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(full(stage), 1);
            barrier_init(empty(stage), readers);
        }
    }

    __device__ __forceinline__ void wait_until_full(int i) const { barrier_wait(full(i % STAGES), i / STAGES & 1); }

    /* Waits until item i - STAGES has been read. */
    __device__ __forceinline__ void wait_until_empty(int i) const
    {
        if (i >= STAGES) barrier_wait(empty(i % STAGES), (i / STAGES - 1) & 1);
    }
};

/* Copies contiguous bytes, a multiple of 16; their arrival counts towards the barrier. */
__device__ __forceinline__ void bulk_copy(unsigned shared, const void *global, int bytes, unsigned barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :
                 : "r"(shared), "l"(global), "r"(bytes), "r"(barrier)
                 : "memory");
}

/* A barrier of some whole warps of a thread block; id 0 is that of __syncthreads. */
template <int THREADS> __device__ __forceinline__ void named_barrier(int id)
{
    asm volatile("bar.sync %0, %1;" : : "r"(id), "n"(THREADS) : "memory");
}

/* The same, which says whether it holds for any of the threads. */
template <int THREADS> __device__ __forceinline__ bool named_barrier_any(int id, bool holds)
{
    int any;
    asm volatile("{.reg .pred p, q; setp.ne.b32 p, %3, 0; bar.red.or.pred q, %1, %2, p; selp.b32 %0, 1, 0, q;}"
                 : "=r"(any)
                 : "r"(id), "n"(THREADS), "r"((int)holds)
                 : "memory");
    return any;
}

/* Sets how many registers each thread of the warpgroup has from here on; the kernel needs launch bounds. */
template <int COUNT> __device__ __forceinline__ void set_registers_down()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(COUNT));
}

template <int COUNT> __device__ __forceinline__ void set_registers_up()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(COUNT));
}
