"""`losart chat`: lines from a pipe, and at a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from test_cli import COMMAND

import losart
from losart.cli import main

SHORT = ["--device", "cpu", "--max-new-tokens", "20", "--stop-token-ids"]
ENDLESS = ["--device", "cpu", "--max-new-tokens", "3900", "--stop-token-ids"]


def feed(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_each_line_is_a_turn(tiny_checkpoint, capsys, monkeypatch):
    feed(monkeypatch, "Why?\n\n  Who?  \n/reset\nWhy?\n/system Be brief.\nWhy?\n/quit\nnever said\n")
    assert main(["chat", str(tiny_checkpoint), *SHORT]) == 0
    chat = losart.Chat(losart.load(tiny_checkpoint, "cpu"), max_new_tokens=20, stop_token_ids=[])
    expected = [chat.say("Why?"), chat.say("Who?")]
    chat.reset()
    expected.append(chat.say("Why?"))
    chat.system = "Be brief."
    expected.append(chat.say("Why?"))
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in expected)


def test_options_and_figures(tiny_checkpoint, capsys, monkeypatch):
    feed(monkeypatch, "Why?\nWho?")
    attention = ["--attention", "losa", "--budget", "16", "--active", "0.5"]
    assert main(["chat", str(tiny_checkpoint), "--system", "Be brief.", "--stats", *SHORT, *attention]) == 0
    chat = losart.Chat(
        losart.load(tiny_checkpoint, "cpu"),
        "Be brief.",
        max_new_tokens=20,
        stop_token_ids=[],
        attention="losa",
        budget=16,
        active=0.5,
    )
    answers = [chat.say("Why?"), chat.say("Who?")]
    printed = capsys.readouterr()
    assert printed.out == "".join(f"{answer}\n" for answer in answers)
    figures = re.findall(r"prompt tokens +(\d+): (\d+) reused, (\d+) prefilled", printed.err)
    stats = [answer.stats for answer in answers]
    expected = [(s.prompt_tokens, s.reused_tokens, s.prefilled_tokens) for s in stats]
    assert [tuple(map(int, figure)) for figure in figures] == expected
    assert expected[1][1] > 0
    assert printed.err.count("tokens per second") == printed.err.count("density") == 2


def test_json_is_a_line_for_each_answer(tiny_checkpoint, capsys, monkeypatch):
    feed(monkeypatch, "Why?\n/reset\nWho?\n")
    assert main(["chat", str(tiny_checkpoint), *SHORT, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    chat = losart.Chat(losart.load(tiny_checkpoint, "cpu"), max_new_tokens=20, stop_token_ids=[])
    expected = [chat.say("Why?")]
    chat.reset()
    expected.append(chat.say("Who?"))
    assert [(a["text"], a["token_ids"], a["finish_reason"]) for a in answers] == [
        (e.text, e.token_ids, e.finish_reason) for e in expected
    ]
    assert [a["stats"]["prompt_tokens"] for a in answers] == [e.stats.prompt_tokens for e in expected]


@pytest.mark.parametrize(
    ("arguments", "said", "code", "message"),
    [
        (["no/such/directory"], "", 1, "no/such/directory"),
        (["CHECKPOINT", "--top-p", "2"], "", 2, "top_p"),
        (["CHECKPOINT"], b"\xff\xfe\n", 1, "not valid Unicode"),
        (["CHECKPOINT"], "x" * 5000, 1, "positions"),
        (["CHECKPOINT"], "/nonsense", 0, "there is no /nonsense"),
        (["CHECKPOINT"], "/System x", 0, None),
        (["CHECKPOINT"], "/etc/passwd", 0, None),
        (["CHECKPOINT"], "", 0, None),
    ],
)
def test_mistakes_give_one_line_and_a_code(
    tiny_checkpoint, capsys, monkeypatch, arguments, said, code, message
):
    feed(monkeypatch, said)
    arguments = [str(tiny_checkpoint) if argument == "CHECKPOINT" else argument for argument in arguments]
    assert main(["chat", *arguments, "--device", "cpu", "--max-new-tokens", "4"]) == code
    error = capsys.readouterr().err
    if message is None:
        assert error == ""
    else:
        assert message in error and error.startswith("losart: ") and error.count("\n") == 1


def test_a_checkpoint_without_a_template(make_checkpoint, capsys, monkeypatch):
    feed(monkeypatch, "Why?")
    assert main(["chat", str(make_checkpoint(tokenizer=False)), "--device", "cpu"]) == 1
    assert "a chat needs a tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(("closed", "said"), [("<&-", 0), ("</dev/null", 0), (">&- 2>&- <&-", 0)])
def test_closed_streams(tiny_checkpoint, closed, said):
    command = " ".join(map(repr, [*COMMAND, "chat", str(tiny_checkpoint), *SHORT]))
    result = subprocess.run(f"{command} {closed}", shell=True, capture_output=True, cwd="/")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


def test_an_interrupt_ends_a_chat_that_reads_from_a_pipe(tiny_checkpoint):
    process = subprocess.Popen(
        [*COMMAND, "chat", str(tiny_checkpoint), *ENDLESS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"Why?\n")
    process.stdin.flush()
    process.stdout.read(1)  # it has begun to answer
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error.strip()) == (130, b"losart: interrupted")


class Terminal:
    """A chat at a pseudo-terminal: what is typed, and what is shown."""

    def __init__(self, arguments: list[str]) -> None:
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            os.chdir("/")
            os.execve(sys.executable, [*COMMAND, *arguments], os.environ | {"TERM": "dumb"})
        self._unread = b""

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def until(self, wanted: str, seconds: float = 30) -> str:
        """What is shown up to and with `wanted`."""
        end = time.monotonic() + seconds
        while wanted.encode() not in self._unread:
            data = self._read(end)
            assert data, f"{wanted!r} is not shown, but {self._unread!r}"
            self._unread += data
        shown, _, self._unread = self._unread.partition(wanted.encode())
        return shown.decode(errors="replace") + wanted

    def _read(self, end: float) -> bytes:
        """What comes next; nothing at the end of it, or when the time has come."""
        if not select.select([self._file], [], [], max(0.0, end - time.monotonic()))[0]:
            return b""
        try:
            return os.read(self._file, 65536)
        except OSError:  # Linux's end of a terminal
            return b""

    def interrupt(self, wanted: str, seconds: float = 5) -> str:
        """Press Ctrl-C while it waits for a line; what is shown up to and with `wanted`.

        A second press may be needed: a signal that comes between CPython's last look for one and its
        `select` in Modules/readline.c waits for the next.
        """
        self.type("\x03")
        try:
            return self.until(wanted, seconds)
        except AssertionError:
            self.type("\x03")
            return self.until(wanted)

    def leave(self, seconds: float = 30) -> tuple[int, str]:
        """The exit code, and the rest of what is shown."""
        end = time.monotonic() + seconds
        while data := self._read(end):
            self._unread += data
        assert time.monotonic() < end, f"it does not end, but shows {self._unread!r}"
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), self._unread.decode(errors="replace")

    def close(self) -> None:
        """End it, if it has not ended by itself."""
        os.close(self._file)
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@pytest.fixture
def terminal(tiny_checkpoint: Path) -> Iterator[Terminal]:
    shown = Terminal(["chat", str(tiny_checkpoint), "--stats", *ENDLESS])
    try:
        shown.until("/quit leaves")
        shown.until(">>> ")
        yield shown
    finally:
        shown.close()


def start_of_an_answer(terminal: Terminal, question: str) -> None:
    terminal.type(f"{question}\r")
    terminal.until(f"{question}\r\n")
    for _ in range(3):
        terminal.until("!")  # a frequent token of this model


def test_an_interrupt_stops_the_answer_and_not_the_program(terminal):
    for question in ("Why?", "Who?", "When?"):
        start_of_an_answer(terminal, question)
        terminal.type("\x03")
        assert "Traceback" not in terminal.until(">>> ")
    terminal.type("\x04")  # Ctrl-D
    code, rest = terminal.leave()
    assert code == 0 and "losart:" not in rest


def test_mistakes_cost_the_turn_and_no_more(make_checkpoint):
    # A line that is long for the model, and short for a terminal's buffer.
    terminal = Terminal(["chat", str(make_checkpoint(max_positions=128)), *SHORT])
    try:
        terminal.until(">>> ")
        terminal.type("x" * 200 + "\r")
        assert "128 positions" in terminal.until(">>> ").replace("\r\n", "")
        terminal.type("/nonsense\r")
        assert "there is no /nonsense" in terminal.until(">>> ")
        terminal.type("/quit\r")
        assert terminal.leave()[0] == 0
    finally:
        terminal.close()


def test_two_interrupts_where_nothing_is_answered_leave(terminal):
    terminal.interrupt("Ctrl-C once more")
    terminal.until(">>> ")
    shown = terminal.interrupt("losart: interrupted")
    code, rest = terminal.leave()
    assert code == 130 and "Traceback" not in shown + rest
