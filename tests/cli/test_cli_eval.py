"""The command `losart eval`: table, JSON, errors, interrupt."""

import json

import pytest

from losart.api.session import Session
from losart.cli import main
from losart.eval import TASKS
from losart.eval.vocabulary import VOCABULARY_SIZE, write_tokenizer

SMALL = ["--device", "cpu", "--lengths", "1500", "--samples", "1", "--max-new-tokens", "4"]


def test_prints_a_table_and_writes_its_figures(tiny_checkpoint, tmp_path, capsys):
    file = tmp_path / "eval.json"
    grid = ["--tasks", "key,last", "--attention", "dense,losa", "--budgets", "32,64", "--active", "0.25"]
    assert main(["eval", str(tiny_checkpoint), *SMALL, *grid, "--seed", "3", "--json", str(file)]) == 0
    output = capsys.readouterr()
    head, *rows = output.out.splitlines()
    assert head.split()[:5] == ["length", "task", "attention", "budget", "active"]
    assert [row.split()[:5] for row in rows] == [
        ["1500", task, *setting]
        for task in ("key", "last")
        for setting in (["dense", "-", "-"], ["losa", "32", "0.25"], ["losa", "64", "0.25"])
    ]
    report = json.loads(file.read_text())
    assert (report["style"], report["samples"], report["seed"]) == ("english", 1, 3)
    assert report["options"] == {"max_new_tokens": 4}
    assert [cell["budget"] for cell in report["cells"]] == [None, 32, 64] * 2
    assert all(cell["accuracy"] == 0.0 and cell["high"] > 0.5 for cell in report["cells"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json"]


def test_a_checkpoint_with_the_symbols_is_asked_in_symbols(make_checkpoint, tmp_path, capsys):
    checkpoint = make_checkpoint(vocab_size=VOCABULARY_SIZE, tokenizer=False, block_length=16)
    write_tokenizer(checkpoint)
    file = tmp_path / "eval.json"
    arguments = ["--device", "cpu", "--lengths", "128,256", "--samples", "2", "--attention", "losa"]
    assert main(["eval", str(checkpoint), *arguments, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["style"] == "symbols"
    assert [(cell["task"], cell["length"]) for cell in report["cells"]] == [
        (task, length) for length in (128, 256) for task in TASKS
    ]
    assert main(["eval", str(checkpoint), "--device", "cpu", "--lengths", "100"]) == 2
    assert "losart: lengths of symbolic prompts must be multiples of 16" in capsys.readouterr().err


def test_an_interrupt_leaves_the_cells_that_were_done(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    generate, calls = Session.generate, []

    def interrupted(self, *args, **options):
        calls.append(options)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(self, *args, **options)

    monkeypatch.setattr(Session, "generate", interrupted)
    file = tmp_path / "eval.json"
    arguments = ["--tasks", "key,last", "--attention", "dense,quest", "--json", str(file)]
    assert main(["eval", str(tiny_checkpoint), *SMALL, *arguments]) == 130
    assert "losart: interrupted" in capsys.readouterr().err
    cells = json.loads(file.read_text())["cells"]
    assert [(cell["task"], cell["attention"]) for cell in cells] == [("key", "dense"), ("key", "quest")]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tasks", "riddle"], 2, "losart: tasks must be among key, "),
        (["--attention", "dense,flash"], 2, "losart: attention must be one of dense, "),
        (["--style", "symbols"], 2, "losart: style 'symbols' needs a checkpoint with the vocabulary"),
        (["--lengths", "4096"], 2, "losart: lengths: 4096 tokens and an answer do not fit"),
        (["--json", "/nowhere/eval.json"], 1, "losart: /nowhere/eval.json: No such file or directory"),
    ],
)
def test_mistakes_are_one_line(tiny_checkpoint, capsys, arguments, code, message):
    assert main(["eval", str(tiny_checkpoint), *SMALL, *arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--lengths", "1k"], ["--active", "few"], ["--budgets", ""]])
def test_lists_that_are_none_are_usage_errors(tiny_checkpoint, capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        main(["eval", str(tiny_checkpoint), *arguments])
    assert exit.value.code == 2
    assert arguments[0] in capsys.readouterr().err
