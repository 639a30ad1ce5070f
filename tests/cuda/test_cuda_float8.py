"""Products of tokens and weights that are both E4M3: codes of tokens, of weights, then products.

The oracle multiplies the codes' numbers in float64. Tensor cores add a unit's products with about 14 bits.
"""

from __future__ import annotations

import numpy as np
import pytest
from cuda_arrays import matmul_array, on_host
from device_codes import Codes, matrix_of, new_backend, random_codes, to_device
from kv import held

from losart.backends.cpu.convert import widen
from losart.backends.cuda.float8_plans import float8_plan, gated_float8_plan
from losart.config.precision import FORMATS
from losart.loaders.quantized.float8 import FLOAT8_VALUES
from losart.quantization.rounding import nearest_codes

pytestmark = pytest.mark.gpu
LARGEST, TINIEST = np.float32(448), np.float32(2.0**-100)
TENSOR_CORES = 2e-3  # of the norm of all sums; a code in a wrong place makes it 1
# Columns of 64 bytes of codes: those of a lane's halves of 8, in the order of their words.
PLACES = np.array(
    [
        half * 32 + t * 8 + word * 4 + i
        for t in range(4)
        for half in (0, 1)
        for word in (0, 1)
        for i in (0, 2, 1, 3)
    ]
)


@pytest.fixture(params=["bfloat16", "float16"])
def backend(request):
    made = new_backend(request.param, activations="fp8")
    if not made.float8_activations:
        pytest.skip("the GPU does not multiply E4M3 by wgmma")
    return made


def dtype_of(backend):
    return backend.precision.activations.name


def permuted(codes):
    """Rows of codes, whole units of columns, in the order in which they are held."""
    return codes.reshape(len(codes), -1, 64)[:, :, PLACES].reshape(codes.shape)


def rounded(x):
    """What tokens become: the numbers of their codes, float64, and scales, float32 [tokens]."""
    top = np.maximum(np.abs(x).max(axis=1), TINIEST)
    codes = nearest_codes(x * (LARGEST / top)[:, None], "fp8")
    return FLOAT8_VALUES[codes.view(np.uint8)].astype(np.float64), top / LARGEST


def tokens_of(rng, count, columns, dtype):
    """Some rows with a column that is much larger, as models have them."""
    x = rng.standard_normal((count, columns), np.float32)
    x[:, columns // 2] *= 30
    return held(x, dtype).astype(np.float32)


def float8_codes(rng, rows, columns, group, format="bfloat16"):
    return random_codes(rng, rows, columns, "float8", group, False, True, format)


def distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("columns", [8, 64, 200, 4096, 12288])
def test_tokens_become_codes(backend, columns):
    rng, dtype = np.random.default_rng(columns), dtype_of(backend)
    x = tokens_of(rng, 70, columns, dtype) * np.exp2(rng.integers(-6, 6, (70, 1))).astype(np.float32)
    x[0] = 0
    x[1] = 2.0**-24
    x[2, 0] = 2.0**14
    x = held(x, dtype).astype(np.float32)
    with backend.memory.stream:
        codes, scales = backend._float8.quantized(to_device(backend, x, dtype))
    codes, scales = on_host(backend, codes, scales)
    numbers, expected = rounded(x)
    np.testing.assert_array_equal(scales, expected)
    padded = np.zeros((len(x), -(-columns // 128) * 128))
    padded[:, :columns] = numbers
    np.testing.assert_array_equal(FLOAT8_VALUES[codes], permuted(padded))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_has_no_scale(backend, bad):
    x = np.ones((66, 256), np.float32)
    x[3, 7] = bad
    weight = backend.upload(float8_codes(np.random.default_rng(0), 40, 256, 0))
    with backend.memory.stream:
        device = to_device(backend, x, dtype_of(backend))
        _, scales = backend._float8.quantized(device)
        product = backend.linear(device, weight)
    wrong = np.arange(66) == 3
    np.testing.assert_array_equal(np.isnan(on_host(backend, scales)), wrong)
    found = matmul_array(backend, product)
    np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(wrong[:, None], found.shape))


@pytest.mark.parametrize(("rows", "columns"), [(256, 128), (300, 200), (1000, 1024)])
def test_codes_of_a_step_are_rows_of_64_bytes(backend, rows, columns):
    tensor = float8_codes(np.random.default_rng(0), rows, columns, 0)
    weight = backend.upload(tensor)
    panels, units = -(-rows // 256), -(-columns // 128)
    padded = np.zeros((panels * 256, units * 128), np.uint8)
    padded[:rows, :columns] = tensor.values
    steps = permuted(padded).reshape(panels, 256, units * 2, 64).transpose(0, 2, 1, 3)
    found = on_host(backend, weight._arrays[0]).view(np.uint8).reshape(steps.shape)
    np.testing.assert_array_equal(found, steps)


@pytest.mark.parametrize("columns", [64, 128, 136, 1024])
def test_a_token_of_one_takes_a_column(backend, columns):
    """Each sum has one product: it is exact but for the scales, and says which column and row were taken."""
    rng, tokens, rows = np.random.default_rng(0), 200, 600
    tensor = float8_codes(rng, rows, columns, 0)
    chosen = np.arange(tokens) * 37 % columns
    x = np.zeros((tokens, columns), np.float32)
    x[np.arange(tokens), chosen] = 1 + np.arange(tokens) % 2  # whose code is always 448
    with backend.memory.stream:
        product = backend.linear(to_device(backend, x, dtype_of(backend)), backend.upload(tensor))
    expected = matrix_of(tensor).T[chosen] * (1 + np.arange(tokens) % 2)[:, None]
    np.testing.assert_allclose(matmul_array(backend, product), expected, rtol=1e-6)


@pytest.mark.parametrize("group", [0, 128, 256])
@pytest.mark.parametrize("tokens", [65, 100, 128, 129, 512, 2048])
@pytest.mark.parametrize(("rows", "columns"), [((600,), 512), ((301,), 200), ((1024, 256, 256), 4096)])
def test_products_of_codes(backend, rows, columns, tokens, group):
    rng, dtype = np.random.default_rng(tokens + columns), dtype_of(backend)
    tensors = [float8_codes(rng, count, columns, group, dtype) for count in rows]
    weight, matrix = backend.upload(*tensors), np.concatenate([matrix_of(tensor) for tensor in tensors])
    assert weight.form.groups == -(-columns // (group or columns))
    x = tokens_of(rng, tokens, columns, dtype)
    bias = rng.standard_normal(len(matrix), np.float32)
    numbers, scales = rounded(x)
    expected = numbers @ matrix.T * scales[:, None] + bias
    for linear in (backend.linear, backend.prefill_linear):
        with backend.memory.stream:
            import cupy

            product = linear(to_device(backend, x, dtype), weight, cupy.asarray(bias))
        found = matmul_array(backend, product)
        assert distance(found, expected) < TENSOR_CORES
        # Rounding of activations, by at most 1/16 of each, of which errors of many cancel.
        assert distance(found, x.astype(np.float64) @ matrix.T + bias) < 0.06


def test_one_scale_for_a_whole_matrix(backend):
    rng, dtype = np.random.default_rng(0), dtype_of(backend)
    tensor = float8_codes(rng, 512, 384, 0, dtype)
    tensor = Codes(
        "matrix", tensor.shape, "float8", 384, {}, tensor.values, np.full_like(tensor.factors, 0.01)
    )
    x = tokens_of(rng, 300, 384, dtype)
    numbers, scales = rounded(x)
    with backend.memory.stream:
        product = backend.linear(to_device(backend, x, dtype), backend.upload(tensor))
    expected = numbers @ matrix_of(tensor).T * scales[:, None]
    assert distance(matmul_array(backend, product), expected) < TENSOR_CORES


@pytest.mark.parametrize(("tokens", "splits"), [(65, True), (2048, False)])
def test_sums_are_split_where_tiles_are_few(backend, tokens, splits):
    rng, dtype = np.random.default_rng(0), dtype_of(backend)
    tensor = float8_codes(rng, 3000, 8192, 0, dtype)
    weight = backend.upload(tensor)
    plan = float8_plan(backend.kernels.card, weight.form, tokens)
    assert (plan.parts > 1) == splits
    x = tokens_of(rng, tokens, 8192, dtype)
    numbers, scales = rounded(x)
    with backend.memory.stream:
        product = backend.linear(to_device(backend, x, dtype), weight)
    expected = numbers @ matrix_of(tensor).T * scales[:, None]
    assert distance(matmul_array(backend, product), expected) < TENSOR_CORES


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("ffn", [32, 320, 1504, 8192])
@pytest.mark.parametrize("tokens", [100, 700])
def test_gates(backend, tokens, ffn, group):
    rng, dtype = np.random.default_rng(ffn), dtype_of(backend)
    tensors = [float8_codes(rng, ffn, 512, group, dtype) for _ in range(2)]
    weight = backend.upload(*tensors)
    x = tokens_of(rng, tokens, 512, dtype) / 30
    x = held(x, dtype).astype(np.float32)
    numbers, scales = rounded(x)
    gate, up = (numbers @ matrix_of(tensor).T * scales[:, None] for tensor in tensors)
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate)) * up
    with backend.memory.stream:
        fused = backend._float8.gated(to_device(backend, x, dtype), weight)
        found = backend.gated_linear(to_device(backend, x, dtype), weight, True)
    assert (fused is None) == (gated_float8_plan(backend.kernels.card, weight.form, tokens) is None)
    for one in (found, fused):
        if one is not None:
            values = widen(on_host(backend, one).view(FORMATS[dtype].array)).astype(np.float64)
            assert distance(values, expected) < 2 * TENSOR_CORES + 4e-3  # the result has 16 bits


def test_few_tokens_and_other_scales_stay_as_they_are(backend):
    rng, dtype = np.random.default_rng(0), dtype_of(backend)
    plain = new_backend(dtype)
    for tokens, group in ((64, 0), (300, 64)):
        tensor = float8_codes(rng, 500, 512, group, dtype)
        x = tokens_of(rng, tokens, 512, dtype)
        products = []
        for one in (backend, plain):
            with one.memory.stream:
                products.append(matmul_array(one, one.linear(to_device(one, x, dtype), one.upload(tensor))))
        np.testing.assert_array_equal(*products)


def test_a_model_says_that_it_does_so_and_answers(backend):
    import losart

    model = losart.load(None, "cuda", dtype_of(backend), weights="fp8", activations="fp8")
    assert model.activations == "fp8" and "float8" in model.weights
    result = model.generate(list(range(5, 405)), max_new_tokens=8)
    assert len(result.token_ids) > 0 or result.finish_reason == "stop"
