"""The CPU kernels on every kind of vector that this machine has, not only the widest."""

import os
import subprocess
import sys

import numpy as np
import pytest

GENERATE = """
import sys
import numpy as np
import losart

model = losart.load(sys.argv[1])
prompt = np.random.default_rng(0).integers(0, 300, 700).tolist()
tokens = [
    model.generate(
        prompt,
        **{"block_length": 16, **options},
        max_new_tokens=24,
        remasking="sequential",
        stop_token_ids=[],
    ).token_ids
    for options in (
        {"attention": "dense"},
        {"attention": "losa", "budget": 64, "active": 3},
        {"attention": "sparsed", "budget": 128},
        {"block_length": 4},
    )
]
print(tokens)
"""


LEVELS = 0, 1, 2, 3


def tokens(checkpoint, level: int) -> str:
    return run(GENERATE, checkpoint, level)


def run(program: str, argument, level: int) -> str:
    environment = os.environ | {"LOSART_SIMD": str(level)}
    command = [sys.executable, "-c", program, str(argument)]
    return subprocess.run(
        command, env=environment, cwd="/", check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_levels_generate_the_same(tmp_path, dtype):
    from losart.measure.random_checkpoint import write_checkpoint

    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype=dtype)
    found = [tokens(checkpoint, level) for level in (0, 1, 2)]
    assert np.unique(found).size == 1


def test_all_levels_generate_the_same_with_quantized_weights(tmp_path):
    """Of 8 bits: with 4 a last bit of an activation may decide to which of 8 bits it is rounded."""
    from losart.loaders import open_checkpoint
    from losart.measure.random_checkpoint import write_checkpoint
    from losart.quantization import WeightFormat, quantize_checkpoint

    source = open_checkpoint(write_checkpoint(tmp_path / "checkpoint"))
    quantized = quantize_checkpoint(source, tmp_path / "quantized", WeightFormat("int8", 32))
    found = [tokens(quantized, level) for level in LEVELS]
    assert np.unique(found).size == 1


MULTIPLY = """
import sys
import numpy as np
from losart.backends.cpu.quantized_linear import QuantizedMatrix, multiply_all

rng, products = np.random.default_rng(0), []
for bits, group, zeros in ((4, 32, False), (4, 48, True), (4, 8, False), (8, 64, True), (8, 1 << 20, False)):
    matrix = QuantizedMatrix(40, 192, bits, min(group, 192), zeros)
    codes, scales = rng.integers(-8, 8, (40, 192)), rng.uniform(0.01, 0.02, (40, -(-192 // group)))
    if bits == 8:
        codes, scales = rng.integers(-128, 128, codes.shape), scales / 16
    matrix.fill(0, codes, scales.astype(np.float32), np.full(scales.shape, 3) if zeros else None)
    for tokens in (1, 4, 7, 8, 21):
        x = rng.standard_normal((tokens, 192), np.float32)
        products.append(np.empty((tokens, 40), np.float32))
        multiply_all([(x, matrix, products[-1], 0)])
# The largest sums that there can be.
for bits, code in ((4, 7), (4, -8), (8, 127), (8, -128)):
    matrix = QuantizedMatrix(16, 64, bits, 64, False)
    matrix.fill(0, np.full((16, 64), code), np.full((16, 1), 2.0**-7, np.float32))
    for sign in (-1, 1):
        out = np.empty((5, 16), np.float32)
        multiply_all([(np.full((5, 64), sign, np.float32), matrix, out, 0)])
        np.testing.assert_allclose(out, code * sign / 2, rtol=1e-6)
np.save(sys.argv[1], np.concatenate(products))
"""


def test_all_levels_multiply_the_same_with_quantized_weights(tmp_path):
    products = []
    for level in LEVELS:
        file = tmp_path / f"{level}.npy"
        run(MULTIPLY, file, level)
        products.append(np.load(file))
    for found in products[1:]:
        np.testing.assert_allclose(found, products[0], rtol=0, atol=3e-6)
