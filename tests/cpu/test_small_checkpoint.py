"""The checkpoint that comes with losart: it is what is used where no model is named, and it answers."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

import losart
from losart.cli import main
from losart.errors import CheckpointError
from losart.eval import TASKS, EvalConfig, evaluate
from losart.eval.questions import make_questions

DIRECTORY = Path(losart.__file__).parent / "small_checkpoint"


@pytest.fixture(scope="module")
def model():
    return losart.load(device="cpu")


@pytest.fixture(scope="module")
def question(model):
    return next(make_questions(model, TASKS["keys-2"], 512, 1, 0, "symbols"))


def test_it_answers(model):
    cells = evaluate(model, EvalConfig(("key", "keys-4"), (256,), ("dense", "losa"), samples=6))
    assert len(cells) == 4 and all(cell.right >= 5 for cell in cells)


@pytest.mark.parametrize("attention", ["dense", "losa"])
def test_evaluation_prefills_a_document_once(model, attention):
    """And its figures are those of each question asked by itself."""
    (cell,) = evaluate(model, EvalConfig(("key",), (256,), (attention,), (64,), samples=3))
    asked = list(make_questions(model, TASKS["key"], 256, 3, 0, "symbols"))
    assert cell.prefilled_tokens == 256 + 2 * 16
    setting = {"attention": attention} | ({} if attention == "dense" else {"budget": 64})
    alone = [model.generate(one.prompt, max_new_tokens=16, **setting) for one in asked]
    right = sum(one.is_right(answer.text) for one, answer in zip(asked, alone, strict=True))
    assert cell.right == right
    assert cell.passes_per_question == sum(one.stats.forward_passes for one in alone) / 3
    assert cell.density == pytest.approx(sum(one.stats.density for one in alone) / 3, rel=0.02)


def test_no_model_is_that_of_its_directory(model, question):
    answer = model.generate(question.prompt)
    assert answer.finish_reason == "stop"
    assert losart.generate(None, question.prompt, device="cpu").token_ids == answer.token_ids
    assert losart.generate(DIRECTORY, question.prompt, device="cpu").token_ids == answer.token_ids


def test_a_model_is_never_taken_for_a_prompt(question):
    with pytest.raises(TypeError, match="prompt"):
        losart.generate(question.prompt)
    with pytest.raises(CheckpointError, match="no such directory"):
        losart.generate("Why?", question.prompt)


@pytest.mark.parametrize("source", ["--prompt", "--prompt-file", "stdin"])
def test_generate_without_a_model(question, tmp_path, capsys, monkeypatch, source):
    file = tmp_path / "prompt.txt"
    file.write_text(question.prompt)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(question.prompt.encode())))
    given = {"--prompt": [question.prompt], "--prompt-file": [str(file)]}.get(source)
    assert main(["generate", *([source, *given] if given else []), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{question.answer}\n"


def test_words_that_it_does_not_know_are_no_silent_nonsense(capsys):
    assert main(["generate", "--device", "cpu", "--prompt", "Why is the sky blue?"]) == 0
    error = capsys.readouterr().err
    assert error.startswith("losart: 2 of 6 words of the prompt are unknown to the small checkpoint")
    assert error.count("\n") == 1


def test_a_model_may_follow_the_options(tiny_checkpoint, capsys):
    options = ["--device", "cpu", "--prompt", "Why?", "--max-new-tokens", "8"]
    assert main(["generate", *options, str(tiny_checkpoint)]) == 0
    expected = losart.generate(tiny_checkpoint, "Why?", device="cpu", max_new_tokens=8)
    assert capsys.readouterr().out == f"{expected}\n"


def test_says_that_it_waits_for_a_prompt_at_a_terminal(capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b""))
    stdin.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["generate", "--device", "cpu"]) == 1
    waiting, error = capsys.readouterr().err.splitlines()
    assert "standard input" in waiting and error == "losart: the prompt is empty"


def test_inspect_without_a_model(capsys):
    assert main(["inspect", "--json", "--device", "cpu"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["path"] == str(DIRECTORY)
    assert (facts["block_length"], facts["dtype_on_disk"]) == (16, ["bfloat16"])
    assert f"{facts['parameters']:,} parameters" in (DIRECTORY / "README.md").read_text("utf-8")


def test_eval_without_a_model(tmp_path, capsys):
    file = tmp_path / "eval.json"
    arguments = ["--tasks", "key", "--lengths", "256", "--samples", "4", "--attention", "dense,losa"]
    assert main(["eval", *arguments, "--budgets", "64", "--device", "cpu", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert (report["model"], report["style"]) == ("small_checkpoint", "symbols")
    assert [cell["right"] >= 3 for cell in report["cells"]] == [True, True]


def test_chat_needs_a_model(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["chat"])
    assert exit_.value.code == 2
    assert "the following arguments are required: MODEL" in capsys.readouterr().err
