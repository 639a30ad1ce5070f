"""`losart batch`, and `losart generate` with several prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import losart
from losart.cli import batch, main

PROMPTS: list[Any] = [
    {"prompt": [1, 2, 3], "id": "first"},
    {"prompt": [*range(100)], "temperature": 0.8, "seed": 4, "block_length": 5},
    {"prompt": [7] * 30, "attention": "losa", "budget": 16, "id": {"any": "thing"}},
    {"prompt": [9, 8], "max_new_tokens": 3},
]
BAD = {
    "not json": "not JSON",
    "[1]": "not a JSON object",
    '{"id": 1}': 'it has no "prompt"',
    '{"prompt": [1], "nonsense": 2, "other": 3}': "unknown keys: nonsense, other",
    '{"prompt": []}': "the prompt is empty",
    '{"prompt": [1], "block_length": 0}': "block_length must be",
    '{"prompt": 5}': "a prompt is a string",
}


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps(one) for one in PROMPTS]
    prompts.write_text("\n".join([*lines[:2], "", *lines[2:]]))  # no newline at the end
    return prompts, tmp_path / "answers.jsonl"


def run(checkpoint: Path, files: tuple[Path, Path], *options: str) -> int:
    arguments = [*map(str, files), "--model", str(checkpoint), "--device", "cpu", "--max-new-tokens", "6"]
    return main(["batch", *arguments, "--stop-token-ids", "1", *options])


def answers(files: tuple[Path, Path]) -> list[dict[str, Any]]:
    text = files[1].read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("sequences", ["1", "2", "16"])
def test_answers_are_those_of_each_prompt_alone(tiny_checkpoint, files, sequences):
    assert run(tiny_checkpoint, files, "--max-sequences", sequences) == 0
    model = losart.load(tiny_checkpoint, "cpu")
    found = answers(files)
    assert [one["line"] for one in found] == [1, 2, 4, 5]
    for values, answer in zip(PROMPTS, found, strict=True):
        options = {"max_new_tokens": 6, "stop_token_ids": [1], **values}
        prompt, name = options.pop("prompt"), options.pop("id", None)
        expected = model.generate(prompt, **options)
        assert answer["token_ids"] == expected.token_ids and answer["text"] == expected.text
        assert answer["id"] == name and answer["finish_reason"] == expected.finish_reason
        assert answer["stats"]["new_tokens"] == len(expected.token_ids)


def test_bad_lines_are_reported_and_skipped(tiny_checkpoint, files, capsys):
    files[0].write_text("\n".join([*BAD, json.dumps(PROMPTS[0]), ""]))
    assert run(tiny_checkpoint, files) == 1
    said = capsys.readouterr().err
    for number, message in enumerate(BAD.values(), start=1):
        assert f"prompts.jsonl, line {number}: {message}" in said
    assert f"{len(BAD)} of {len(BAD) + 1} prompts have no answer" in said
    assert [one["line"] for one in answers(files)] == [len(BAD) + 1]


@pytest.mark.parametrize("kept", [0, 1, 300, 10**6])
def test_it_goes_on_where_it_was_cut_short(tiny_checkpoint, files, kept, monkeypatch):
    assert run(tiny_checkpoint, files) == 0
    whole = [one["token_ids"] for one in answers(files)]
    files[1].write_bytes(files[1].read_bytes()[:kept])
    left = files[1].read_text().count("\n")
    asked = []
    submit = losart.Engine.submit
    monkeypatch.setattr(
        losart.Engine, "submit", lambda *args, **options: asked.append(1) or submit(*args, **options)
    )
    assert run(tiny_checkpoint, files) == 0
    assert [one["token_ids"] for one in answers(files)] == whole
    assert len(asked) == len(PROMPTS) - left


def test_an_interrupt_leaves_whole_lines(tiny_checkpoint, files, monkeypatch):
    write, count = batch._write, 0

    def interrupted(*args: Any) -> None:
        nonlocal count
        if (count := count + 1) == 3:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(batch, "_write", interrupted)
    assert run(tiny_checkpoint, files) == 130
    assert [one["line"] for one in answers(files)] == [1, 2]


def test_what_is_wrong_for_all_is_said_at_once(tiny_checkpoint, files, capsys):
    assert run(tiny_checkpoint, files, "--block-length", "0") == 2
    assert answers(files) == []
    assert run(tiny_checkpoint, (files[0].with_name("none.jsonl"), files[1])) == 1
    assert "none.jsonl" in capsys.readouterr().err
    before = files[0].read_bytes()
    assert run(tiny_checkpoint, (files[0], files[0])) == 1
    assert "a file of their own" in capsys.readouterr().err
    assert files[0].read_bytes() == before
    for other in (b"some notes", b"some\nnotes\n", before):
        files[1].write_bytes(other)
        assert run(tiny_checkpoint, files) == 1
        assert "not an answer of losart batch" in capsys.readouterr().err
        assert files[1].read_bytes() == other
    with pytest.raises(SystemExit):
        run(tiny_checkpoint, files, "--max-sequences", "0")


def test_several_prompts_of_generate(capsys):
    prompts = ["values?", "kaka koko"]
    model = losart.load(device="cpu")
    options = ["--device", "cpu", "--max-new-tokens", "8"]
    several = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert main(["generate", *several, *options, "--stats"]) == 0
    expected = [model.generate(prompt, max_new_tokens=8) for prompt in prompts]
    said = capsys.readouterr()
    assert said.out == "\n".join(f"{result.text}\n" for result in expected)
    assert said.err.count("tokens per second") == 2
    assert main(["generate", *several, *options, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["token_ids"] for one in found] == [result.token_ids for result in expected]
    assert main(["generate", *several, *options, "--watch"]) == 2
    assert "one prompt, not several" in capsys.readouterr().err
