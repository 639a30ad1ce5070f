"""What a layer does between its matmuls and attention."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from losart.backends.cpu.layer_kernels import add_rms_norm, gated, join_parts, split_heads

EPS, EXACT = 1e-6, {"rtol": 3e-6, "atol": 1e-6}


def normed(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * gain


def check_norm(rng: np.random.Generator) -> None:
    for size in (1, 7, 16, 100, 1024):
        x, delta = rng.standard_normal((2, 5, size))
        gain = rng.standard_normal(size)
        held = [array.astype(np.float32) for array in (x, delta, gain)]
        total, y = add_rms_norm(*held, EPS)
        np.testing.assert_array_equal(total, held[0] + held[1])
        np.testing.assert_allclose(y, normed(total.astype(np.float64), gain), **EXACT)
        same, y = add_rms_norm(held[0], None, held[2], EPS)
        assert same is held[0]
        np.testing.assert_allclose(y, normed(x, gain), **EXACT)
    x = np.array([[1, np.nan], [3e38, 1], [-np.inf, 1], [1, 1]], np.float32)
    _, y = add_rms_norm(x, None, np.ones(2, np.float32), EPS)
    assert np.isnan(y[:3]).all() and np.isfinite(y[3]).all(), "nothing that overflows comes out as zeros"


def check_heads(rng: np.random.Generator) -> None:
    for heads, kv_heads, dim, rotated, norms in (
        (1, 1, 16, 16, True),
        (4, 2, 48, 48, False),
        (6, 3, 128, 64, True),
        (2, 1, 32, 8, False),
    ):
        qkv = rng.standard_normal((3, heads + 2 * kv_heads, dim))
        gains, angles = rng.standard_normal((2, dim)), rng.uniform(0, 6, (3, rotated // 2))
        turns = [turn(angles).astype(np.float32) for turn in (np.cos, np.sin)]
        factors = rng.uniform(1, 2, 3).astype(np.float32)
        sizes, held = (heads, kv_heads, dim), list(gains.astype(np.float32)) if norms else [None, None]
        for scale in (None, factors):
            q, k, v = split_heads(qkv.reshape(3, -1).astype(np.float32), *sizes, *held, EPS, *turns, scale)
            np.testing.assert_array_equal(v, qkv[:, heads + kv_heads :].astype(np.float32))
            of_queries = 1 if scale is None else scale[:, None, None]
            for found, x, gain, factor in (
                (q, qkv[:, :heads], gains[0], of_queries),
                (k, qkv[:, heads : heads + kv_heads], gains[1], 1),
            ):
                x = normed(x, gain) if norms else x
                first, second, rest = np.split(x, [rotated // 2, rotated], axis=-1)
                pairs = (first + 1j * second) * np.exp(1j * angles)[:, None]
                expected = factor * np.concatenate([pairs.real, pairs.imag, rest], -1)
                np.testing.assert_allclose(found, expected, **EXACT)


def check_gate(rng: np.random.Generator) -> None:
    for size in (1, 15, 32, 100):
        x = rng.standard_normal((3, 2 * size)) * 20
        gate, up = np.split(x, 2, axis=1)
        np.testing.assert_allclose(gated(x.astype(np.float32)), gate / (1 + np.exp(-gate)) * up, **EXACT)
    edges = np.array([[-3e38, -100, 0, -0.0, 100, 3e38, np.inf, np.nan], [1] * 8], np.float32)
    np.testing.assert_array_equal(
        gated(edges.reshape(1, 16))[0], np.array([0, 0, 0, 0, 100, 3e38, np.inf, np.nan], np.float32)
    )


def check_parts(rng: np.random.Generator) -> None:
    o, other = rng.standard_normal((2, 3, 2, 48)).astype(np.float32)
    lse, other_lse = rng.uniform(-90, 90, (2, 3, 2)).astype(np.float32)
    lse[0, 0], lse[0, 1] = -np.inf, 200
    share = 1 / (1 + np.exp(np.minimum(other_lse.astype(np.float64) - lse, 700)))[..., None]
    expected = share * o + (1 - share) * other
    alone = other[0, 0].copy()
    join_parts(o, lse, other, other_lse)
    np.testing.assert_allclose(other, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(other[0, 0], alone)


def check_all() -> None:
    for check in (check_norm, check_heads, check_gate, check_parts):
        check(np.random.default_rng(0))


@pytest.mark.parametrize("level", ["0", "1", "2"])  # kinds of vectors
def test_they_are_those_of_float64(level):
    environment = os.environ | {"LOSART_SIMD": level, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", "import test_layer_kernels as t; t.check_all()"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_what_does_not_fit():
    x, row = np.zeros((2, 64), np.float32), np.zeros(16, np.float32)
    for call in (
        lambda: add_rms_norm(x, None, row, EPS),
        lambda: add_rms_norm(x, x[:1], np.zeros(64, np.float32), EPS),
        lambda: split_heads(x, 2, 2, 16, row, row, EPS, x[:, :8].copy(), x[:, :8].copy()),
        lambda: split_heads(x, 2, 1, 16, row, row, EPS, x[:, :7].copy(), x[:, :8].copy()),
        lambda: split_heads(x, 2, 1, 16, row[:8], row, EPS, x[:, :8].copy(), x[:, :8].copy()),
        lambda: split_heads(x, 2, 1, 16, None, None, EPS, x[:, :8].copy(), x[:, :8].copy(), row[:1]),
        lambda: split_heads(x, 2, 1, 16, None, None, EPS, x[:, :9].copy(), x[:, :9].copy()),
        lambda: join_parts(x[None], x[:1, :3].copy(), x[None].copy(), x[:1, :2].copy()),
    ):
        with pytest.raises(ValueError, match=r"fit|heads|expected"):
            call()
