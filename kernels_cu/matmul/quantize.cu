/* Rows of weights [count, inner] rounded to codes, as losart/quantization/rounding.py does it, bit for bit: scales
 * [count, inner / group] are numbers of the weights' own format with which the value of largest magnitude of a group
 * has the outermost code, and codes the nearest ones, ties to even. `wrong` gets 1 where a value is not finite.
 *
 * Compiled with CODES. Grid: count * inner / group / (QUANTIZED_THREADS / WARP), one warp per group. */
extern "C" __global__ void __launch_bounds__(QUANTIZED_THREADS)
    quantize(const WeightValue *weights, signed char *codes, float *scales, int *wrong, int count, int inner, int group)
{
    let_next_start();
    wait_for_previous();
    size_t index = (size_t)blockIdx.x * (QUANTIZED_THREADS / WARP) + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP;
    if (index >= (size_t)count * (inner / group)) return;
    weights += index * group, codes += index * group;
    /* The largest magnitude, the first of several: its bits, then what is left of the columns. */
    unsigned long long first = 0;
    bool finite = true;
    for (int i = lane; i < group; i += WARP) {
        unsigned bits = __float_as_uint(widen(weights[i])) & 0x7fffffff;
        finite &= bits < 0x7f800000;
        first = max(first, (unsigned long long)bits << 32 | (unsigned)(group - 1 - i));
    }
    for (int step = WARP / 2; step; step /= 2) first = max(first, __shfl_xor_sync(~0u, first, step));
    if (!finite) *wrong = 1;
    float most = widen(weights[group - 1 - (unsigned)first]);
    float scale = CODES == INT4 ? most / -8.0f : fabsf(most) / (CODES == INT8 ? 127.0f : LARGEST_FLOAT8);
    scale = widen(narrow<WeightValue>(scale));
    if (scale == 0) scale = 1;
    if (lane == 0) scales[index] = scale;
    for (int i = lane; i < group; i += WARP) {
        float x = widen(weights[i]) / scale;
#if CODES == FLOAT8
        codes[i] = nearest_float8(x);
#else
        codes[i] = (int)fminf(fmaxf(rintf(x), CODES == INT4 ? -8 : -127), CODES == INT4 ? 7 : 127);
#endif
    }
}
