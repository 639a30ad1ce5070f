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


def tokens(checkpoint, level: int) -> str:
    environment = os.environ | {"LOSART_SIMD": str(level)}
    command = [sys.executable, "-c", GENERATE, str(checkpoint)]
    return subprocess.run(
        command, env=environment, cwd="/", check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_levels_generate_the_same(tmp_path, dtype):
    from losart.measure.random_checkpoint import write_checkpoint

    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype=dtype)
    found = [tokens(checkpoint, level) for level in (0, 1, 2)]
    assert np.unique(found).size == 1


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_all_levels_generate_the_same_with_quantized_weights(tmp_path, format):
    from losart.loaders import open_checkpoint
    from losart.measure.random_checkpoint import write_checkpoint
    from losart.quantization import WeightFormat, quantize_checkpoint

    source = open_checkpoint(write_checkpoint(tmp_path / "checkpoint"))
    quantized = quantize_checkpoint(source, tmp_path / "quantized", WeightFormat(format, 32))
    found = [tokens(quantized, level) for level in (0, 1, 2)]
    assert np.unique(found).size == 1
