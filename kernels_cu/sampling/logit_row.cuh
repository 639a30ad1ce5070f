/* What logit_slices and sample know of a row of logits: the maximum (of equal ones the first), and the sums of weight
 * and weight * x, where x = (logit - top) / temperature and weight = exp(x); temperature is 1 when greedy. `sound` is 0
 * if there is a NaN. */
struct Row {
    float top;
    int token, sound;
    double total, moment;
};
static_assert(sizeof(Row) == LOGIT_ROW_BYTES, "kernels_cu/constants.py disagrees");

/* Makes x relative to a higher maximum. */
__device__ __forceinline__ void raise(Row &row, float top, float temperature)
{
    double shift = row.top == -INFINITE ? 0.0 : ((double)row.top - top) / temperature;
    double factor = row.top == -INFINITE ? 0.0 : exp(shift);
    row.moment = row.total > 0 ? factor * (row.moment + row.total * shift) : 0.0;
    row.total *= factor;
}

__device__ __forceinline__ void join(Row &row, Row other, float temperature)
{
    if (other.top > row.top || (other.top == row.top && other.token < row.token)) {
        raise(row, other.top, temperature);
        row.top = other.top;
        row.token = other.token;
    } else {
        raise(other, row.top, temperature);
    }
    row.total += other.total;
    row.moment += other.moment;
    row.sound &= other.sound;
}

/* Joins all lanes' rows into one. */
__device__ __forceinline__ void join_warp(Row &row, float temperature)
{
    for (int step = WARP / 2; step; step /= 2) {
        Row other;
        other.top = __shfl_xor_sync(~0u, row.top, step);
        other.token = __shfl_xor_sync(~0u, row.token, step);
        other.sound = __shfl_xor_sync(~0u, row.sound, step);
        other.total = __shfl_xor_sync(~0u, row.total, step);
        other.moment = __shfl_xor_sync(~0u, row.moment, step);
        join(row, other, temperature);
    }
}
