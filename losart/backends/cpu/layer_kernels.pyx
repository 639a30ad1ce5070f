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


def split_heads(const float[:, ::1] qkv, Py_ssize_t heads, Py_ssize_t kv_heads, const float[::1] q_norm,
                const float[::1] k_norm, float eps, const float[:, ::1] cosines, const float[:, ::1] sines):
    """Queries, keys and values of a layer; queries and keys normed, and rotated to their positions.

    Halves of a head turn together, not pairs: channel d with channel d + head_dim / 2.

    Parameters
    ----------
    qkv : float32 [tokens, (heads + 2 * kv_heads) * head_dim]
    heads, kv_heads : int
    q_norm, k_norm : float32 [head_dim]
    eps : float
    cosines, sines : float32 [tokens, head_dim / 2]

    Returns
    -------
    q, k, v : float32 [tokens, heads or kv_heads, head_dim]
    """
    cdef Py_ssize_t tokens = qkv.shape[0], dim = q_norm.shape[0], half = dim // 2, t, h
    if qkv.shape[1] != (heads + 2 * kv_heads) * dim or k_norm.shape[0] != dim:
        raise ValueError("qkv does not have these heads")
    if not (cosines.shape[0] == sines.shape[0] == tokens and cosines.shape[1] == sines.shape[1] == half):
        raise ValueError(f"angles of {tokens} tokens and {half} channels were expected")
    queries = np.empty((tokens, heads, dim), np.float32)
    keys, values = (np.empty((tokens, kv_heads, dim), np.float32) for _ in range(2))
    cdef float[:, :, ::1] q = queries, k = keys, v = values
    cdef bint threads = tokens * qkv.shape[1] > WORTH_THREADS
    for t in prange(tokens, nogil=True, schedule="static", use_threads_if=threads):
        for h in range(heads):
            norm(&qkv[t, h * dim], NULL, &q_norm[0], dim, eps, NULL, &q[t, h, 0])
            rotate(&q[t, h, 0], &cosines[t, 0], &sines[t, 0], half)
        for h in range(kv_heads):
            norm(&qkv[t, (heads + h) * dim], NULL, &k_norm[0], dim, eps, NULL, &k[t, h, 0])
            rotate(&k[t, h, 0], &cosines[t, 0], &sines[t, 0], half)
        memcpy(&v[t, 0, 0], &qkv[t, (heads + kv_heads) * dim], sizeof(float) * kv_heads * dim)
    return queries, keys, values


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
