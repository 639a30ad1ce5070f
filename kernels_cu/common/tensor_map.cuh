/* Copies of boxes of a matrix by tensor maps (kernels_cu/tensor_map.py), and clusters of thread blocks, all of which
 * one such copy can reach. For compute capability 9.0; after hopper.cuh. */
struct __align__(64) TensorMap { /* a kernel's parameter, __grid_constant__ */
    u64 opaque[16];
};

__device__ __forceinline__ void prefetch_map(const TensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
}

/* Copies the map's box that begins at this column and row: rows of 128 bytes, swizzled as for descriptor(), zeros past
 * the matrix. All its bytes count towards the barrier. */
__device__ __forceinline__ void copy_box(unsigned shared, const TensorMap *map, int column, int row, unsigned barrier)
{
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        :
        : "r"(shared), "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

/* The same into each thread block of the cluster that has a bit in `blocks`: to the same offset of its shared memory,
 * and for its own barrier. */
__device__ __forceinline__ void copy_box_to(unsigned short blocks, unsigned shared, const TensorMap *map, int column,
                                            int row, unsigned barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2, %3}], [%4], %5;"
                 :
                 : "r"(shared), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
                 : "memory");
}

/* Called before cluster_barrier by the thread that initialized barriers; the cluster then sees them. */
__device__ __forceinline__ void fence_barrier_init()
{
    asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
}

/* Arrives at the barrier that has this address in the given thread block of the cluster. */
__device__ __forceinline__ void barrier_arrive_in(int block, unsigned barrier)
{
    asm volatile("{.reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];}"
                 :
                 : "r"(barrier), "r"(block)
                 : "memory");
}

/* Called by all threads of the cluster. Of earlier writes only barrier initializations are sure to be visible after. */
__device__ __forceinline__ void cluster_barrier()
{
    asm volatile("barrier.cluster.arrive.relaxed;\n"
                 "barrier.cluster.wait.acquire;"
                 :
                 :
                 : "memory");
}
