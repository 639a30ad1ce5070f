"""Observers and trace files: what each layer of each pass is said to have read."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import losart
from losart.cli import main

PROMPT = np.random.default_rng(0).integers(0, 256, 75).tolist()
WRITTEN_BEFORE = Path(__file__).with_name("trace_format_1.jsonl")
OPTIONS = {
    "max_new_tokens": 24,
    "block_length": 8,
    "stop_token_ids": [],
    "budget": 24,
    "remasking": "sequential",
}
METHODS = [
    {"attention": "dense"},
    {"attention": "losa", "active": 3},
    {"attention": "losa", "active": 0, "dense_layers": 1},
    {"attention": "losa", "active": 0.5, "candidates": "masked", "selector": "anchor", "commit": "sparse"},
    {"attention": "losa", "active": 3, "first_pass": "sparse"},
    {"attention": "quest", "dense_layers": 2, "page_size": 32},
    {"attention": "quest", "first_pass": "dense"},
    {"attention": "sparsed", "commit": "sparse"},
]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return losart.load(tiny_checkpoint, device="cpu")


def observe(model, **options):
    passes: list[losart.Step] = []
    result = model.generate(PROMPT, observer=passes.append, **(OPTIONS | options))
    return passes, result


def mean(values):
    values = [value for value in values if value is not None]
    return pytest.approx(sum(values) / len(values)) if values else None


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_observed_reads_have_the_means_of_the_statistics(model, options):
    passes, result = observe(model, **options)
    stats = result.stats
    kinds = [observed.kind for observed in passes]
    assert kinds.count("commit") == stats.commit_passes
    assert len(kinds) == stats.forward_passes + stats.rides
    layers = list(chain.from_iterable(observed.layers for observed in passes))
    assert stats.density == mean(layer.density for layer in layers)
    assert stats.active_fraction == mean(len(layer.active) / 8 for layer in layers if not layer.dense)
    if options.get("dense_layers", 0) == 0:
        sparse = [o for o in passes if not all(layer.dense for layer in o.layers)]
        assert stats.sparse_density == mean(layer.density for o in sparse for layer in o.layers)


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_observing_changes_nothing(model, options):
    assert observe(model, **options)[1].token_ids == model.generate(PROMPT, **(OPTIONS | options)).token_ids


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_observed_pages_are_of_the_prefix_and_make_the_density(model, options):
    size = options.get("page_size", 16)
    for observed in observe(model, **options)[0]:
        assert len(observed.layers) == 4
        for layer in observed.layers:
            assert len(layer.pages) == 2
            read = 0
            for pages in layer.pages:
                assert (np.diff(pages) > 0).all()
                assert ((pages >= 0) & (pages * size < observed.block_start)).all()
                read += sum(min(size, observed.block_start - page * size) for page in pages.tolist())
            assert layer.density == pytest.approx(read / (2 * observed.block_start))


def test_active_tokens(model):
    for observed in observe(model, attention="losa", active=3, dense_layers=1)[0]:
        first, *others = (layer.active.tolist() for layer in observed.layers)
        assert first == list(range(8))
        for active in others:
            assert active == sorted(set(active)) and set(active) <= set(range(8))
            assert len(active) == (3 if observed.kind == "later" else 8)


def test_active_tokens_are_those_that_changed(model):
    counts = set()
    for observed in observe(model, attention="losa", change_threshold=0.05, dense_layers=1)[0]:
        for index, layer in enumerate(observed.layers):
            assert (layer.change is None) == (index == 0 or observed.kind != "later")
            if layer.change is not None:
                assert layer.change.dtype == np.float32
                assert layer.active.tolist() == np.flatnonzero(layer.change > np.float32(0.05)).tolist()
                counts.add(len(layer.active))
    assert len(counts) > 2


def test_active_tokens_are_candidates(model):
    masked = set(range(8))
    for observed in observe(model, attention="losa", active=5, candidates="masked")[0]:
        if observed.kind == "first":
            masked = {*observed.fixed, *(i for i, token in enumerate(observed.block) if token is None)}
        if observed.kind == "later":
            assert all(set(layer.active) <= masked for layer in observed.layers)
            assert all(len(layer.active) == min(5, len(masked)) for layer in observed.layers)
        masked -= set(observed.fixed)


def test_observed_blocks_are_those_of_the_steps(model):
    passes: list[losart.Step] = []
    steps = list(model.stream(PROMPT, observer=passes.append, **OPTIONS))
    denoising = [observed for observed in passes if observed.kind != "commit"]
    assert [(o.block_start, o.block, o.fixed) for o in denoising] == [
        (step.block_start, step.block, step.positions) for step in steps
    ]


def test_an_empty_prefix_has_no_density(model):
    passes: list[losart.Step] = []
    model.generate([1, 2, 3], observer=passes.append, max_new_tokens=3, block_length=8)
    assert all(o.density is None and all(not p.size for p in o.layers[0].pages) for o in passes)


# Trace files


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_a_trace_is_read_as_it_was_observed(model, tmp_path, options):
    file = tmp_path / "run.jsonl"
    session = model.session(**(OPTIONS | options))
    passes: list[losart.Step] = []
    with losart.TraceWriter(file, session, "tiny") as trace:

        def both(observed):
            trace(observed)
            passes.append(observed)

        result = session.generate(PROMPT, observer=both)
        trace.finish(result)
    read = losart.read_trace(file)
    assert (read.losart, read.model) == (losart.__version__, "tiny")
    assert (read.layers, read.kv_heads, read.block_length) == (4, 2, 8)
    assert read.page_size == read.options["attention"]["page_size"] == options.get("page_size", 16)
    assert read.result == json.loads(json.dumps(asdict(result)))
    assert len(read.passes) == len(passes)
    for one, other in zip(read.passes, passes, strict=True):
        np.testing.assert_equal(asdict(one), asdict(replace(other, text="")))  # the file has no text


def test_a_trace_of_an_earlier_version_is_read():
    trace = losart.read_trace(WRITTEN_BEFORE)
    assert (trace.model, trace.layers, trace.kv_heads) == ("tiny", 4, 2)
    assert (trace.page_size, trace.block_length) == (16, 4)
    assert trace.options["attention"]["method"] == "losa" and trace.result["finish_reason"] == "length"
    kinds = ["first", "commit", "first", "later", "commit", "first", "later"]
    assert [step.kind for step in trace.passes] == kinds
    step = trace.passes[3]
    assert (step.block_start, step.block, step.fixed) == (48, [56, 80, 47, 205], [2, 3])
    dense, sparse, *_ = step.layers
    assert dense.dense and dense.active.tolist() == [0, 1, 2, 3] and dense.pages[1].tolist() == [0, 1, 2]
    assert not sparse.dense and sparse.active.tolist() == [0, 1] and sparse.density == 2 / 3
    assert [pages.tolist() for pages in sparse.pages] == [[1, 2], [1, 2]]


def test_a_trace_is_written_as_by_the_version_before(tmp_path):
    """The same lines, key by key, from what is read of a file that it wrote."""
    trace, file = losart.read_trace(WRITTEN_BEFORE), tmp_path / "again.jsonl"
    attention = losart.AttentionConfig(**trace.options["attention"])
    session = SimpleNamespace(
        options=losart.GenerationConfig(**trace.options | {"attention": attention}),
        model_config=SimpleNamespace(num_layers=trace.layers, num_kv_heads=trace.kv_heads),
    )
    stats = losart.Stats(**trace.result["stats"])
    with losart.TraceWriter(file, session, trace.model) as writer:
        for step in trace.passes:
            writer(step)
        writer.finish(losart.GenerationResult(**trace.result | {"stats": stats}))
    before = WRITTEN_BEFORE.read_text().replace('"losart":"0.1.0"', f'"losart":"{losart.__version__}"')
    before = before.replace('"active":2,', '"active":2,"change_threshold":0.05,')  # an option that came later
    threshold = '"confidence_threshold":0.85,'
    options = '"reaches_threshold":false,"sub_block_length":null,"editing_threshold":1.0,"max_post_steps":16,'
    before = before.replace(threshold, threshold + options)
    since = "".join(f'"{name}":null,' for name in ("json_schema", "regex", "grammar", "logprobs"))
    before = before.replace('"seed":null,', '"seed":null,' + since)
    later = ',"rides":0,"queue_seconds":0.0,"first_token_seconds":null,"mean_sequences":1.0'  # as did these
    later += ',"kv_bytes":0,"kv_bytes_shared":0,"experts_used":null'
    before = re.sub(r'("density":[0-9.]+)}}\n$', rf'\g<1>{later}}},"logprobs":null}}\n', before)
    assert file.read_text() == before


def test_the_command_writes_a_trace(tiny_checkpoint, tmp_path, capsys):
    file = tmp_path / "run.jsonl"
    arguments = ["--prompt", "Why?" * 20, "--max-new-tokens", "8", "--attention", "quest", "--device", "cpu"]
    assert main(["generate", str(tiny_checkpoint), *arguments, "--trace", str(file)]) == 0
    trace = losart.read_trace(file)
    assert trace.model == str(tiny_checkpoint)
    assert capsys.readouterr().out == trace.result["text"] + "\n"


def test_a_wrong_prompt_leaves_an_older_trace(tiny_checkpoint, tmp_path, capsys):
    file = tmp_path / "run.jsonl"
    file.write_text("older")
    assert main(["generate", str(tiny_checkpoint), "--prompt", "", "--trace", str(file)]) == 1
    assert file.read_text() == "older"


def test_a_trace_that_cannot_be_written(tiny_checkpoint, tmp_path, capsys):
    file = tmp_path / "none" / "run.jsonl"
    arguments = ["--prompt", "x", "--device", "cpu", "--trace", str(file)]
    assert main(["generate", str(tiny_checkpoint), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("losart: ") and str(file) in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def trace_lines(model, tmp_path_factory):
    file = tmp_path_factory.mktemp("trace") / "run.jsonl"
    session = model.session(attention="quest", **OPTIONS)
    with losart.TraceWriter(file, session) as trace:
        session.generate(PROMPT, observer=trace)
    return file.read_text().splitlines(keepends=True)


def test_a_trace_without_its_end_is_read(trace_lines, tmp_path):
    file = tmp_path / "cut.jsonl"
    file.write_text("".join(trace_lines[:3]))
    trace = losart.read_trace(file)
    assert len(trace.passes) == 2 and trace.result is None


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda lines: [], 1),
        (lambda lines: ["{}\n"], 1),
        (lambda lines: ["[1]\n"], 1),
        (lambda lines: ["\x89PNG\r\n", "x"], 1),
        (lambda lines: [lines[0].replace('"losart_trace":1', '"losart_trace":2')], 1),
        (lambda lines: [lines[0].replace('"layers"', '"layer"')], 1),
        (lambda lines: [*lines[:3], lines[3][:50]], 4),
        (lambda lines: [*lines[:2], "null\n"], 3),
        (lambda lines: [*lines[:2], "{}\n"], 3),
        (lambda lines: [*lines[:2], re.sub(r'"pages":\[\[\d+', '"pages":[[999', lines[2])], 3),
        (lambda lines: [*lines[:2], re.sub(r'"pages":\[\[[\d,]+\],', '"pages":[', lines[2])], 3),
        (lambda lines: [lines[0].replace('"layers":4', '"layers":3'), *lines[1:]], 2),
    ],
)
def test_a_damaged_trace_names_file_and_line(trace_lines, tmp_path, damage, line):
    file = tmp_path / "damaged.jsonl"
    file.write_text("".join(damage(trace_lines)), encoding="latin-1")
    with pytest.raises(losart.TraceError) as error:
        losart.read_trace(file)
    assert str(error.value).startswith(f"{file}: line {line}: ")
