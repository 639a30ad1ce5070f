"""What sequences bring into a pass on the device, as it is written for the copy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv import at_most

from losart.backends.cuda.pass_inputs import PassInputs
from losart.engine.batch import PassKind

SCRATCH = 77
NAMES = ("slots", "tables", "lengths", "ids", "positions", "is_masked", "proposed")


def arrays(sequences: int, rows: int) -> dict[str, np.ndarray]:
    """Inputs full of what a pass before has left."""
    sizes = dict.fromkeys(NAMES, rows) | dict.fromkeys(NAMES[:3], sequences)
    return {
        name: np.full(size, 99, np.uint64 if name in NAMES[:2] else np.int32) for name, size in sizes.items()
    }


@st.composite
def sequences(draw: Any, tokens: int) -> Any:
    kind = draw(st.sampled_from([PassKind.COMMIT, PassKind.FIRST, PassKind.LATER]))
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=tokens, max_size=tokens))
    masked = draw(st.sets(st.integers(0, tokens - 1))) if kind.denoises else ()
    address = draw(st.integers(1, 2**64 - 1))
    return SimpleNamespace(
        kind=kind,
        ids=np.array(ids) if draw(st.booleans()) else ids,
        prefix_length=draw(st.integers(0, 2**24)),
        masked=sorted(masked),
        proposed=sorted(draw(st.sets(st.integers(0, tokens - 1)))),
        slot=SimpleNamespace(address=address) if draw(st.booleans()) else None,
        cache=SimpleNamespace(table=SimpleNamespace(place=lambda stream: address // 2 + len(stream))),
    )


@st.composite
def groups(draw: Any) -> Any:
    tokens = draw(st.sampled_from([1, 4, 16]))
    return tokens, draw(st.lists(sequences(tokens), min_size=1, max_size=5)), draw(st.integers(0, 2))


@at_most(100)
@given(st.lists(groups(), min_size=1, max_size=3))
def test_all_is_written_and_what_was_there_before_is_not_left(of_pass):
    places = [(tokens, of_group, len(of_group) + padding) for tokens, of_group, padding in of_pass]
    inputs = arrays(
        sum(padded for *_, padded in places), sum(tokens * padded for tokens, _, padded in places)
    )
    filler = PassInputs(*inputs.values())
    expected: dict[str, list[int]] = {name: [] for name in NAMES}
    first = row = proposed = 0
    for tokens, of_group, padded in places:
        proposed = filler.fill(of_group, tokens, padded, SCRATCH, "stream", first, row, proposed)
        for one in of_group:
            expected["slots"].append(one.slot.address if one.slot else 0)
            expected["tables"].append(one.cache.table.place("stream"))
            expected["lengths"].append(one.prefix_length)
            expected["ids"] += list(one.ids)
            expected["positions"] += range(one.prefix_length, one.prefix_length + tokens)
            expected["is_masked"] += [position in one.masked for position in range(tokens)]
            expected["proposed"] += [row + position for position in one.proposed]
            row += tokens
        padding = padded - len(of_group)
        for name, value in {"slots": SCRATCH, "tables": 0, "lengths": 0}.items():
            expected[name] += [value] * padding
        expected["ids"] += [0] * tokens * padding
        expected["is_masked"] += [0] * tokens * padding
        expected["positions"] += [*range(tokens)] * padding
        first, row = first + padded, row + tokens * padding
    assert proposed == len(expected["proposed"])
    inputs["proposed"] = inputs["proposed"][:proposed]
    for name, values in expected.items():
        np.testing.assert_array_equal(inputs[name], np.array(values, inputs[name].dtype), name)


def one_sequence(**changed: Any) -> Any:
    table = SimpleNamespace(place=lambda stream: 5)
    fields = {"kind": PassKind.LATER, "ids": [1, 2], "prefix_length": 8, "masked": [0, 1], "slot": None}
    fields["proposed"] = [0]
    return SimpleNamespace(**fields | {"cache": SimpleNamespace(table=table)} | changed)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ids": [1, 2, 3]}, "has 3 rows, and others of its group 2"),
        ({"ids": np.array([1])}, "has 1 rows, and others of its group 2"),
        ({"masked": [0, 2]}, "row 2 of 2 cannot be masked"),
        ({"masked": [-1]}, "row -1 of 2 cannot be masked"),
        ({"proposed": [0, 2]}, "row 2 of 2 cannot propose a token"),
        ({"proposed": [0, 1, 1, 0, 1]}, "more rows that propose tokens than places"),
    ],
)
def test_nothing_is_written_beyond_the_places(wrong, message):
    filler = PassInputs(*arrays(2, 4).values())
    with pytest.raises(ValueError, match=message):
        filler.fill([one_sequence(), one_sequence(**wrong)], 2, 2, SCRATCH, "", 0, 0, 0)


@pytest.mark.parametrize(
    ("tokens", "places"), [(2, (-1, 0, 0)), (2, (0, -1, 0)), (2, (0, 0, -1)), (0, (0, 0, 0))]
)
def test_places_before_the_first(tokens, places):
    filler = PassInputs(*arrays(2, 4).values())
    with pytest.raises(ValueError, match="counted from 0"):
        filler.fill([one_sequence()], tokens, 1, SCRATCH, "", *places)


@pytest.mark.parametrize(("padded", "first", "row"), [(2, 0, 0), (3, 1, 0), (3, 0, 2)])
def test_more_sequences_or_rows_than_places(padded, first, row):
    filler = PassInputs(*arrays(3, 6).values())
    with pytest.raises(ValueError, match="no room for 3 sequences of 2 rows"):
        filler.fill([one_sequence()] * 3, 2, padded, SCRATCH, "", first, row, 0)
