"""The spread of query changes over a block's tokens."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from passes import block_batch

import losart
from losart.attention import DensePolicy
from losart.cli import main
from losart.engine.batch import PassKind
from losart.errors import DataError, OptionError
from losart.eval import EvalConfig
from losart.eval.locality import KINDS, QueryChanges, measure_locality, shares, token_kinds
from losart.eval.questions import make_questions
from losart.eval.tasks import TASKS

SMALL = EvalConfig(("key",), (1500,), samples=1, options={"max_new_tokens": 16, "block_length": 8})


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return losart.load(tiny_checkpoint, device="cpu")


def test_kinds_of_tokens():
    kinds = [KINDS[kind] for kind in token_kinds(6, np.array([0, 3, 4]))]
    assert kinds == ["unmasked", "neighbours", "neighbours", "unmasked", "unmasked", "neighbours"]
    assert (token_kinds(4, np.array([], int)) == KINDS.index("others")).all()


def test_shares_by_hand():
    change = np.array([1.0, 0.0, 5.0, 2.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    kinds = np.array([2, 1, 0, 1, 2, 2, 2, 2, 2, 2])
    top, by_change, active, tokens = np.split(shares(change, kinds), [4, 7, 10])
    assert top.tolist() == [0.5, 0.8, 1.0, 1.0]
    assert by_change.tolist() == pytest.approx([0.5, 0.2, 0.3])
    assert active.tolist() == pytest.approx([0.2, 0.2, 0.6])
    assert tokens.tolist() == pytest.approx([0.1, 0.2, 0.7])


def test_the_change_of_known_queries(monkeypatch, model):
    monkeypatch.setattr(DensePolicy, "attend", lambda *args: None)
    policy = QueryChanges(losart.AttentionConfig(), model.config, 4)
    q = np.zeros((4, 4, 32), np.float32)
    cache = SimpleNamespace(length=0)

    def attend(kind, masked):
        policy.attend(None, 0, q, None, None, block_batch(cache, 4, kind, masked=masked))

    attend(PassKind.FIRST, [0, 1, 2, 3])
    q[2], q[3] = 3.0, 1.0  # of which token 2 was unmasked
    attend(PassKind.LATER, [0, 1, 3])
    q[0] = 2.0
    attend(PassKind.LATER, [1])
    first, second = policy.rows[0]
    assert first[[0, 4, 5, 6]].tolist() == pytest.approx([0.9, 0.9, 0.1, 0.0])
    assert second[[0, 4, 5, 6]].tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0])


@pytest.mark.parametrize("block_length", [4, 8])  # commits of blocks of 4 would ride
def test_a_layer_has_a_row_for_each_later_pass(model, block_length):
    small = replace(SMALL, options=SMALL.options | {"block_length": block_length})
    *layers, every = measure_locality(model, small)
    question = next(make_questions(model, TASKS["key"], 1500, 1, 0, "english"))
    steps = list(model.stream(question.prompt, max_new_tokens=16, block_length=block_length, seed=0))
    later = len(steps) - len({step.block_start for step in steps})
    assert [layer.layer for layer in layers] == list(range(model.config.num_layers))
    assert {layer.passes for layer in layers} == {later} and every.passes == later * len(layers)
    for row in (*layers, every):
        assert 0 < row.top["1"] <= row.top["3"] <= row.top["5"] <= row.top["8"] == pytest.approx(1.0)
        for share in (row.change, row.active, row.tokens):
            assert sum(share.values()) == pytest.approx(1.0)
    # A layer's queries come from the token itself first: in layer 0 only tokens just unmasked change.
    assert layers[0].change["unmasked"] == pytest.approx(1.0)
    assert layers[-1].change["unmasked"] < 1.0
    assert every.top["3"] == pytest.approx(np.mean([layer.top["3"] for layer in layers]))


def test_pieces_of_a_text(model, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("once upon a time " * 200)
    told, config = [], replace(SMALL, lengths=(100, 50), samples=3)
    *layers, every = measure_locality(model, config, text=file, progress=lambda *ends: told.append(ends))
    assert told == [(done, 6) for done in range(1, 7)]
    assert len(layers) == model.config.num_layers and every.passes > 0
    with pytest.raises(DataError, match=r"text.txt: has \d+ tokens, not 9 times 4000"):
        measure_locality(model, replace(config, lengths=(4000,), samples=9), text=file)


def test_one_pass_a_block_has_no_change(model):
    config = EvalConfig(("key",), (1500,), samples=1, options={"max_new_tokens": 4, "denoising_steps": 1})
    with pytest.raises(OptionError, match="more than one pass"):
        measure_locality(model, config)


def test_the_command_prints_and_writes_the_layers(tiny_checkpoint, tmp_path, capsys):
    file = tmp_path / "locality.json"
    arguments = "--locality --tasks key --lengths 1500 --samples 1 --max-new-tokens 8 --block-length 8"
    assert main(["eval", str(tiny_checkpoint), *arguments.split(), "--json", str(file)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["layer", "0", "1", "2", "3", "all"]
    layers = json.loads(file.read_text())["layers"]
    assert [f"{layer['top']['1']:.1%}" for layer in layers] == [row[2] for row in rows[1:]]


@pytest.mark.parametrize("arguments", [["--attention", "losa"], ["--budgets", "64"], ["--longbench", "."]])
def test_options_that_do_not_go_together(tiny_checkpoint, capsys, arguments):
    assert main(["eval", str(tiny_checkpoint), "--locality", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"losart: {arguments[0]} ")
