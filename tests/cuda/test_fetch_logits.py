"""Which logits a pass on the device brings to the host."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("cupy", reason="the CUDA backend needs CuPy")
from losart.backends.cuda.batch import DeviceBatch


class OnDevice:
    """An array that counts the rows that are copied."""

    def __init__(self, array: np.ndarray, copied: list[int]) -> None:
        self._array = array
        self._copied = copied

    def __getitem__(self, rows: slice) -> "OnDevice":
        return OnDevice(self._array[rows], self._copied)

    def get(self, stream: Any) -> np.ndarray:
        assert stream == "stream"
        self._copied.append(len(self._array))
        return self._array.copy()


one = st.tuples(st.sets(st.integers(0, 7)).map(sorted), st.booleans())


@given(st.lists(one, min_size=1, max_size=6), st.booleans())
def test_rows_are_those_of_the_sequences_that_ask(of_pass, gathers):
    """One after the other; where logits are of all rows of a single block, with gaps."""
    if not gathers:
        of_pass = of_pass[:1]
    sequences = [SimpleNamespace(proposed=rows, keeps_logits=keeps) for rows, keeps in of_pass]
    count = sum(len(rows) for rows, _ in of_pass)
    rows = np.arange(count) if gathers else np.array(of_pass[0][0], np.int64)
    if not any(keeps and proposed for proposed, keeps in of_pass):
        return
    batch = object.__new__(DeviceBatch)
    batch.sequences, batch.buffers = tuple(sequences), SimpleNamespace(proposed_logits=rows)
    logits = np.random.default_rng(0).standard_normal((max(count, 8), 5)).astype(np.float32)
    copied: list[int] = []
    found = batch.fetch_logits(OnDevice(logits, copied), "stream")
    asked = np.repeat([keeps for _, keeps in of_pass], [len(proposed) for proposed, _ in of_pass])
    np.testing.assert_array_equal(found, logits[rows[asked]])
    assert len(copied) == sum(keeps and len(proposed) > 0 for proposed, keeps in of_pass)
    assert sum(copied) == asked.sum() if gathers else copied[0] <= 8
