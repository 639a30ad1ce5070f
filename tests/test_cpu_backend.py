"""What the CPU backend asks of the machine's threads."""

import os
import subprocess
import sys

import pytest

MULTIPLY = """
import os
import sys
import numpy as np
from losart.backends.cpu import _blas_multiply

weight = np.ones((2048, 1024), sys.argv[1])
out = np.empty((100, 2048), np.float32)
_blas_multiply(np.ones((100, 1024), np.float32), weight, out)
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
@pytest.mark.parametrize("dtype", ["float32", "uint16", "float16"])
def test_products_of_blas_wake_no_threads_but_its_own(dtype):
    environment = os.environ | {"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MULTIPLY, dtype]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd="/")
    assert int(result.stdout) == 1
