"""What the README shows first: a document that ships, a question about it, and the answer."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from pages import ROOT
from symbol_solver import solve

import losart
from losart.cli import main
from losart.loaders import smollm2

DOCUMENT = ROOT / "examples" / "document.txt"
ENGLISH = ROOT / "examples" / "english.txt"
SCRIPT = ROOT / "examples" / "write_document.py"
README = (ROOT / "README.md").read_text("utf-8")


def write_document(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, cwd="/")


def test_the_first_command_answers_right(capsys, monkeypatch):
    commands, shown = re.findall(r"^```(?:sh)?\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)[:2]
    program, *arguments = shlex.split(commands.splitlines()[-1])
    assert program == ".venv/bin/losart"
    monkeypatch.chdir(ROOT)
    assert main([*arguments, "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    answer, *figures = shown.splitlines()
    assert printed.out == f"{answer}\n" == f"{solve(DOCUMENT.read_text('utf-8'))}\n"
    assert [line[:18] for line in printed.err.splitlines()] == [line[:18] for line in figures]
    assert f"prompt tokens      {4096}: " in printed.err


def test_its_facts_are_those_that_the_readme_tells():
    document = " ".join(DOCUMENT.read_text("utf-8").split())
    quoted = re.findall(r"`(\w+-\w+: \w+-\w+\.|\w+-\w+ >+ \?+)`", README)
    assert len(quoted) == 2 and all(text in document for text in quoted)


def test_the_script_writes_the_document():
    (arguments,) = re.findall(r"write_document\.py (.*) > examples/document\.txt", SCRIPT.read_text("utf-8"))
    result = write_document(*arguments.split())
    assert result.returncode == 0
    assert result.stdout == DOCUMENT.read_text("utf-8")
    assert result.stderr.strip() == solve(result.stdout)


def test_documents_of_other_tasks_and_lengths():
    result = write_document("--task", "keys-4", "--tokens", "512", "--seed", "3")
    tokenizer = losart.load(device="cpu").tokenizer
    assert len(tokenizer.encode(result.stdout)) == 512
    assert result.stderr.strip() == solve(result.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "100"], "must be multiples of 16"),
        (["--task", "riddle"], "invalid choice: 'riddle'"),
        (["--seed", "-1"], "non-negative"),
    ],
)
def test_mistakes_of_the_script(arguments, message):
    result = write_document(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.skipif(not smollm2.directory().is_dir(), reason="losart fetch smollm2 has not been run")
def test_a_question_in_english(capsys, monkeypatch):
    (arguments,) = re.findall(r"write_document\.py (--english .*) > english\.txt", SCRIPT.read_text("utf-8"))
    written = write_document(*arguments.split())
    assert written.stdout == ENGLISH.read_text("utf-8")
    (command,) = re.findall(r"^\.venv/bin/losart (generate smollm2 .*)$", README, re.MULTILINE)
    monkeypatch.chdir(ROOT)
    assert main([*shlex.split(command), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == written.stderr  # the answer
