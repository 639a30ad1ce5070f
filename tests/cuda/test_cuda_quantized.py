"""Matrices of codes on the device against the float64 reference, and as they are loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cuda_arrays import matmul_array, on_host
from device_codes import matrix_of, new_backend, random_codes, to_device
from hypothesis import example, given
from hypothesis import strategies as st
from kv import held, steady
from quantized import save_tensors

from losart.backends.cpu.convert import narrow
from losart.config.precision import FORMATS
from losart.errors import TensorError
from losart.loaders.safetensors_files import map_file
from losart.quantization import WeightFormat
from losart.quantization.rounding import RoundedTensor

pytestmark = pytest.mark.gpu
FORMS = [  # codes, columns that share a scale (0: all), zeros, and whether scales are float32
    *(("int4", group, zeros, False) for group in (0, 32, 64, 128) for zeros in (False, True)),
    *(("int8", group, zeros, False) for group in (0, 64) for zeros in (False, True)),
    *((dtype, group, False, True) for dtype in ("int4", "int8", "float8") for group in (0, 64)),
    ("float8", 0, False, False),
]


def columns_of(form, eighths):
    """With zeros columns cannot be padded."""
    return 128 * -(-eighths // 16) if form[2] else 8 * eighths


@steady(80)
@given(
    st.sampled_from(("bfloat16", "float16")),
    st.sampled_from(FORMS),
    st.integers(1, 300),
    st.lists(st.integers(1, 300), min_size=1, max_size=3),
    st.integers(1, 70),
    st.sampled_from([{}, {"sms": 1}, {"sms": 7}, {"capability": (8, 6), "shared_per_block": 99 << 10}]),
    st.booleans(),
)
@example("bfloat16", ("int4", 64, False, False), 16, [4096, 1024, 1024], 512, {}, True)
@example("float16", ("int8", 0, False, False), 64, [1000], 512, {}, False)
@example("bfloat16", ("int8", 64, True, False), 33, [300], 5, {}, False)
@example("bfloat16", ("int8", 0, False, False), 8, [300], 64, {"shared_per_block": 99 << 10}, False)
@example("bfloat16", ("float8", 0, False, True), 1000, [300, 2], 33, {}, True)
def test_matmuls_by_quantized_weights(dtype, form, tokens, rows, eighths, card, bias):
    rng = np.random.default_rng(tokens + sum(rows) + eighths)
    columns = columns_of(form, eighths)
    backend = new_backend(dtype, card)
    tensors = [random_codes(rng, count, columns, *form, dtype) for count in rows]
    weight = backend.upload(*tensors)
    assert weight.form.dtype == form[0] and weight.shape == (sum(rows), columns)
    matrix = np.concatenate([matrix_of(tensor) for tensor in tensors])
    x = rng.standard_normal((tokens, columns), np.float32)
    b = rng.standard_normal(len(matrix), np.float32) if bias else None
    wide = held(matrix.astype(np.float32), dtype).astype(np.float64)
    for linear in (backend.linear, backend.prefill_linear):
        with backend.memory.stream:
            import cupy

            matmul = linear(to_device(backend, x, dtype), weight, None if b is None else cupy.asarray(b))
        found = matmul_array(backend, matmul)
        expected = held(x, dtype).astype(np.float64) @ (matrix if tokens <= 256 else wide).T
        expected += 0 if b is None else b
        assert np.linalg.norm(found - expected) <= 2e-6 * max(np.linalg.norm(expected), 1e-6)


@steady(40)
@given(
    st.sampled_from(("bfloat16", "float16")),
    st.sampled_from(FORMS),
    st.integers(1, 300),
    st.integers(1, 70),
)
def test_codes_are_widened_exactly(dtype, form, rows, eighths):
    backend = new_backend(dtype)
    columns = columns_of(form, eighths)
    tensor = random_codes(np.random.default_rng(rows + eighths), rows, columns, *form, dtype)
    with backend.memory.stream:
        found = backend._dequantized(backend.upload(tensor)).values
    expected = narrow(matrix_of(tensor).astype(np.float32), FORMATS[dtype]).view(np.uint16)
    np.testing.assert_array_equal(on_host(backend, found), expected)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_sums_do_not_depend_on_how_many_tokens_there_are(form):
    rng = np.random.default_rng(0)
    backend = new_backend("bfloat16", deterministic=True)
    weight = backend.upload(random_codes(rng, 700, 512, *form, "bfloat16"))
    x = to_device(backend, rng.standard_normal((300, 512), np.float32), "bfloat16")
    with backend.memory.stream:
        whole = matmul_array(backend, backend.linear(x, weight))
        for first, last in ((0, 1), (3, 20), (7, 60), (100, 300)):
            some = matmul_array(backend, backend.prefill_linear(x[first:last].copy(), weight))
            np.testing.assert_array_equal(some, whole[first:last])


def rounded_tensor(folder: Path, values: np.ndarray, dtype: str, format: WeightFormat) -> RoundedTensor:
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    file = folder / "model.safetensors"
    save_tensors(file, {"a": (names[dtype], narrow(values, FORMATS[dtype]))})
    return RoundedTensor(map_file(file)["a"], format)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("source", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["int4", "int8", "fp8"])
def test_the_device_rounds_as_the_host_does(tmp_path, name, source, dtype):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((300, 192), np.float32) * 2.0 ** rng.integers(-9, 3, (300, 1))
    values[0] = 0
    values[1, :64] = 2.0**-24
    values[2] = rng.integers(-3, 4, 192)  # ties, and several values of the largest magnitude
    values[3] = rng.integers(-3, 4, 192) / 2
    tensor = rounded_tensor(tmp_path, values.astype(np.float32), source, WeightFormat.by_default(name))
    backend = new_backend(dtype)
    weight = backend.upload(tensor)
    assert backend.held(tensor) == {tensor.dtype: weight.form.nbytes}
    with backend.memory.stream:
        found = backend._dequantized(weight).values
    expected = narrow(tensor.float32(0, 300), FORMATS[dtype]).view(np.uint16)
    np.testing.assert_array_equal(on_host(backend, found), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("source", ["bfloat16", "float32"])
def test_values_that_are_not_finite_cannot_be_rounded(tmp_path, source, bad):
    values = np.ones((40, 64), np.float32)
    values[37, 5] = bad
    tensor = rounded_tensor(tmp_path, values, source, WeightFormat.by_default("int4"))
    with pytest.raises(TensorError, match="'a' has values that are not finite"):
        new_backend("bfloat16").upload(tensor)
