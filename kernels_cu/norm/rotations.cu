/* Sines and cosines, times a factor, of the angles by which split_heads rotates: rotations [tokens, 2, pairs], once per
 * pass for all of its layers and heads.
 *
 * `frequencies` [pairs] are half turns per position in double: the angle of a float would be off by 1e-2 at position
 * 100,000. Whole turns come off half turns exactly; an angle in radians would need a table in local memory for that.
 *
 * Grid: one thread block per token. Must write 2 * pairs values per token. */
extern "C" __global__ void __launch_bounds__(ROTATION_THREADS)
    rotations(const double *frequencies, float factor, BatchView batch, float *to, int pairs)
{
    wait_for_previous();
    int token = blockIdx.x, position = batch.positions[token];
    to += (size_t)token * 2 * pairs;
    for (int i = threadIdx.x; i < pairs; i += ROTATION_THREADS) {
        double angle = (double)position * frequencies[i];
        float sine, cosine;
        sincospif((float)(angle - 2 * rint(angle / 2)), &sine, &cosine);
        to[i] = sine * factor, to[pairs + i] = cosine * factor;
    }
}
