/* Copies of boxes of a matrix by tensor maps (launch.py's TensorMap), and clusters of thread blocks, which
 * such a copy can reach all at once. For compute capability 9.0; after hopper.cuh. */
struct __align__(64) TensorMap { unsigned long long opaque[16]; }; /* a kernel's parameter, __grid_constant__ */

__device__ __forceinline__ void prefetch_map(const TensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* The map's box from this column and row on, its rows of 128 bytes one after the other with their pieces
 * exchanged as descriptor() tells; zeros for what is past the matrix. All its bytes count for the barrier. */
__device__ __forceinline__ void copy_box(unsigned shared, const TensorMap *map, int column, int row, unsigned barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(shared), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

/* The same into each block of the cluster that has a bit in `blocks`: to the same place, for the same barrier of its own. */
__device__ __forceinline__ void copy_box_to(unsigned short blocks, unsigned shared, const TensorMap *map, int column,
                                            int row, unsigned barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2, %3}], [%4], %5;"
                 ::"r"(shared), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks) : "memory");
}

/* By who has initialized barriers: after cluster_barrier all blocks' copies and arrivals find them. */
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

/* Arrives at the barrier that lies at this address in a block of the cluster. */
__device__ __forceinline__ void barrier_arrive_in(int block, unsigned barrier)
{
    asm volatile("{.reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(barrier), "r"(block) : "memory");
}

/* By all threads of the cluster; of what was written before only initialized barriers are sure to be seen. */
__device__ __forceinline__ void cluster_barrier()
{
    asm volatile("barrier.cluster.arrive.relaxed;\n"
                 "barrier.cluster.wait.acquire;" ::: "memory");
}
