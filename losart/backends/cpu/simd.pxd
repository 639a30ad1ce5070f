from libc.stdint cimport int8_t, int16_t, uint8_t, uint16_t, uint64_t

cdef extern from "simd.h" nogil:
    int simd_level()
    void slab_scores(const float *q, long rows, long dim, const float *k, float *s, long s_stride)
    void slabs_accumulate(const float *p, long p_stride, long rows, const float *const *v, long slabs,
                          long dim, float *o)
    void slab_products(const void *w, int width, long rows, long dim, const float *x, float *s)
    void row_products(const void *w, int width, long rows, long dim, const float *x, long tokens, float *y,
                      long y_stride)
    float softmax_step(float *s, long slabs, float *top, float *total, float *slab_sums)
    void norm(const float *x, const float *delta, const float *gain, long dim, float eps, float *total, float *to)
    void rotate(float *x, const float *cosines, const float *sines, long half)
    void gate(const float *gates, const float *ups, long count, float *to)
    void mix(const float *x, float share, long count, float *y)
    void scale(float *x, long count, float factor)
    void widen_bfloat16(const uint16_t *source, float *to, long count)
    void widen_float16(const uint16_t *source, float *to, long count)
    void widen_codes(const uint8_t *slab, float *to, long dim, int width, int keys)
    float encode(const float *x, long dim, int width, uint8_t *codes, long stride)
    float code_value(uint8_t code, int width)
    uint16_t narrow_bfloat16(float x)
    uint16_t narrow_float16(float x)
    void decode_bounds(const uint64_t *codes, const float *base, const float *step, long dim, int width, float *to)
    float largest_magnitude(const float *x, long count)
    long round_int8(const float *x, long count, float factor, int8_t *to)
    long round_int16(const float *x, long count, float factor, int16_t *to)
