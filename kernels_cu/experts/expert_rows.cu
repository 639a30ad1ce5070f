/* y: the rows of x [tokens, inner] in the order of the places, which experts_hopper copies some of at a time; inner is
 * a multiple of 8.
 *
 * Grid: tokens * slots. Must read x once and write slots times as much. */
extern "C" __global__ void __launch_bounds__(EXPERT_ROWS_THREADS)
    expert_rows(const Activation *x, Activation *y, RoutingView routing, int inner)
{
    wait_for_previous(); /* before the next kernel starts, which reads the list at once */
    let_next_start();
    struct __align__(16) Piece {
        Activation values[16 / sizeof(Activation)];
    };
    int pieces = inner * sizeof(Activation) / 16;
    const Piece *from = (const Piece *)x + (size_t)routing.token(blockIdx.x) * pieces;
    Piece *to = (Piece *)y + (size_t)blockIdx.x * pieces;
    for (int i = threadIdx.x; i < pieces; i += EXPERT_ROWS_THREADS) to[i] = from[i];
}
