"""`losart bench`: its figures, and the passes that they are of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from passes import block_batch

import losart
from losart.cli import main
from losart.cli.tables import size
from losart.config.options import AttentionConfig
from losart.engine.batch import PassKind
from losart.measure.bench import NoiseBlocks

SMALL = Path(losart.__file__).parent / "small_checkpoint"
TINY = ["--device", "cpu", "--lengths", "64,320", "--repeats", "1", "--budget", "32"]


def test_figures_of_a_checkpoint(tiny_checkpoint, capsys):
    assert main(["bench", str(tiny_checkpoint), *TINY, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    model = losart.load(tiny_checkpoint, "cpu")
    assert (figures["matrix_bytes"], figures["kv"]) == (model.matrix_bytes, "float32")
    assert (figures["model"], figures["device"], figures["dtype"]) == (tiny_checkpoint.name, "cpu", "float32")
    assert (figures["block_length"], figures["budget"]) == (4, 32)
    assert [row["prefix"] for row in figures["lengths"]] == [64, 320]
    for row in figures["lengths"]:
        assert row["prefill_tokens_per_second"] > 0 and row["kv_bytes"] > 0
        assert list(row["passes"]) == ["dense", "losa", "quest", "sparsed"]
        for method, times in row["passes"].items():
            assert times["first_seconds"] > 0 and times["later_seconds"] > 0
            if method == "dense":
                assert times["density"] is None
            else:
                assert 0 < times["density"] < 1


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_keys_and_values_in_8_bits(tiny_checkpoint, capsys, kv):
    command = ["bench", str(tiny_checkpoint), *TINY, "--kv", kv]
    assert main([*command, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["dtype"], list(figures["matrix_bytes"]), figures["kv"]) == ("float32", ["float32"], kv)
    for row in figures["lengths"]:
        assert all(0 < row["passes"][method]["density"] < 1 for method in ("losa", "quest", "sparsed"))
    assert main(command) == 0
    held = f"float32 ({size(figures['matrix_bytes']['float32'])})"
    assert f" in {held}, keys and values in {kv}, on " in capsys.readouterr().out


def test_random_weights_and_a_table(capsys):
    assert main(["bench", "--size", "tiny", *TINY, "--attention", "dense,losa"]) == 0
    printed = capsys.readouterr()
    assert (
        "random-sdar-tiny in float32 (" in printed.out
        and "), keys and values in float32, on " in printed.out
        and "blocks of 16, budget 32" in printed.out
    )
    head, *rows = printed.out.splitlines()[-5:]
    assert head.split() == ["prefix", "KV", "prefill", "attention", "first", "later", "density"]
    assert [row.split()[0] for row in rows] == ["64", "losa", "320", "losa"]
    assert all(row.endswith("%") == ("losa" in row) for row in rows)
    lines = printed.err.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [
        "filling a prefix of 64",
        "dense after 64",
        "losa after 64",
    ]
    assert lines[-1].startswith("losa after 320: 5 of 6 steps, ")


def test_what_quantized_weights_are_held_in(tmp_path, capsys):
    assert main(["quantize", str(SMALL), str(tmp_path / "new"), "--weights", "int4"]) == 0
    command = ["bench", str(tmp_path / "new"), *TINY, "--attention", "dense"]
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    held = json.loads(capsys.readouterr().out)["matrix_bytes"]
    assert held == losart.load(tmp_path / "new", "cpu").matrix_bytes
    assert list(held) == ["bfloat16", "int4"]
    assert main(command) == 0
    sizes = ", ".join(f"{name} ({size(count)})" for name, count in held.items())
    assert f"new in {sizes}, keys and values in bfloat16, on " in capsys.readouterr().out


def test_passes_are_those_of_a_generation(tiny_checkpoint, monkeypatch):
    blocks = NoiseBlocks(losart.load(tiny_checkpoint, "cpu"), 64, 4)
    seen = []
    forward = blocks.transformer.forward

    def noting(batch):
        (sequence,) = batch.sequences
        seen.append((batch.kind, sequence.prefix_length, sequence.masked))
        return forward(batch)

    monkeypatch.setattr(blocks.transformer, "forward", noting)
    times = blocks.pass_times(AttentionConfig("losa", 16, 1), repeats=2)
    assert seen == [(kind, 64, [0, 1, 2, 3]) for kind in (PassKind.FIRST, PassKind.LATER)] * 3
    assert 16 / 64 <= times.density <= 32 / 64  # a page for each of the two heads that share keys


@pytest.mark.parametrize(("prefix", "prefilled"), [(64, 64), (320, 256)])
def test_the_end_of_a_prefix_is_prefilled_and_the_rest_noise(tiny_checkpoint, monkeypatch, prefix, prefilled):
    model = losart.load(tiny_checkpoint, "cpu")
    pieces = []
    transformer = model._engine.runner
    begin = transformer.begin

    def noting(batch, observe=False):
        assert batch.kind is PassKind.PREFILL
        pieces.append((batch.sequences[0].prefix_length, batch.tokens))
        return begin(batch, observe)

    monkeypatch.setattr(transformer, "begin", noting)
    blocks = NoiseBlocks(model, prefix, 4)
    assert pieces == [(prefix - prefilled, prefilled)] * 2 and blocks.cache.length == prefix
    queries = np.ones((4, 4, 32), np.float32)
    batch = block_batch(blocks.cache, 4)
    read, _ = blocks.transformer.backend.prefix_attention(0, queries, batch)
    assert np.isfinite(read).all() and np.std(read) > 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no/such/directory"], 1, "no/such/directory"),
        (["CHECKPOINT", "--lengths", "100"], 2, "lengths must be multiples of 16"),
        (["CHECKPOINT", "--lengths", "4096"], 2, "up to 4092, not 4096"),
        (["CHECKPOINT", "--lengths", "64", "--block-length", "5"], 2, "multiples of 80"),
        (["CHECKPOINT", "--attention", "flash"], 2, "not 'flash'"),
        (["SHORT"], 2, "lengths must be given"),
    ],
)
def test_mistakes_give_one_line_and_a_code(
    tiny_checkpoint, make_checkpoint, capsys, arguments, code, message
):
    names = {"CHECKPOINT": str(tiny_checkpoint), "SHORT": str(make_checkpoint(max_positions=500))}
    assert (
        main(["bench", *(names.get(argument, argument) for argument in arguments), "--device", "cpu"]) == code
    )
    error = capsys.readouterr().err
    assert message in error and error.startswith("losart: ") and error.count("\n") == 1
