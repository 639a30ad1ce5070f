"""What a layer does between its matmuls and attention: norms, rotation, the gate, and joining attention's parts.

Each is one loop over memory (simd.h), where NumPy would take some thirty calls for a layer.
"""

import numpy as np

from cython.parallel cimport prange
from libc.math cimport expf, fmaxf
from libc.string cimport memcpy

from losart.backends.cpu.simd cimport gate, mix, norm, rotate

cdef enum:
    WORTH_THREADS = 1 << 17   # numbers


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
    cdef Py_ssize_t tokens = values.shape[0], size = values.shape[1], t
    if gain.shape[0] != size or added.shape[0] != tokens or added.shape[1] != size:
        raise ValueError("x, delta and gain do not fit")
    normed, total = np.empty((tokens, size), np.float32), x if delta is None else np.empty((tokens, size), np.float32)
    cdef float[:, ::1] to = normed, sums = normed if delta is None else total
    cdef bint adds = delta is not None
    if size:
        for t in prange(tokens, nogil=True, schedule="static", use_threads_if=tokens * size > WORTH_THREADS):
            norm(&values[t, 0], &added[t, 0] if adds else NULL, &gain[0], size, eps, &sums[t, 0], &to[t, 0])
    return total, normed


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
    cdef Py_ssize_t tokens = qkv.shape[0], dim = head_dim, half = cosines.shape[1], t, h, d
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
    cdef bint threads = tokens * qkv.shape[1] > WORTH_THREADS
    for t in prange(tokens, nogil=True, schedule="static", use_threads_if=threads):
        for h in range(heads):
            turn(&qkv[t, h * dim], &q_gain[0] if norms else NULL, dim, eps, &cosines[t, 0], &sines[t, 0], half,
                 &q[t, h, 0])
            if scales:
                for d in range(dim):
                    q[t, h, d] *= scale[t]
        for h in range(kv_heads):
            turn(&qkv[t, (heads + h) * dim], &k_gain[0] if norms else NULL, dim, eps, &cosines[t, 0], &sines[t, 0], half,
                 &k[t, h, 0])
        memcpy(&v[t, 0, 0], &qkv[t, (heads + kv_heads) * dim], sizeof(float) * kv_heads * dim)
    return queries, keys, values


cdef inline void turn(const float *x, const float *gain, Py_ssize_t dim, float eps, const float *cosines,
                      const float *sines, Py_ssize_t half, float *to) noexcept nogil:
    if gain != NULL:
        norm(x, NULL, gain, dim, eps, NULL, to)
    else:
        memcpy(to, x, sizeof(float) * dim)
    rotate(to, cosines, sines, half)


def gated(const float[:, ::1] gate_up):
    """silu(gate) * up: float32 [tokens, n] of [tokens, 2 n], the gates first."""
    cdef Py_ssize_t tokens = gate_up.shape[0], size = gate_up.shape[1] // 2, t
    out = np.empty((tokens, size), np.float32)
    cdef float[:, ::1] to = out
    if size:
        for t in prange(tokens, nogil=True, schedule="static", use_threads_if=tokens * size > WORTH_THREADS):
            gate(&gate_up[t, 0], &gate_up[t, size], size, &to[t, 0])
    return out


def join_parts(const float[:, :, ::1] o, const float[:, ::1] lse, float[:, :, ::1] other,
               const float[:, ::1] other_lse):
    """Attention over two parts of the positions from that over each; overwrites the second, whose sum is finite.

    Parameters
    ----------
    o, other : float32 [tokens, heads, head_dim]
    lse, other_lse : float32 [tokens, heads]
        Log-sum-exp of the scores.
    """
    cdef Py_ssize_t tokens = o.shape[0], heads = o.shape[1], dim = o.shape[2], t, h
    cdef float top, share
    if not (other.shape[0] == lse.shape[0] == other_lse.shape[0] == tokens and other.shape[2] == dim
            and other.shape[1] == lse.shape[1] == other_lse.shape[1] == heads):
        raise ValueError("the parts do not fit")
    cdef bint threads = tokens * heads * dim > WORTH_THREADS
    for t in prange(tokens, nogil=True, schedule="static", use_threads_if=threads):
        for h in range(heads):
            top = fmaxf(lse[t, h], other_lse[t, h])
            share = expf(lse[t, h] - top)
            share = share / (share + expf(other_lse[t, h] - top))
            mix(&o[t, h, 0], share, dim, &other[t, h, 0])
