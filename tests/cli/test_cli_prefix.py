"""`losart prefix`, and generations that begin with what it saved, in memory that is limited."""

from __future__ import annotations

import argparse
import json

import pytest

import losart
from losart.cli import main
from losart.cli.engines import memory

DOCUMENT = "The quick brown fox jumps over the lazy dog. " * 20
SHORT = ["--device", "cpu", "--max-new-tokens", "8"]


@pytest.fixture
def saved(tiny_checkpoint, tmp_path, capsys) -> str:
    prompt, file = tmp_path / "document.txt", tmp_path / "document.kv"
    prompt.write_text(DOCUMENT)
    arguments = ["--model", str(tiny_checkpoint), "--prompt-file", str(prompt), "--device", "cpu"]
    assert main(["prefix", "save", str(file), *arguments]) == 0
    assert capsys.readouterr().out.startswith(f"{file}: ")
    return str(file)


def test_it_says_of_what_a_file_is(tiny_checkpoint, saved, capsys):
    model = losart.load(tiny_checkpoint, "cpu")
    assert main(["prefix", "show", saved, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 0 < facts["tokens"] <= len(model.tokenizer.encode(DOCUMENT))
    assert (facts["model"], facts["device"], facts["page_size"]) == (model.fingerprint, "cpu", 16)
    assert (facts["dtype"], facts["kv"]) == ("float32", "float32")
    assert main(["prefix", "show", saved]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["kv", "float32"] in shown and ["block", "length", "4"] in shown
    assert main(["prefix", "show", __file__]) == 1
    assert "not a saved prefix" in capsys.readouterr().err


@pytest.mark.parametrize("prompts", [1, 2])
def test_generate_begins_with_it(tiny_checkpoint, saved, capsys, prompts):
    texts = [f"{DOCUMENT} {number}?" for number in range(prompts)]
    asked = [part for text in texts for part in ("--prompt", text)]
    limits = ["--kv-memory", "8M", "--max-sequences", "2"]
    command = ["generate", str(tiny_checkpoint), "--prefix", saved, "--json", *SHORT, *limits]
    assert main([*command, *asked]) == 0
    printed = capsys.readouterr().out
    found = [json.loads(line) for line in printed.splitlines()] if prompts > 1 else [json.loads(printed)]
    for text, answer in zip(texts, found, strict=True):
        expected = losart.generate(tiny_checkpoint, text, device="cpu", max_new_tokens=8)
        assert answer["text"] == expected.text
        assert answer["stats"]["reused_tokens"] > 100 and not expected.stats.reused_tokens


def test_keys_and_values_in_8_bits_have_files_of_their_own(tiny_checkpoint, saved, tmp_path, capsys):
    prompt, file = tmp_path / "document.txt", str(tmp_path / "int8.kv")
    options = ["--device", "cpu", "--kv", "int8"]
    arguments = ["--model", str(tiny_checkpoint), "--prompt-file", str(prompt), *options]
    assert main(["prefix", "save", file, *arguments]) == 0
    assert main(["prefix", "show", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.split("\n", 1)[1])["kv"] == "int8"
    command = ["generate", str(tiny_checkpoint), "--prompt", f"{DOCUMENT} Why?", *SHORT, "--json"]
    assert main([*command, "--kv", "int8", "--prefix", file]) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["reused_tokens"] > 100
    for other, held, asked in ((saved, "float32", "int8"), (file, "int8", "float32")):
        kv = ["--kv", "int8"] if asked == "int8" else []
        assert main([*command, *kv, "--prefix", other]) == 1
        message = f"losart: {other}: was saved with kv {held}, and here it is {asked}\n"
        assert capsys.readouterr().err == message


def test_batch_begins_with_it(tiny_checkpoint, saved, tmp_path):
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(json.dumps({"prompt": f"{DOCUMENT} Why?"}))
    command = ["batch", str(prompts), str(answers), "--model", str(tiny_checkpoint)]
    assert main([*command, *SHORT, "--prefix", saved, "--kv-memory", "1G"]) == 0
    assert json.loads(answers.read_text())["stats"]["reused_tokens"] > 100


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["generate", "CHECKPOINT", "--prompt", "x", "--prefix", "/nowhere"],
            1,
            "losart: /nowhere: cannot be",
        ),
        (["generate", "CHECKPOINT", "--prompt", "x", "--kv-memory", "1K"], 1, "kv_memory is 1024"),
        (
            ["prefix", "save", "OUT", "--prompt-file", "/nowhere"],
            1,
            "losart: /nowhere: cannot be read: No such",
        ),
        (["prefix", "save", "OUT", "--model", "CHECKPOINT", "--prompt-file", "SHORT"], 1, "whole pages and"),
        (["batch", "/nowhere", "OUT"], 1, "losart: /nowhere: No such file or directory"),
    ],
)
def test_mistakes_are_one_line(tiny_checkpoint, tmp_path, capsys, arguments, code, message):
    (tmp_path / "short").write_text("short")
    names = {"CHECKPOINT": tiny_checkpoint, "OUT": tmp_path / "out", "SHORT": tmp_path / "short"}
    assert main([str(names.get(argument, argument)) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert message in error and error.startswith("losart: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("512M", 512 << 20), ("4g", 4 << 30), ("1.5 G", None), ("1.5G", 3 << 29), ("2KiB", 2048)]
    + [(wrong, None) for wrong in ("", "0", "4X", "-1G", "G", "0.1", "1e9", "4 GB x")],
)
def test_memory_is_said_in_units(text, size):
    if size is None:
        with pytest.raises(argparse.ArgumentTypeError, match="must be bytes, such as 512M or 4G, not"):
            memory(text)
    else:
        assert memory(text) == size
