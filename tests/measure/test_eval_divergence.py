"""How far a model's distributions are from another one's."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import losart
from losart.cli import main
from losart.errors import DataError, OptionError
from losart.eval import EvalConfig
from losart.eval.divergence import divergences, measure_divergence
from losart.eval.questions import make_questions
from losart.eval.tasks import TASKS

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "head_dim": 16, "dtype": "bfloat16"}
OPTIONS = {"max_new_tokens": 24, "block_length": 8, "stop_token_ids": []}
SMALL = EvalConfig(("key",), (1500,), ("dense", "losa"), (64,), samples=2, options=OPTIONS)


@pytest.fixture
def checkpoint(make_checkpoint):
    return make_checkpoint(**SIZES)


def logits(rows):
    return arrays(np.float32, (rows, 7), elements=st.floats(-30, 30, width=32))


@given(logits(3), logits(3), st.integers(0, 6))
def test_divergences_are_what_they_are_called(reference, found, masked):
    reference[:, masked] = found[:, masked] = -np.inf
    kl, agree = divergences(reference, found)
    for row in range(3):
        others = [token for token in range(7) if token != masked]
        p, q = (np.exp(x[row, others].astype(np.float64)) for x in (reference, found))
        p, q = p / p.sum(), q / q.sum()
        assert kl[row] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-9, abs=1e-12)
        assert agree[row] == (reference[row].argmax() == found[row].argmax())
    same, agree = divergences(found, found)
    assert not same.any() and agree.all()


def test_a_token_that_only_the_reference_takes_for_possible():
    reference, found = np.float32([[0, 0, -np.inf]]), np.float32([[0, -np.inf, 0]])
    kl, _ = divergences(reference, found)
    assert kl[0] == np.inf


def test_a_model_is_not_far_from_itself(checkpoint):
    model = losart.load(checkpoint, "cpu")
    dense, sparse = measure_divergence(model, model, SMALL)
    assert (dense.attention, dense.mean, dense.high, dense.agreement) == ("dense", 0.0, 0.0, 1.0)
    assert (sparse.attention, sparse.budget, sparse.active) == ("losa", 64, "auto")
    assert sparse.mean > 0 and sparse.agreement <= 1.0
    # 24 tokens of 2 prompts, and each was masked in one pass at least.
    assert dense.samples == 2 and dense.positions == sparse.positions >= 48


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_settings_share_a_prompt_s_keys_and_values(checkpoint, tmp_path, kv):
    """Each is what it is alone, though those before it have written their answers behind the same prompt.

    But to rounding: the last tokens of a prompt that ends amid a page are prefilled anew.
    """
    reference, model = losart.load(checkpoint, "cpu"), losart.load(checkpoint, "cpu", kv=kv)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(map(str, range(1000))))
    methods, config = ("quest", "losa", "sparsed", "dense"), replace(SMALL, lengths=(110,), budgets=(16,))

    def figures(*attention):
        rows = measure_divergence(reference, model, replace(config, attention=attention), text=file)
        names = ("mean", "high", "agreement", "sparse_density", "active_fraction")
        return [[np.nan if (x := getattr(row, name)) is None else x for name in names] for row in rows]

    together = figures(*methods)
    for method, row in zip(methods, together, strict=True):
        assert row == pytest.approx(*figures(method), rel=1e-4, nan_ok=True)
    (*_, density, active), (*_, of_dense, _) = together[1], together[3]
    assert 0 < density < 0.5 and 0 < active < 1 and np.isnan(of_dense)


def test_the_way_is_the_reference_s(checkpoint):
    """As many positions as the reference's own generations have masked."""
    reference, model = losart.load(checkpoint, "cpu"), losart.load(checkpoint, "cpu", weights="int4")
    config = EvalConfig(("key",), (1500,), ("dense",), samples=1, options=OPTIONS)
    (row,) = measure_divergence(reference, model, config)
    (question,) = make_questions(reference, TASKS["key"], 1500, 1, 0, "english")
    steps = list(reference.stream(question.prompt, **OPTIONS))
    assert row.positions == sum(step.block.count(None) + len(step.fixed) for step in steps)


def test_fewer_bits_are_farther_off(checkpoint):
    reference = losart.load(checkpoint, "cpu")
    config = EvalConfig(("key",), (1500,), ("dense",), samples=2, options=OPTIONS)
    found = {
        weights: measure_divergence(reference, losart.load(checkpoint, "cpu", weights=weights), config)[
            0
        ].mean
        for weights in ("int8", "fp8", "int4")
    }
    assert 0 < found["int8"] < found["fp8"] < found["int4"] < 1


def test_keys_and_values_in_8_bits(checkpoint):
    reference = losart.load(checkpoint, "cpu")
    config = EvalConfig(("key",), (1500,), ("dense",), samples=2, options=OPTIONS)
    int8, fp8 = (
        measure_divergence(reference, losart.load(checkpoint, "cpu", kv=kv), config)[0].mean
        for kv in ("int8", "fp8")
    )
    assert 0 < int8 < fp8 < 1


def test_pieces_of_a_text(checkpoint, tmp_path):
    model, file = losart.load(checkpoint, "cpu"), tmp_path / "text.txt"
    file.write_text("once upon a time " * 40)
    tokens = len(model.tokenizer.encode(file.read_text()))
    config = EvalConfig(("key",), (300,), ("dense",), samples=tokens // 300, options=OPTIONS)
    told = []
    (row,) = measure_divergence(model, model, config, text=file, progress=lambda *ends: told.append(ends))
    assert row.samples == tokens // 300 and told[-1] == (row.samples, row.samples)
    config = EvalConfig(("key",), (300,), ("dense",), samples=tokens // 300 + 1, options=OPTIONS)
    with pytest.raises(DataError, match=rf"text.txt: has {tokens} tokens, not {tokens // 300 + 1} times 300"):
        measure_divergence(model, model, config, text=file)


def test_a_text_that_is_none(checkpoint, tmp_path):
    model, file = losart.load(checkpoint, "cpu"), tmp_path / "text.bin"
    file.write_bytes(b"some" * 1000 + b"\xff")
    with pytest.raises(DataError, match=r"text.bin: is no text in UTF-8"):
        measure_divergence(model, model, EvalConfig(("key",), (2000,), ("dense",), samples=3), text=file)


def test_models_that_prefill_in_pieces_of_their_own(checkpoint, monkeypatch):
    reference, model = losart.load(checkpoint, "cpu"), losart.load(checkpoint, "cpu")
    expected = measure_divergence(reference, model, SMALL)
    for one in (reference, model):
        monkeypatch.setattr(one._engine.runner.backend, "prefill_tokens", 2048)
        assert measure_divergence(reference, model, SMALL) == pytest.approx(expected)
        monkeypatch.undo()


def test_models_of_different_vocabularies(checkpoint, make_checkpoint):
    model = losart.load(checkpoint, "cpu")
    other = losart.load(make_checkpoint(**SIZES, vocab_size=512), "cpu")
    with pytest.raises(OptionError, match="the reference has 512 tokens, and the model 320"):
        measure_divergence(other, model, SMALL)


def test_command(checkpoint, tmp_path, capsys):
    file = tmp_path / "kl.json"
    arguments = [
        "--device",
        "cpu",
        "--lengths",
        "1500",
        "--samples",
        "1",
        "--tasks",
        "key",
        "--max-new-tokens",
        "8",
    ]
    arguments += ["--attention", "dense,quest", "--json", str(file)]
    assert main(["eval", str(checkpoint), "--kl", "--weights", "int4", *arguments]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[-8:] == ["mean", "KL", "99%", "KL", "same", "token", "sparse", "active"]
    assert [row.split()[1] for row in rows] == ["dense", "quest"]
    report = json.loads(file.read_text())
    assert report["weights"] == ["bfloat16", "int4", "int8"] and report["reference_weights"] == ["bfloat16"]
    assert (report["kv"], report["reference_kv"]) == ("bfloat16", "bfloat16")
    assert report["reference"] == str(checkpoint)
    assert [row["attention"] for row in report["rows"]] == ["dense", "quest"]
    assert main(["eval", str(checkpoint), *arguments, "--kl", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    # Without --weights too, the reference is another model.
    for reference in ([], [str(checkpoint)]):
        assert main(["eval", str(checkpoint), "--kv", "int8", *arguments, "--kl", *reference]) == 0
        report = json.loads(file.read_text())
        assert (report["weights"], report["reference_weights"]) == (["bfloat16"], ["bfloat16"])
        assert (report["kv"], report["reference_kv"]) == ("int8", "bfloat16")
        assert report["rows"][0]["attention"] == "dense" and report["rows"][0]["mean"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text", "some.txt"], "--text is for --kl"),
        (["--kl", "--locality"], "exclude each other"),
        (["--kl", "--longbench", "folder"], "exclude each other"),
    ],
)
def test_options_that_do_not_go_together(checkpoint, capsys, arguments, says):
    assert main(["eval", str(checkpoint), *arguments]) == 2
    assert says in capsys.readouterr().err
