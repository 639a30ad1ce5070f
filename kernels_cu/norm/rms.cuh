/* 1 / rms from a mean of squares; NaN where it overflowed, since zeros would hide it. */
__device__ __forceinline__ float inverse_rms(float mean_square, float eps)
{
    return mean_square < INFINITE ? rsqrtf(mean_square + eps) : NOT_A_NUMBER;
}
