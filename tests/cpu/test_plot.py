"""`losart plot`: what it draws, and its mistakes."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import losart
from losart.cli import main
from losart.observe.plot import active_map, density_map, draw, page_map

PROMPT = np.random.default_rng(0).integers(0, 256, 75).tolist()
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None,
    reason="matplotlib is not installed (extra plot)",
)


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory):
    """A trace file, and its generation's result."""
    file = tmp_path_factory.mktemp("plot") / "run.jsonl"
    options = {"attention": "losa", "active": 2, "budget": 16, "dense_layers": 1}
    session = losart.load(tiny_checkpoint, device="cpu").session(
        max_new_tokens=16, block_length=8, stop_token_ids=[], **options
    )
    with losart.TraceWriter(file, session, "cost $1_000$") as trace:
        result = session.generate(PROMPT, observer=trace)
        trace.finish(result)
    return file, result


def test_the_density_map_is_the_traces(run):
    file, result = run
    trace = losart.read_trace(file)
    densities = density_map(trace)
    assert densities.shape == (4, result.stats.denoising_passes + result.stats.commit_passes)
    assert densities.mean() == pytest.approx(result.stats.density)
    assert (densities[0] == 1).all()


def test_the_page_map_has_a_share_of_heads_for_each_page(run):
    trace = losart.read_trace(run[0])
    shares = page_map(trace)
    assert shares.shape == (len(trace.passes), -(-trace.passes[-1].block_start // 16))
    np.testing.assert_allclose(shares, np.mean([page_map(trace, layer) for layer in range(4)], axis=0))
    for row, observed in zip(page_map(trace, 2), trace.passes, strict=True):
        pages = -(-observed.block_start // 16)
        assert np.isnan(row[pages:]).all()
        for page in range(pages):
            assert row[page] == np.mean([page in ids for ids in observed.layers[2].pages])


def test_the_active_map_says_who_was_active_and_how_clearly(run, tiny_checkpoint, tmp_path):
    counted = active_map(losart.read_trace(run[0]))
    assert set(counted.ravel()) == {-np.inf, np.inf}
    file = tmp_path / "auto.jsonl"
    session = losart.load(tiny_checkpoint, device="cpu").session(
        max_new_tokens=16, block_length=8, stop_token_ids=[], attention="losa", budget=16, dense_layers=1
    )
    with losart.TraceWriter(file, session) as trace:
        session.generate(PROMPT, observer=trace)
    trace = losart.read_trace(file)
    found = active_map(trace)
    assert found.shape == (4 * 8, len(trace.passes))
    for column, step in zip(found.T, trace.passes, strict=True):
        for of_layer, layer in zip(column.reshape(4, 8), step.layers, strict=True):
            assert np.flatnonzero(of_layer > 0).tolist() == layer.active.tolist()
            assert (layer.change is None) == (step.kind != "later" or layer.dense)
            if layer.change is not None:
                np.testing.assert_allclose(0.05 * 2.0**of_layer, layer.change, rtol=1e-5)


@needs_matplotlib
@pytest.mark.parametrize(
    ("arguments", "panels"),
    [
        ([], 2),
        (["--kind", "density"], 1),
        (["--kind", "pages", "--layer", "3"], 1),
        (["--kind", "active"], 1),
    ],
)
def test_writes_a_picture(run, tmp_path, capsys, arguments, panels):
    output = tmp_path / "out.png"
    assert main(["plot", str(run[0]), "-o", str(output), *arguments]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    data = output.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    height = int.from_bytes(data[20:24], "big")
    assert height == round(150 * (0.8 + 3.6 * panels))


@needs_matplotlib
def test_the_picture_is_beside_the_trace_by_default(run, capsys):
    assert main(["plot", str(run[0])]) == 0
    assert run[0].with_suffix(".png").exists()


@needs_matplotlib
def test_labels_and_title(run):
    figure = draw(losart.read_trace(run[0]), layer=1)
    assert "losa, block_length=8, budget=16, " in figure.get_suptitle()
    assert "cost $1_000$" in figure.get_suptitle()
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["share of the prefix read", "pages read, layer 1"]
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in panels)


@needs_matplotlib
def test_a_trace_of_an_earlier_version_is_drawn():
    trace = losart.read_trace(Path(__file__).with_name("trace_format_1.jsonl"))
    assert [len(draw(trace, kind).axes) for kind in ("density", "both", "active")] == [2, 4, 2]


@needs_matplotlib
@pytest.mark.parametrize("passes", [1, 2, 7])
def test_ticks_are_whole_numbers(run, passes):
    trace = losart.read_trace(run[0])
    figure = draw(dataclasses.replace(trace, passes=trace.passes[:passes]))
    for axes in figure.axes:
        if axes.get_title():
            assert all(tick == round(tick) for tick in [*axes.get_xticks(), *axes.get_yticks()])
            labels = [label.get_text() for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]]
            assert labels and all(re.fullmatch(r"−?\d+", label) for label in labels)  # noqa: RUF001


@needs_matplotlib
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["TRACE", "--layer", "4"], 2, "layer must be 0 to 3, not 4"),
        (["TRACE", "-o", "x.nonsense"], 2, "output must end in"),
        (["TRACE", "-o", "no/such/folder/x.png"], 1, "no/such/folder"),
    ],
)
def test_wrong_options_give_one_line(run, capsys, arguments, code, message):
    assert main(["plot", *(str(run[0]) if a == "TRACE" else a for a in arguments)]) == code
    error = capsys.readouterr().err
    assert error.startswith("losart: ") and message in error and error.count("\n") == 1


def test_files_that_are_no_traces(run, tmp_path, capsys):
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text("".join(run[0].read_text().splitlines(keepends=True)[:2]) + '{"kind":')
    for file, message in ((damaged, f"{damaged}: line 3: not JSON"), (tmp_path / "none", "none")):
        assert main(["plot", str(file)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("losart: ") and message in error and error.count("\n") == 1


def test_a_trace_is_not_overwritten(run, capsys):
    before = run[0].read_bytes()
    assert main(["plot", str(run[0]), "-o", str(run[0])]) == 2
    assert run[0].read_bytes() == before


def test_without_matplotlib(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", str(run[0])]) == 1
    assert capsys.readouterr().err == "losart: plots need matplotlib: pip install 'losart[plot]'\n"
