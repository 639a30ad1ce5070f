from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

from losart.measure.random_checkpoint import write_checkpoint

PEAK_WHILE_CONVERTING = """
import sys
from pathlib import Path
import numpy as np
from losart.loaders.safetensors_files import map_tensors

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20

tensors = map_tensors(Path(sys.argv[1]))
np.zeros(1).astype(np.float16)
start, peak = resident(), 0.0
for tensor in tensors.values():
    converted = tensor.array().astype(np.float32)
    peak = max(peak, resident() - start)
    if sys.argv[2] == "release":
        tensor.release()
    del converted
print(peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_released_tensors_leave_memory_flat(tmp_path):
    write_checkpoint(
        tmp_path,
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=8,
        num_heads=16,
        head_dim=64,
        dtype="bfloat16",
        tokenizer=False,
    )
    size = (tmp_path / "model.safetensors").stat().st_size / 2**20
    assert size > 200

    def peak(mode: str) -> float:
        command = [sys.executable, "-c", PEAK_WHILE_CONVERTING, str(tmp_path), mode]
        return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd="/").stdout)

    assert peak("keep") > size, "the measure sees mapped pages"
    assert peak("release") < 64, "the largest tensor and its copy take 24 MiB"


KEPT_BY_A_TOKENIZER = """
import ctypes, sys
from pathlib import Path
from losart.loaders.tokenizer import read_tokenizer

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

start = resident()
tokenizer = read_tokenizer(Path(sys.argv[1]))
loaded = resident()
ctypes.CDLL(None).malloc_trim(0)
print(loaded - start, loaded - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others give memory back by themselves, or not")
def test_what_parsing_a_tokenizer_takes_is_given_back(tmp_path):
    pairs = [(a, b) for a in range(200) for b in range(200)]
    tokens = [*(chr(256 + n) for n in range(200)), *(chr(256 + a) + chr(256 + b) for a, b in pairs)]
    merges = [[chr(256 + a), chr(256 + b)] for a, b in pairs]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    )
    command = [sys.executable, "-c", KEPT_BY_A_TOKENIZER, str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/").stdout
    taken, kept = map(float, output.split())
    assert kept < 4 < taken, "parsing frees 18 MiB more"
