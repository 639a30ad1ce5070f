"""`losart generate --watch`: one line per pass, and the block redrawn on a terminal."""

from __future__ import annotations

import importlib.util
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import losart
from losart.cli import main
from losart.cli.watch import Watch

PROMPT = "Why is the sky blue? " * 4  # a byte a token: 84
OPTIONS = {"max_new_tokens": 12, "attention": "losa", "active": 2, "budget": 16, "stop_token_ids": []}
CPU = ["--prompt", PROMPT, "--device", "cpu", "--stop-token-ids", "--watch"]
SHORT = [*CPU, "--max-new-tokens", "12", "--attention", "losa", "--active", "2", "--budget", "16"]
ENDLESS = [*CPU, "--max-new-tokens", "3000"]
LOSART = "import sys; from losart.cli import main; sys.exit(main())"
SHOWS_CURSOR, HIDES_CURSOR = "\x1b[?25h", "\x1b[?25l"
needs_rich = pytest.mark.skipif(
    importlib.util.find_spec("rich") is None, reason="rich is not installed (extra watch)"
)


@pytest.fixture(scope="module")
def observed(tiny_checkpoint):
    passes: list[losart.Step] = []
    result = losart.load(tiny_checkpoint, device="cpu").generate(PROMPT, observer=passes.append, **OPTIONS)
    return passes, result


def generate(checkpoint: Path, arguments: list[str], code: str = LOSART) -> list[str]:
    return [sys.executable, "-c", code, "generate", str(checkpoint), *arguments]


def at_a_terminal(
    command: list[str],
    act: Callable[[subprocess.Popen, str], None] = lambda process, text: None,
    term: str = "xterm",
) -> tuple[int, str]:
    """Exit code and output of a command whose streams are a terminal; `act` sees the output as it grows."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": term, "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd="/")
    os.close(theirs)
    text = ""
    try:
        while data := os.read(ours, 1 << 16):
            text += data.decode(errors="replace")
            act(process, text)
    except OSError:  # what Linux says when the other end is closed
        pass
    finally:
        os.close(ours)
    return process.wait(timeout=60), text


def test_a_line_for_each_pass_and_the_text(tiny_checkpoint, observed, capsys):
    passes, result = observed
    tokenizer = losart.load(tiny_checkpoint, device="cpu").tokenizer
    assert main(["generate", str(tiny_checkpoint), *SHORT]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    *lines, text = printed.out.split("\n", len(passes))
    assert text == f"{result}\n"
    for line, seen in zip(lines, passes, strict=True):
        assert line.startswith(f"block at {seen.block_start}, {seen.kind} pass: ")
        assert f" {seen.block.count(None)} of 4 masked, " in line
        assert f", density {seen.density:.1%}; " in line
        assert f"; fixed: {' '.join(map(str, seen.fixed)) or '-'}; " in line
        active = re.search(r"active, of 4 layers: ([\d ]+);", line)[1].split()
        assert active == [str(sum(i in layer.active for layer in seen.layers)) for i in range(4)]
        read, pages = re.search(r"([\d.]+) of (\d+) pages read", line).groups()
        lists = [pages for layer in seen.layers for pages in layer.pages]
        assert float(read) == pytest.approx(sum(map(len, lists)) / len(lists), abs=0.051)
        assert int(pages) == -(-seen.block_start // 16)
        words = ["_" if token is None else repr(tokenizer.decode([token])) for token in seen.block]
        assert line.endswith(f"; block: {' '.join(words)}")


def test_a_line_says_why_tokens_were_active(tiny_checkpoint, capsys):
    arguments = [*SHORT[: SHORT.index("--active")], "--budget", "16", "--change-threshold", "0.05"]
    passes: list[losart.Step] = []
    options = {key: value for key, value in OPTIONS.items() if key != "active"} | {"change_threshold": 0.05}
    losart.load(tiny_checkpoint, device="cpu").generate(PROMPT, observer=passes.append, **options)
    assert main(["generate", str(tiny_checkpoint), *arguments]) == 0
    lines = capsys.readouterr().out.split("\n", len(passes))[:-1]
    assert {seen.kind for seen in passes} == {"first", "later", "commit"}
    for line, seen in zip(lines, passes, strict=True):
        found = re.search(
            r"; largest change of the query, active above 0.05: (\S+ \S+ \S+ \S+); block: ", line
        )
        assert bool(found) == (seen.kind == "later")
        if found:
            largest = np.max([layer.change for layer in seen.layers], axis=0)
            assert found[1].split() == [f"{change:.2g}" for change in largest]
            active = [int(count) for count in re.search(r"layers: ([\d ]+);", line)[1].split()]
            assert [count > 0 for count in active] == (largest > 0.05).tolist()


def test_watching_goes_with_a_trace(tiny_checkpoint, observed, tmp_path, capsys):
    file = tmp_path / "run.jsonl"
    assert main(["generate", str(tiny_checkpoint), *SHORT, "--trace", str(file)]) == 0
    assert len(losart.read_trace(file).passes) == len(observed[0])
    assert capsys.readouterr().out.count("block at ") == len(observed[0])


def test_a_checkpoint_without_a_tokenizer_shows_ids(make_checkpoint):
    model = losart.load(make_checkpoint(tokenizer=False), device="cpu")
    passes: list[losart.Step] = []
    result = model.generate([1, 2, 3, 4], observer=passes.append, max_new_tokens=4, stop_token_ids=[])
    assert Watch(None, losart.AttentionConfig()).words(passes[-1]) == [
        str(token) for token in result.token_ids
    ]


def test_not_together_with_json(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["generate", "x", "--watch", "--json"])
    assert exit_.value.code == 2
    assert "--json: not allowed with argument --watch" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_traceback(tiny_checkpoint):
    command = generate(tiny_checkpoint, ENDLESS)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith(b"block at ")
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1


def test_a_terminal_without_rich_has_lines(tiny_checkpoint, observed):
    without_rich = f"import sys; sys.modules['rich'] = None; {LOSART}"
    code, text = at_a_terminal(generate(tiny_checkpoint, SHORT, without_rich))
    assert code == 0
    assert text.count("losart: rich is not installed") == 1 and "pip install 'losart[watch]'" in text
    assert text.count("block at ") == len(observed[0])


@needs_rich
def test_a_terminal_has_a_drawing_and_then_the_text(tiny_checkpoint, observed):
    passes, result = observed
    code, text = at_a_terminal(generate(tiny_checkpoint, SHORT))
    assert code == 0
    for seen in passes:
        assert f"block at {seen.block_start}, {seen.kind} pass: {seen.block.count(None)} of 4 masked" in text
    assert "\x1b[1;32m'" in text and "fixed in this pass" in text and "4/4" in text and "0/4" in text
    drawings, end = text.rsplit(SHOWS_CURSOR, 1)
    assert HIDES_CURSOR in drawings
    assert re.sub(r"\x1b\[\d*[A-Z]|\r", "", end) == f"{result}\n"


@needs_rich
def test_a_terminal_that_cannot_redraw_has_lines(tiny_checkpoint, observed):
    code, text = at_a_terminal(generate(tiny_checkpoint, SHORT), term="dumb")
    assert (code, text.count("block at ")) == (0, len(observed[0]))
    assert HIDES_CURSOR not in text


@needs_rich
def test_an_interrupt_leaves_the_terminal_as_it_was(tiny_checkpoint):
    sent = []

    def interrupt(process: subprocess.Popen, text: str) -> None:
        if not sent and "pages read" in text:
            sent.append(process.send_signal(signal.SIGINT))

    code, text = at_a_terminal(generate(tiny_checkpoint, ENDLESS), interrupt)
    assert code == 130 and "Traceback" not in text
    assert text.rindex(SHOWS_CURSOR) > text.rindex(HIDES_CURSOR)
    assert text.endswith("losart: interrupted\r\n")
