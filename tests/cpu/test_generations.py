"""Generations are those of the version before the pass became an explicit object (commit a9b80a0), those by
page bounds of the version that first held them in four bits, and those of sessions of the version that made
these engines, which reuse whole pages; one page read by LoSA in bfloat16 is of the version without BLAS.
Fourteen of random weights in bfloat16, and a session in blocks of 33 in each dtype, which rounding decides,
are of the version that first had norms, rotation and gate in loops of its own.

Of all methods, options and block lengths, and of sessions: tests/support/generations.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from generations import DTYPES, generations

import losart

EXPECTED = json.loads(Path(__file__).with_name("generations.json").read_text())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["random", "small"])
def test_generations_are_those_of_before(tiny_checkpoint, name, dtype):
    model = losart.load(tiny_checkpoint if name == "random" else None, "cpu", dtype)
    found, expected = generations(model), EXPECTED[f"{name} {dtype}"]
    assert len(expected) > 90 and found.keys() == expected.keys()
    assert {case for case in found if found[case] != expected[case]} == set()
