/* A kernel may start while the previous one still runs (programmatic dependent launch), and of every kernel some thread
 * block calls wait_for_previous before it ends. Before the wait it writes no memory, and reads only weights, the
 * committed prefix, what the host copied before the pass, and what earlier passes stored.
 *
 * Matmuls, and whatever can run between split_heads and block_attention, let the next kernel start only after their own
 * wait. So the kernel after them may also read, before its wait, what was written before them. All others (embedding,
 * add_rms_norm, split_heads, block_attention, kv_quantize, cache_write, silu_gate, quantize_tokens_hopper, sampling)
 * let the next kernel start at once. So may kv_quantize and cache_write before prefix attention, which waits for what
 * is written in this pass before it reads it. rotations, which comes before the first of them, lets none start. */
__device__ __forceinline__ void wait_for_previous()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

/* The next kernel may start once all thread blocks of this one have called this or exited. */
__device__ __forceinline__ void let_next_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}
