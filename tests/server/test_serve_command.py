"""`losart serve` as a process, with curl as its client."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from losart.cli import main

COMMAND = [
    sys.executable,
    "-c",
    "import sys; from losart.cli import main; sys.exit(main(sys.argv[1:]))",
    "serve",
]
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, and where it serves."""
    process = subprocess.Popen(
        [*COMMAND, "--port", "0", "--device", "cpu", *arguments, "--stop-token-ids"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        cwd="/",  # what is installed, not the sources in the working directory
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "serving" in line:
                yield process, line.split()[-1]
                break
        else:
            pytest.fail("it did not start")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture
def curl() -> Callable[..., str]:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")

    def run(*arguments: str) -> str:
        result = subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_curl(tiny_checkpoint, curl):
    with serving(str(tiny_checkpoint), "--name", "tiny", "--api-key", "key") as (_, url):
        key, sent = ("-H", "Authorization: Bearer key"), ("-H", "Content-Type: application/json")
        assert json.loads(curl(f"{url}/health"))["status"] == "ok"
        assert json.loads(curl(f"{url}/v1/models"))["error"]["code"] == "invalid_api_key"
        assert json.loads(curl(*key, f"{url}/v1/models"))["data"][0]["id"] == "tiny"
        answer = json.loads(curl(*key, *sent, f"{url}/v1/chat/completions", "-d", json.dumps(CHAT)))
        assert answer["usage"]["completion_tokens"] == 5
        body = json.dumps(CHAT | {"stream": True})
        lines = curl(*key, *sent, "-N", f"{url}/v1/chat/completions", "-d", body).split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        text = [json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines[:-2]]
        assert "".join(text) == answer["choices"][0]["message"]["content"]
        assert "losart_new_tokens_total 10.0" in curl(*key, f"{url}/metrics")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_answers_end(tiny_checkpoint, number):
    from served import post

    with serving(str(tiny_checkpoint), "--name", "tiny") as (process, url):
        host, _, port = url.removeprefix("http://").partition(":")
        body = json.dumps({"model": "tiny", "prompt": [1, 2], "max_tokens": 600, "stream": True}).encode()
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(post(body))
            answer = connection.recv(65536)
            while b"data:" not in answer:
                answer += connection.recv(65536)
            process.send_signal(number)
            refused = 0
            while part := connection.recv(65536):
                answer += part
                try:
                    socket.create_connection((host, int(port)), timeout=5).close()
                except ConnectionRefusedError:
                    refused += 1
        assert answer.rstrip().endswith(b"data: [DONE]\n\n\r\n0") and b'"finish_reason": "length"' in answer
        assert refused > 10
        assert process.wait(30) == (0 if number == signal.SIGTERM else 130)


def test_grace_is_the_time_that_answers_have(tiny_checkpoint):
    from served import post

    with serving(str(tiny_checkpoint), "--name", "tiny", "--grace", "1") as (process, url):
        host, _, port = url.removeprefix("http://").partition(":")
        body = {"model": "tiny", "prompt": [1, 2], "max_tokens": 4000, "block_length": 256, "stream": True}
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(post(json.dumps(body).encode()))
            connection.recv(65536)
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0


def test_the_shipped_checkpoint_and_a_key_of_the_environment(curl):
    with serving(LOSART_API_KEY="of the environment") as (_, url):
        key = ("-H", "Authorization: Bearer of the environment", "-H", "Content-Type: application/json")
        assert json.loads(curl(f"{url}/v1/models"))["error"]["code"] == "invalid_api_key"
        body = {"model": "small_checkpoint", "prompt": "koko?", "attention": "losa"}
        assert json.loads(curl(*key, f"{url}/v1/completions", "-d", json.dumps(body)))["choices"]
        body = {"model": "small_checkpoint", "messages": CHAT["messages"]}
        error = json.loads(curl(*key, f"{url}/v1/chat/completions", "-d", json.dumps(body)))["error"]
        assert "no chat template" in error["message"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--block-length", "0"], 2, "block_length must be"),
        (["--max-queue", "-1"], 2, "--max-queue must be 0 or more"),
        (["--port", "99999"], 2, "--port must be from 0 to 65535"),
        (["no/such/model"], 1, "no/such/model"),
    ],
)
def test_mistakes(arguments, code, message, capsys):
    assert main(["serve", "--port", "0", *arguments]) == code
    assert message in capsys.readouterr().err


def test_who_serves_others_is_told_of_keys(monkeypatch, capsys):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("losart.server.serving.serve", stop)
    for host, key, told in (
        ("0.0.0.0", [], True),
        ("0.0.0.0", ["--api-key", "k"], False),
        ("127.0.0.1", [], False),
    ):
        assert main(["serve", "--port", "0", "--host", host, *key]) == 130
        assert ("--api-key" in capsys.readouterr().err) is told


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert main(["serve", "--port", str(other.getsockname()[1])]) == 1
    assert "in use" in capsys.readouterr().err


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in [name for name in sys.modules if name.startswith("losart.server")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["serve"]) == 2
    assert "pip install 'losart[serve]'" in capsys.readouterr().err
