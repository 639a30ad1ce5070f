"""Products of the CPU backend, and what they ask of the machine's threads."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from kv import held, model_config, narrow

from losart.backends.cpu.backend import CpuBackend, Weight
from losart.config.precision import FORMATS, Precision


def largest_error() -> float:
    """Of products of few and of many tokens, in units of what rounding may cost."""
    rng, worst = np.random.default_rng(0), 0.0
    for dtype in ("float32", "bfloat16", "float16"):
        backend = CpuBackend(model_config(1, 1, 16), Precision.of(dtype))
        for rows, inner in ((1, 1), (5, 15), (49, 16), (97, 100), (130, 264)):
            weight = rng.standard_normal((rows, inner), np.float32)
            matrix = Weight((narrow(weight, dtype), narrow(weight[: rows // 2], dtype)), FORMATS[dtype])
            exact = np.concatenate([held(weight, dtype), held(weight[: rows // 2], dtype)]).astype(np.float64)
            for tokens in (*range(1, 10), 16, 17, 40):
                x = rng.standard_normal((tokens, inner), np.float32)
                scale = np.abs(x.astype(np.float64)) @ np.abs(exact).T
                error = np.abs(backend.linear(x, matrix) - x.astype(np.float64) @ exact.T) / scale
                worst = max(worst, error.max() / (inner * 2.0**-24))
    return worst


@pytest.mark.parametrize("level", ["0", "1", "2"])  # kinds of vectors
def test_products_are_those_of_float64(level):
    script = "import test_cpu_backend as t; print(t.largest_error())"
    environment = os.environ | {"LOSART_SIMD": level, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert float(result.stdout) <= 1


def test_a_token_s_product_does_not_depend_on_how_many_there_are():
    rng = np.random.default_rng(1)
    backend = CpuBackend(model_config(1, 1, 16), Precision.of("bfloat16"))
    x, weight = rng.standard_normal((8, 300), np.float32), rng.standard_normal((70, 300), np.float32)
    matrix = Weight((narrow(weight, "bfloat16"),), FORMATS["bfloat16"])
    for first, last in itertools.combinations(range(9), 2):
        np.testing.assert_array_equal(
            backend.linear(x[first:last], matrix), backend.linear(x, matrix)[first:last]
        )


MULTIPLY = """
import os
import sys
import numpy as np
from losart.backends.cpu.backend import blas_multiply

weight = np.ones((2048, 1024), sys.argv[1])
out = np.empty((100, 2048), np.float32)
blas_multiply(np.ones((100, 1024), np.float32), weight, out)
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
@pytest.mark.parametrize("dtype", ["float32", "uint16", "float16"])
def test_products_of_blas_wake_no_threads_but_its_own(dtype):
    environment = os.environ | {"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MULTIPLY, dtype]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd="/")
    assert int(result.stdout) == 1
