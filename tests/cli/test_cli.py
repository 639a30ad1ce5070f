"""The command line: output, exit codes, messages."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import losart
from losart.cli import main
from losart.cli.main import parser

COMMAND = [sys.executable, "-c", "import sys; from losart.cli import main; sys.exit(main())"]
PROMPT = "Why is the sky blue?"


def test_prints_the_text_of_the_library(tiny_checkpoint, capsys):
    assert main(["generate", str(tiny_checkpoint), "--prompt", PROMPT, "--max-new-tokens", "20"]) == 0
    expected = losart.generate(tiny_checkpoint, PROMPT, max_new_tokens=20)
    assert capsys.readouterr().out == f"{expected}\n"


def test_passes_every_option_on(tiny_checkpoint, capsys):
    arguments = (
        "--max-new-tokens 20 --block-length 5 --denoising-steps 3 --remasking entropy_bounded "
        "--confidence-threshold 0.5 --eb-threshold 0.7 --temperature 0.9 --top-k 20 --top-p 0.9 --seed 3 "
        "--stop zzz --stop-token-ids --attention losa --budget 16 --active 0.4 --page-size 32 "
        "--dense-layers 1 --first-pass dense --commit sparse "
        "--selector anchor --drift refresh --candidates masked --planner host --device cpu --dtype bfloat16"
    )
    assert main(["generate", str(tiny_checkpoint), "--prompt", PROMPT * 9, *arguments.split()]) == 0
    expected = losart.generate(
        tiny_checkpoint,
        PROMPT * 9,
        device="cpu",
        dtype="bfloat16",
        max_new_tokens=20,
        block_length=5,
        denoising_steps=3,
        remasking="entropy_bounded",
        confidence_threshold=0.5,
        eb_threshold=0.7,
        temperature=0.9,
        top_k=20,
        top_p=0.9,
        seed=3,
        stop=["zzz"],
        stop_token_ids=[],
        attention="losa",
        budget=16,
        active=0.4,
        page_size=32,
        dense_layers=1,
        first_pass="dense",
        commit="sparse",
        selector="anchor",
        drift="refresh",
        candidates="masked",
    )
    assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize(
    "command",
    [
        "generate CHECKPOINT --prompt x",
        "generate CHECKPOINT --prompt x --prompt y",
        "batch FILE OUT --model CHECKPOINT",
        "chat CHECKPOINT",
        "prefix save OUT --model CHECKPOINT --prompt-file FILE",
        "bench CHECKPOINT",
        "eval CHECKPOINT",
        "eval CHECKPOINT --longbench DIR --tasks qasper",
        "eval CHECKPOINT --locality",
        "eval CHECKPOINT --kl",
    ],
)
def test_kv_reaches_the_model(tiny_checkpoint, tmp_path, monkeypatch, capsys, command):
    (tmp_path / "file").write_text("{}")
    names = {
        "CHECKPOINT": tiny_checkpoint,
        "FILE": tmp_path / "file",
        "OUT": tmp_path / "out",
        "DIR": tmp_path,
    }
    arguments = [str(names.get(argument, argument)) for argument in command.split()]
    seen = []

    def noting(*_, kv, **__):
        seen.append(kv)
        raise losart.DeviceError("no device today")

    monkeypatch.setattr("losart.cli.progress.load", noting)
    for kv in ("int8", "fp8", "auto"):
        assert main([*arguments, "--kv", kv]) == 1
        assert capsys.readouterr().err.endswith("losart: no device today\n")
    assert main(arguments) == 1
    assert seen == ["int8", "fp8", "auto", "auto"]
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--kv", "int4"])
    assert exit_.value.code == 2
    assert "argument --kv: invalid choice: 'int4'" in capsys.readouterr().err


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_generates_with_keys_and_values_in_8_bits(tiny_checkpoint, capsys, kv):
    command = ["generate", str(tiny_checkpoint), "--prompt", PROMPT * 20, "--max-new-tokens", "8", "--json"]
    assert main([*command, "--kv", kv, "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = losart.generate(tiny_checkpoint, PROMPT * 20, device="cpu", kv=kv, max_new_tokens=8)
    assert found["token_ids"] == expected.token_ids
    assert found["stats"]["kv_bytes"] == expected.stats.kv_bytes


def test_stats_go_to_standard_error(tiny_checkpoint, capsys):
    assert (
        main(["generate", str(tiny_checkpoint), "--prompt", PROMPT, "--stats", "--max-new-tokens", "8"]) == 0
    )
    printed = capsys.readouterr()
    assert "tokens per second" in printed.err
    assert "tokens per second" not in printed.out


def test_chat_renders_the_template(tiny_checkpoint, capsys):
    assert (
        main(["generate", str(tiny_checkpoint), "--chat", "--prompt", PROMPT, "--max-new-tokens", "8"]) == 0
    )
    messages = [{"role": "user", "content": PROMPT}]
    assert capsys.readouterr().out == f"{losart.generate(tiny_checkpoint, messages, max_new_tokens=8)}\n"


@pytest.mark.parametrize("option", [[], ["--prompt-file", "-"]])
def test_reads_standard_input(tiny_checkpoint, capsys, monkeypatch, option):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert main(["generate", str(tiny_checkpoint), "--max-new-tokens", "8", *option]) == 0
    assert capsys.readouterr().out == f"{losart.generate(tiny_checkpoint, PROMPT, max_new_tokens=8)}\n"


def test_reads_a_file(tiny_checkpoint, tmp_path, capsys):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    assert main(["generate", str(tiny_checkpoint), "--prompt-file", str(file), "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == f"{losart.generate(tiny_checkpoint, PROMPT, max_new_tokens=8)}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no/such/directory", "--prompt", "x"], 1, "no/such/directory"),
        (["CHECKPOINT", "--prompt", ""], 1, "empty"),
        (
            ["CHECKPOINT", "--prompt-file", "no-such-file"],
            1,
            "losart: no-such-file: cannot be read: No such file",
        ),
        (["CHECKPOINT", "--prompt-file", "BINARY"], 1, "UTF-8"),
        (["CHECKPOINT", "--prompt", "x" * 5000], 1, "positions"),
        (["CHECKPOINT", "--prompt", "x", "--top-p", "2"], 2, "top_p"),
        (["CHECKPOINT", "--prompt", "x", "--page-size", "7"], 2, "page_size"),
        (["CHECKPOINT", "--prompt", "x", "--attention=sparsed", "--first-pass=sparse"], 2, "first_pass"),
    ],
)
def test_mistakes_give_one_line_and_a_code(tiny_checkpoint, tmp_path, capsys, arguments, code, message):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    names = {"CHECKPOINT": str(tiny_checkpoint), "BINARY": str(binary)}
    assert main(["generate", *(names.get(argument, argument) for argument in arguments)]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("losart: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["chat"], ["nonsense"], ["generate", "x", "--remasking", "y"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: losart" in capsys.readouterr().err


@pytest.mark.parametrize(("active", "value"), [("3", 3), ("0.4", 0.4), ("1.0", 1.0), ("1e-1", 0.1)])
def test_active_is_a_count_or_a_fraction(active, value):
    parsed = parser().parse_args(["generate", "x", "--active", active]).active
    assert (parsed, type(parsed)) == (value, type(value))


def test_active_that_is_neither(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "x", "--active", "few"])
    assert "argument --active: must be a count of tokens" in capsys.readouterr().err


def test_help_and_version(capsys):
    commands = (
        "generate",
        "chat",
        "eval",
        "plot",
        "bench",
        "footprint",
        "inspect",
        "quantize",
        "info",
        "prebuild",
    )
    for arguments in (["--help"], *([command, "--help"] for command in commands), ["--version"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"example: losart {command}" in printed for command in commands)
    assert losart.__version__ in printed


@pytest.mark.parametrize(
    ("closed", "arguments", "code", "message"),
    [
        (">&-", ["--prompt", PROMPT], 0, ""),
        ("2>&-", ["--prompt", PROMPT], 0, ""),
        ("2>&-", ["--prompt", PROMPT, "--top-p", "2"], 2, ""),
        ("<&-", ["--prompt", PROMPT], 0, ""),
        ("<&-", [], 1, "losart: the prompt is empty\n"),
        (">&- 2>&- <&-", ["--prompt", PROMPT], 0, ""),
    ],
)
def test_closed_streams_are_as_if_they_were_the_null_device(
    tiny_checkpoint, closed, arguments, code, message
):
    command = [*COMMAND, "generate", str(tiny_checkpoint), "--max-new-tokens", "8", *arguments]
    if "2>&-" not in closed:  # where it is closed, the warning of "auto" has to go nowhere too
        command += ["--device", "cpu"]
    result = subprocess.run(f"{shlex.join(command)} {closed}", shell=True, capture_output=True, cwd="/")
    text = str(losart.generate(tiny_checkpoint, PROMPT, max_new_tokens=8, device="cpu"))
    assert result.returncode == code
    assert result.stderr.decode() == message
    assert result.stdout.decode() == ("" if code or closed.startswith(">") else f"{text}\n")


INTERRUPTED_IMPORT = """
import sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == "losart.cli.generate":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
from losart.cli import main
sys.exit(main([]))
"""


def test_interrupt_while_the_command_is_imported():
    command = [sys.executable, "-c", INTERRUPTED_IMPORT]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert result.returncode == 130
    assert result.stderr.strip() == "losart: interrupted"


def endless(checkpoint: Path) -> list[str]:
    arguments = ["--device", "cpu", "--prompt", PROMPT, "--max-new-tokens", "3000", "--stop-token-ids"]
    return [*COMMAND, "generate", str(checkpoint), *arguments]


def test_interrupt_exits_with_130_and_no_traceback(tiny_checkpoint):
    process = subprocess.Popen(
        endless(tiny_checkpoint),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd="/",
    )
    assert process.stdout is not None
    process.stdout.read(1)  # it has begun to generate
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip() == "losart: interrupted"


def test_a_reader_that_goes_away_is_no_traceback(tiny_checkpoint):
    process = subprocess.Popen(
        endless(tiny_checkpoint), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/"
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=60) == 1
    assert error == ""


def test_json_is_the_result(tiny_checkpoint, capsys):
    arguments = ["--prompt", PROMPT, "--max-new-tokens", "8", "--attention", "losa", "--device", "cpu"]
    assert main(["generate", str(tiny_checkpoint), *arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = losart.generate(tiny_checkpoint, PROMPT, max_new_tokens=8, attention="losa", device="cpu")
    stats = printed.pop("stats")
    assert printed == {
        "text": expected.text,
        "token_ids": expected.token_ids,
        "finish_reason": expected.finish_reason,
        "logprobs": None,
    }
    assert stats["density"] == expected.stats.density and stats["new_tokens"] == expected.stats.new_tokens
    assert stats["tokens_per_second"] == pytest.approx(stats["new_tokens"] / stats["decode_seconds"])
