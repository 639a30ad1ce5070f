"""What a layer does between its matmuls and attention: norms, rotation, the gate, and joining attention's parts.

Each is one loop over memory (simd.h), where NumPy would take some thirty calls for a layer.
"""

import numpy as np

from libc.math cimport expf, fmaxf
from libc.string cimport memcpy

from losart.backends.cpu.pool cimport parallel_for
from losart.backends.cpu.simd cimport gate, mix, norm, rotate

cdef enum:
    WORTH_THREADS = 1 << 17   # numbers


cdef struct NormWork:
    # [tokens, size] each; delta may be NULL.
    const float *x
    const float *delta
    const float *gain
    Py_ssize_t size
    float eps
    float *total
    float *to


cdef void norm_token(void *state, Py_ssize_t t) noexcept nogil:
    cdef const NormWork *work = <const NormWork *>state
    cdef Py_ssize_t first = t * work.size
    norm(work.x + first, work.delta + first if work.delta != NULL else NULL, work.gain, work.size, work.eps,
         work.total + first, work.to + first)


def add_rms_norm(x, delta, const float[::1] gain, float eps):
    """RMS norm of x, or of x + delta.

    Parameters
    ----------
    x : float32 [tokens, size]
    delta : float32 [tokens, size] or None
    gain : float32 [size]
    eps : float

    Returns
    -------
    total, normed : float32 [tokens, size]
        The first is x where there is no delta. A row whose square overflows is NaN.
    """
    cdef const float[:, ::1] values = x, added = x if delta is None else delta
    cdef Py_ssize_t tokens = values.shape[0], size = values.shape[1]
    if gain.shape[0] != size or added.shape[0] != tokens or added.shape[1] != size:
        raise ValueError("x, delta and gain do not fit")
    normed, total = np.empty((tokens, size), np.float32), x if delta is None else np.empty((tokens, size), np.float32)
    cdef float[:, ::1] to = normed, sums = normed if delta is None else total
    if not tokens or not size:
        return total, normed
    cdef NormWork work = NormWork(&values[0, 0], NULL, &gain[0], size, eps, &sums[0, 0], &to[0, 0])
    if delta is not None:
        work.delta = &added[0, 0]
    with nogil:
        parallel_for(norm_token, &work, tokens, tokens * size > WORTH_THREADS)
    return total, normed


cdef struct SplitWork:
    const float *qkv            # [tokens, (heads + 2 * kv_heads) * dim]
    Py_ssize_t heads, kv_heads, dim, half
    const float *q_gain         # or NULL
    const float *k_gain
    const float *cosines        # [tokens, half]
    const float *sines
    const float *factors        # [tokens] or NULL
    float eps
    float *q                    # [tokens, heads, dim]
    float *k                    # [tokens, kv_heads, dim]
    float *v


cdef void split_token(void *state, Py_ssize_t t) noexcept nogil:
    cdef const SplitWork *work = <const SplitWork *>state
    cdef Py_ssize_t dim = work.dim, of_kv = work.kv_heads * dim, h, d
    cdef const float *x = work.qkv + t * (work.heads + 2 * work.kv_heads) * dim
    cdef float *q = work.q + t * work.heads * dim
    cdef float *k = work.k + t * of_kv
    for h in range(work.heads):
        turn(work, t, x + h * dim, work.q_gain, q + h * dim)
    if work.factors != NULL:
        for d in range(work.heads * dim):
            q[d] *= work.factors[t]
    x += work.heads * dim
    for h in range(work.kv_heads):
        turn(work, t, x + h * dim, work.k_gain, k + h * dim)
    memcpy(work.v + t * of_kv, x + of_kv, sizeof(float) * of_kv)


cdef inline void turn(const SplitWork *work, Py_ssize_t t, const float *x, const float *gain,
                      float *to) noexcept nogil:
    if gain != NULL:
        norm(x, NULL, gain, work.dim, work.eps, NULL, to)
    else:
        memcpy(to, x, sizeof(float) * work.dim)
    rotate(to, work.cosines + t * work.half, work.sines + t * work.half, work.half)


def split_heads(const float[:, ::1] qkv, Py_ssize_t heads, Py_ssize_t kv_heads, Py_ssize_t head_dim, q_norm, k_norm,
                float eps, const float[:, ::1] cosines, const float[:, ::1] sines, factors=None):
    """Queries, keys and values of a layer; queries and keys normed, and rotated to their positions.

    Halves turn together, not pairs: channel d with channel d + rotated / 2, of the first `rotated` channels of a head.

    Parameters
    ----------
    qkv : float32 [tokens, (heads + 2 * kv_heads) * head_dim]
    heads, kv_heads, head_dim : int
    q_norm, k_norm : float32 [head_dim] or None
        None: they are not normed.
    eps : float
    cosines, sines : float32 [tokens, rotated / 2]
    factors : float32 [tokens], optional
        Of queries, after they are rotated.

    Returns
    -------
    q, k, v : float32 [tokens, heads or kv_heads, head_dim]
    """
    cdef Py_ssize_t tokens = qkv.shape[0], dim = head_dim, half = cosines.shape[1]
    if qkv.shape[1] != (heads + 2 * kv_heads) * dim:
        raise ValueError("qkv does not have these heads")
    if not (cosines.shape[0] == sines.shape[0] == tokens and sines.shape[1] == half and 2 * half <= dim):
        raise ValueError(f"angles of {tokens} tokens and {dim // 2} channels at most were expected")
    cdef bint norms = q_norm is not None, scales = factors is not None
    cdef const float[::1] q_gain = q_norm if norms else np.empty(dim, np.float32)
    cdef const float[::1] k_gain = k_norm if norms else np.empty(dim, np.float32)
    cdef const float[::1] scale = factors if scales else np.empty(tokens, np.float32)
    if not (q_gain.shape[0] == k_gain.shape[0] == dim and scale.shape[0] == tokens):
        raise ValueError("gains or factors do not fit")
    queries = np.empty((tokens, heads, dim), np.float32)
    keys, values = (np.empty((tokens, kv_heads, dim), np.float32) for _ in range(2))
    cdef float[:, :, ::1] q = queries, k = keys, v = values
    if not tokens:
        return queries, keys, values
    cdef SplitWork work = SplitWork(&qkv[0, 0], heads, kv_heads, dim, half, NULL, NULL, &cosines[0, 0], &sines[0, 0],
                                    NULL, eps, &q[0, 0, 0], &k[0, 0, 0], &v[0, 0, 0])
    if norms:
        work.q_gain, work.k_gain = &q_gain[0], &k_gain[0]
    if scales:
        work.factors = &scale[0]
    with nogil:
        parallel_for(split_token, &work, tokens, tokens * qkv.shape[1] > WORTH_THREADS)
    return queries, keys, values


cdef struct GateWork:
    const float *gate_up        # [tokens, 2 * size]
    Py_ssize_t size
    float *to                   # [tokens, size]


cdef void gate_token(void *state, Py_ssize_t t) noexcept nogil:
    cdef const GateWork *work = <const GateWork *>state
    cdef const float *gates = work.gate_up + 2 * t * work.size
    gate(gates, gates + work.size, work.size, work.to + t * work.size)


def gated(const float[:, ::1] gate_up):
    """silu(gate) * up: float32 [tokens, n] of [tokens, 2 n], the gates first."""
    cdef Py_ssize_t tokens = gate_up.shape[0], size = gate_up.shape[1] // 2
    out = np.empty((tokens, size), np.float32)
    cdef float[:, ::1] to = out
    if not tokens or not size:
        return out
    cdef GateWork work = GateWork(&gate_up[0, 0], size, &to[0, 0])
    with nogil:
        parallel_for(gate_token, &work, tokens, tokens * size > WORTH_THREADS)
    return out


cdef struct JoinWork:
    const float *o              # [tokens, heads, dim]
    const float *lse            # [tokens, heads]
    float *other
    const float *other_lse
    Py_ssize_t heads, dim


cdef void join_token(void *state, Py_ssize_t t) noexcept nogil:
    cdef const JoinWork *work = <const JoinWork *>state
    cdef Py_ssize_t h
    cdef float top, share
    for h in range(t * work.heads, (t + 1) * work.heads):
        top = fmaxf(work.lse[h], work.other_lse[h])
        share = expf(work.lse[h] - top)
        share = share / (share + expf(work.other_lse[h] - top))
        mix(work.o + h * work.dim, share, work.dim, work.other + h * work.dim)


def join_parts(const float[:, :, ::1] o, const float[:, ::1] lse, float[:, :, ::1] other,
               const float[:, ::1] other_lse):
    """Attention over two parts of the positions from that over each; overwrites the second, whose sum is finite.

    Parameters
    ----------
    o, other : float32 [tokens, heads, head_dim]
    lse, other_lse : float32 [tokens, heads]
        Log-sum-exp of the scores.
    """
    cdef Py_ssize_t tokens = o.shape[0], heads = o.shape[1], dim = o.shape[2]
    if not (other.shape[0] == lse.shape[0] == other_lse.shape[0] == tokens and other.shape[2] == dim
            and other.shape[1] == lse.shape[1] == other_lse.shape[1] == heads):
        raise ValueError("the parts do not fit")
    if not tokens:
        return
    cdef JoinWork work = JoinWork(&o[0, 0, 0], &lse[0, 0], &other[0, 0, 0], &other_lse[0, 0], heads, dim)
    with nogil:
        parallel_for(join_token, &work, tokens, tokens * heads * dim > WORTH_THREADS)
