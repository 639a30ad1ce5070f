/* Instructions of compute capability 9.0 alone (sm_90a): products of a warpgroup (4 warps), the bulk copy
 * engine and its barriers. After tensor.cuh. */

/* A matrix in shared memory as wgmma wants it told: rows of 128 bytes in groups of 8, pieces of 16 bytes
 * exchanged within a group (piece p of row r at p ^ r), groups aligned to 1024 bytes. `group` is how
 * many bytes on the next 8 rows are; `columns`, for b with k along its columns, the next 64 columns. */
__device__ __forceinline__ unsigned long long descriptor(unsigned shared, int group, int columns)
{
    return (unsigned long long)(shared >> 4 & 0x3fff) | (unsigned long long)(columns >> 4) << 16 |
           (unsigned long long)(group >> 4) << 32 | 1ull << 62;
}

/* Sums d of a product as operands: their numbers, and what they are. */
#define NAMES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64 NAMES_32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_96 NAMES_64 ", " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_128 NAMES_96 ", " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_8(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define SUMS_32_FROM(i) SUMS_8(i), SUMS_8(i + 8), SUMS_8(i + 16), SUMS_8(i + 24)
#define SUMS_32 SUMS_32_FROM(0)
#define SUMS_64 SUMS_32, SUMS_32_FROM(32)
#define SUMS_96 SUMS_64, SUMS_32_FROM(64)
#define SUMS_128 SUMS_96, SUMS_32_FROM(96)

/* d [64][64] += a b: a [64][16] and b from shared memory, b [64][16] with k along its rows. Zero d first if `fresh`. */
__device__ __forceinline__ void wgmma(float (&d)[32], unsigned long long a, unsigned long long b, bool fresh)
{
    asm volatile(
        "{.reg .pred p; setp.eq.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." HELD_PTX "." HELD_PTX " {" NAMES_32
        "}, %32, %33, p, 1, 1, 0, 0;}"
        : SUMS_32
        : "l"(a), "l"(b), "r"((int)fresh));
}

/* d [64][64] += a b: a's fragments in registers, b [16][64] from shared memory with k along its columns. */
__device__ __forceinline__ void wgmma(float (&d)[32], const unsigned (&a)[4], unsigned long long b)
{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." HELD_PTX "." HELD_PTX " {" NAMES_32
        "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
        : SUMS_32
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* d [64][128] += a b: a [64][16] and b from shared memory, b [128][16] with k along its rows. Zero d first if `fresh`. */
__device__ __forceinline__ void wgmma(float (&d)[64], unsigned long long a, unsigned long long b, bool fresh)
{
    asm volatile(
        "{.reg .pred p; setp.eq.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." HELD_PTX "." HELD_PTX " {" NAMES_64
        "}, %64, %65, p, 1, 1, 0, 0;}"
        : SUMS_64
        : "l"(a), "l"(b), "r"((int)fresh));
}

/* d [64][128] += a b: a's fragments in registers, b [16][128] from shared memory with k along its columns. */
__device__ __forceinline__ void wgmma(float (&d)[64], const unsigned (&a)[4], unsigned long long b)
{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." HELD_PTX "." HELD_PTX " {" NAMES_64
        "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
        : SUMS_64
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* d [64][192] += a b: a [64][16] and b from shared memory, b [192][16] with k along its rows. Zero d first if `fresh`. */
__device__ __forceinline__ void wgmma(float (&d)[96], unsigned long long a, unsigned long long b, bool fresh)
{
    asm volatile(
        "{.reg .pred p; setp.eq.b32 p, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k16.f32." HELD_PTX "." HELD_PTX " {" NAMES_96
        "}, %96, %97, p, 1, 1, 0, 0;}"
        : SUMS_96
        : "l"(a), "l"(b), "r"((int)fresh));
}

/* d [64][256] += a b: a [64][16] and b from shared memory, b [256][16] with k along its rows. Zero d first if `fresh`. */
__device__ __forceinline__ void wgmma(float (&d)[128], unsigned long long a, unsigned long long b, bool fresh)
{
    asm volatile(
        "{.reg .pred p; setp.eq.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." HELD_PTX "." HELD_PTX " {" NAMES_128
        "}, %128, %129, p, 1, 1, 0, 0;}"
        : SUMS_128
        : "l"(a), "l"(b), "r"((int)fresh));
}

/* Before a warpgroup's first product, and when its registers were written in between. */
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/* Registers of products as they are now: writing them is moved neither before nor behind this. */
template <int COUNT> __device__ __forceinline__ void pin(float (&registers)[COUNT])
{
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(registers[i])::"memory");
}

/* Waits until at most PENDING committed groups of products are under way; their registers stay untouched. */
template <int PENDING> __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/* What threads wrote to shared memory becomes visible to products and bulk copies. */
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void barrier_init(unsigned barrier, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expecting(unsigned barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/* Waits for the end of the phase of this parity. */
__device__ __forceinline__ void barrier_wait(unsigned barrier, int parity)
{
    asm volatile("{.reg .pred done;\n"
                 "again_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again_%=;}" ::"r"(barrier), "r"(parity) : "memory");
}

/* Contiguous bytes, a multiple of 16, that count for the barrier when they are there. */
__device__ __forceinline__ void bulk_copy(unsigned shared, const void *global, int bytes, unsigned barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
                 "l"(global), "r"(bytes), "r"(barrier) : "memory");
}

/* A barrier of some whole warps of a block; id 0 is that of __syncthreads. */
__device__ __forceinline__ void named_barrier(int id, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* Registers of each thread of the warpgroup from here on; the kernel has launch bounds. */
template <int COUNT> __device__ __forceinline__ void set_registers_down()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT> __device__ __forceinline__ void set_registers_up()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
