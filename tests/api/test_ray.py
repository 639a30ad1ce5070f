"""`losart.ray.Generate` by itself, and on the workers of a real Ray, of which one is killed."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import ROOT

import losart

for package in ("pyarrow", "ray.data"):
    pytest.importorskip(package)

import pyarrow  # noqa: E402
import pyarrow.dataset  # noqa: E402
import pyarrow.parquet  # noqa: E402
import ray  # noqa: E402
import ray.data  # noqa: E402

from losart.ray import Generate, row_seed  # noqa: E402

WORDS = ["values?", "kaka koko", "nasi-rami: jalu-lamu.", "momi lamu koku", "zuka?"]
OPTIONS = {"device": "cpu", "max_new_tokens": 8, "stop_token_ids": []}


@pytest.fixture(scope="module")
def generate() -> Generate:
    return Generate(**OPTIONS, row_options=["max_new_tokens", "temperature", "seed", "block_length"])


def test_its_name_hides_no_package():
    assert sys.modules["losart.ray"].__name__ == "losart.ray"
    assert ray is not sys.modules["losart.ray"] and hasattr(ray, "init")


# Tables and dicts of arrays.


def test_a_table_keeps_its_columns_and_gets_the_answers(generate):
    table = pyarrow.table(
        {
            "id": [7, None, 9],
            "prompt": ["values?", "kaka koko", "momi"],
            "max_new_tokens": [None, 3, 20],
            "extra": [b"x", None, b"z"],
        }
    )
    found = generate(table)
    assert found.select(table.column_names).equals(table)
    model = losart.load(device="cpu")
    for row, length in zip(found.to_pylist(), (8, 3, 20), strict=True):
        expected = model.generate(row["prompt"], max_new_tokens=length, stop_token_ids=[])
        assert row["token_ids"] == expected.token_ids and row["text"] == expected.text
        assert row["finish_reason"] == "length" and row["error"] == ""
        assert row["new_tokens"] == length and row["prompt_tokens"] > 0 and row["mean_sequences"] > 0
    empty = generate(table.slice(0, 0))
    assert empty.num_rows == 0 and empty.schema == found.schema


def test_a_dict_of_arrays_gives_one(generate):
    prompts = np.empty(3, object)
    prompts[:] = [np.array([1, 2, 3]), [5], np.arange(3, 9)]
    batch = {"prompt": prompts, "id": np.arange(3), "temperature": np.array([np.nan, 0.0, 1.5])}
    found = generate(batch)
    assert all(found[name] is batch[name] for name in batch)
    assert all(isinstance(column, np.ndarray) and len(column) == 3 for column in found.values())
    rows = [{"prompt": [1, 2, 3]}, {"prompt": [5]}, {"prompt": [*range(3, 9)], "id": 2, "temperature": 1.5}]
    expected = [generate(pyarrow.Table.from_pylist([row])).to_pylist()[0] for row in rows]
    for name in ("token_ids", "text", "finish_reason", "error", "new_tokens"):
        assert found[name].tolist() == [row[name] for row in expected]


def test_messages_and_names_of_columns():
    messages = [[{"role": "user", "content": "a"}], [{"role": "system", "content": "b", "name": None}]]
    table = pyarrow.table({"messages": messages, "text": ["x", "y"]})
    wrong = Generate(device="cpu", prompt="messages", text="answer")(table).to_pylist()
    assert [row["text"] for row in wrong] == ["x", "y"]  # its own
    assert all("no chat template" in row["error"] and row["answer"] == "" for row in wrong)


def test_a_wrong_row_fails_alone(generate):
    rows = [
        {"prompt": "values?"},
        {"prompt": ""},
        {"prompt": None},
        {"prompt": "values?", "block_length": 0},
        {"prompt": "lamu " * 40_000},
        {"prompt": "momi"},
    ]
    found = generate(
        pyarrow.Table.from_pylist(rows, schema=pyarrow.schema({"prompt": "str", "block_length": "i8"}))
    )
    errors = found["error"].to_pylist()
    assert [bool(error) for error in errors] == [False, True, True, True, True, False]
    assert errors[1:4] == [
        "PromptError: the prompt is empty",
        'DataError: it has no "prompt"',
        "OptionError: block_length must be an integer, 1 or more, not 0",
    ]
    for row in found.to_pylist()[1:5]:
        assert (row["text"], row["token_ids"], row["finish_reason"], row["new_tokens"]) == ("", [], "", 0)
    limited = Generate(**OPTIONS, kv_memory=2**20)(pyarrow.table({"prompt": ["momi " * 2000, "momi"]}))
    assert limited["error"].to_pylist()[0].startswith("OutOfMemoryError: ")
    assert limited["new_tokens"].to_pylist() == [0, 8]


def test_what_is_wrong_for_all_is_raised(generate):
    with pytest.raises(losart.OptionError, match="no column 'prompt'; there are id"):
        generate(pyarrow.table({"id": [1]}))
    with pytest.raises(losart.OptionError, match="there are columns text: give"):
        generate({"prompt": np.array(["a"]), "text": np.array(["b"])})
    for options, message in [
        ({"block_length": 0}, "block_length"),
        ({"nonsense": 1}, "unknown option"),
        ({"row_options": ["nonsense"]}, "no option nonsense"),
        ({"stats": ["nonsense"]}, "no nonsense"),
        ({"text": "error"}, "same name"),
        ({"logprobs": 2}, "logprobs: answers have no column for them"),
        ({"row_options": ["logprobs"]}, "logprobs: answers have no column for them"),
    ]:
        with pytest.raises(losart.OptionError, match=message):
            Generate(device="cpu", **options)


def test_seeds_are_of_rows_and_not_of_batches(generate):
    rows = [{"prompt": "values?", "id": index, "temperature": 2.0} for index in range(6)]
    given = [*rows, {"prompt": "values?", "id": 0, "temperature": 2.0, "seed": row_seed(0, 3)}]
    whole = {tuple(row["token_ids"]) for row in generate(pyarrow.Table.from_pylist(rows)).to_pylist()}
    assert len(whole) == 6
    again = generate(pyarrow.Table.from_pylist(given[::-1])).to_pylist()
    assert {tuple(row["token_ids"]) for row in again} == whole
    assert again[0]["token_ids"] == again[3]["token_ids"]  # whose seed it was given
    other = Generate(**OPTIONS, seed=1, temperature=2.0)(pyarrow.Table.from_pylist(rows))
    assert not whole & {tuple(ids) for ids in other["token_ids"].to_pylist()}
    no_keys = generate(pyarrow.Table.from_pylist([{"prompt": "a", "temperature": 2.0}] * 2))["token_ids"]
    assert no_keys[0] == no_keys[1]


def test_beginnings_in_common_are_prefilled_once():
    document = [[*range(10 + index, 110 + index)] for index in range(3)]
    rows = [{"prompt": document[index % 3] + [index]} for index in range(12)]
    found = Generate(**OPTIONS, max_sequences=1)(pyarrow.Table.from_pylist(rows))
    assert sum(reused > 0 for reused in found["reused_tokens"].to_pylist()) == 12 - 3


# On workers.


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def pool(batch_size: int) -> dict[str, Any]:
    compute = ray.data.ActorPoolStrategy(
        size=2, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
    )
    # Two CPUs: what is left of them reads.
    return {"compute": compute, "num_cpus": 0.5, "batch_size": batch_size, "batch_format": "pyarrow"}


def kill_at_work(calls: Path) -> int:
    """Kill a worker that is at least at its second batch, when it is in the middle of one."""
    while True:
        for ended in calls.glob("*.ended"):
            worker = ended.name.split("-")[0]
            begun = {file.stem for file in calls.glob(f"{worker}-*.begun")}
            if begun - {file.stem for file in calls.glob(f"{worker}-*.ended")}:
                os.kill(int(worker), signal.SIGKILL)
                return int(worker)
        time.sleep(0.002)


def test_a_killed_worker_loses_nothing(cluster, tmp_path, monkeypatch):
    class Noted(Generate):
        def __call__(self, batch: Any) -> Any:
            note = tmp_path / f"{os.getpid()}-{time.monotonic_ns()}"
            note.with_suffix(".begun").touch()
            answered = super().__call__(batch)
            note.with_suffix(".ended").touch()
            return answered

    rows = [
        {"id": index, "prompt": f"{WORDS[index % 5]} {WORDS[index % 4]}", "temperature": float(index % 2)}
        for index in range(48)
    ]
    rows[13]["prompt"] = ""
    # Each is what it is alone bit for bit, with whatever it shares passes.
    options = OPTIONS | {
        "max_new_tokens": 48,
        "deterministic": True,
        "row_options": ["temperature"],
        "stats": [],
    }
    one_process = Generate(**options)(pyarrow.Table.from_pylist(rows)).to_pylist()
    monkeypatch.setattr(
        ray.data.DataContext.get_current(), "target_max_block_size", 1024
    )  # several of each task
    killed: list[int] = []
    killer = threading.Thread(target=lambda: killed.append(kill_at_work(tmp_path)), daemon=True)
    killer.start()
    prompts = ray.data.from_items(rows, override_num_blocks=6)
    found = prompts.map_batches(Noted, fn_constructor_kwargs=options, **pool(4)).take_all()
    killer.join(timeout=1)
    assert killed, "all was done before a worker could be killed"
    assert sorted(found, key=lambda row: row["id"]) == one_process
    begun, ended = (list(tmp_path.glob(f"*.{kind}")) for kind in ("begun", "ended"))
    assert len(begun) > len(ended) >= 12
    assert len({file.name.split("-")[0] for file in begun}) == 3  # two, and who took the killed one's place


@pytest.mark.parametrize(("kind", "workers"), [("jsonl", 2), ("parquet", 1)])
def test_the_example(cluster, tmp_path, capsys, kind, workers):
    rows = [{"id": index, "prompt": WORDS[index % 5]} for index in range(20)]
    source, answers = tmp_path / f"prompts.{kind}", tmp_path / "answers"
    if kind == "jsonl":
        source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": 20, "prompt": ""}]))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows, {"id": 20, "prompt": ""}]), source)
    options = {"max_new_tokens": 8, "stop_token_ids": []}
    command = f"{source} {answers} --device cpu --batch-size 4 --workers {workers} --options".split()
    runpy.run_path(str(ROOT / "examples" / "ray_batch.py"))["main"]([*command, json.dumps(options)])
    printed = capsys.readouterr().out
    assert "rows               21: 1 with an error" in printed and "new tokens         160 in" in printed
    written = sorted(pyarrow.dataset.dataset(answers).to_table().to_pylist(), key=lambda row: row["id"])
    expected = losart.load(device="cpu").generate([row["prompt"] for row in rows], **options)
    assert [row["token_ids"] for row in written[:20]] == [result.token_ids for result in expected]
    assert [bool(row["error"]) for row in written] == [False] * 20 + [True]
