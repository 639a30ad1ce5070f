"""What a server refuses, and what becomes of who goes away, comes slowly or asks too much."""

from __future__ import annotations

import json
import socket
import time

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

import httpx
from served import eventually, post, read_all, served

import losart

LONG = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 3000, "stream": True}


def stream_of(server, body=LONG) -> socket.socket:
    """A connection that an answer has begun to come over."""
    connection = server.connect()
    connection.sendall(post(json.dumps(body).encode()))
    head = b""
    while b"data:" not in head:
        head += connection.recv(65536)
    assert head.startswith(b"HTTP/1.1 200")
    return connection


def error_of(answer: bytes) -> tuple[int, dict]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize("streams", [True, False])
def test_who_goes_away_frees_his_sequence(server, streams):
    connection = server.connect()
    connection.sendall(post(json.dumps(LONG | {"stream": streams}).encode()))
    eventually(lambda: server.engine.stats.running == 1 and server.engine.stats.new_tokens)
    passes = server.engine.stats.passes
    connection.close()
    eventually(lambda: server.engine.stats.running == 0)
    assert server.engine.stats.kv_bytes_in_use == 0
    time.sleep(0.1)  # in which a pass ends that was under way
    after = server.engine.stats.passes
    assert after - passes < 100  # of 3,000 tokens, one or more each
    time.sleep(0.2)
    assert server.engine.stats.passes == after


def test_who_goes_away_while_he_waits_frees_his_place(model):
    with served(model, losart.Engine(model, max_sequences=1), queue=1) as server:
        first = stream_of(server)
        second = server.connect()
        second.sendall(post(json.dumps(LONG).encode()))
        eventually(lambda: server.engine.stats.waiting == 1)
        answer = httpx.post(f"{server.url}/v1/completions", json=LONG)
        assert answer.status_code == 429 and 1 <= int(answer.headers["Retry-After"]) <= 60
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        second.close()
        eventually(lambda: server.engine.stats.waiting == 0)
        first.close()
        short = LONG | {"max_tokens": 2, "stream": False}
        assert httpx.post(f"{server.url}/v1/completions", json=short).status_code == 200


def test_more_answers_than_there_are_places(model):
    with served(model, losart.Engine(model, max_sequences=2), queue=1) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json=LONG | {"n": 4})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "n"
        answer = httpx.post(
            f"{server.url}/v1/completions", json=LONG | {"n": 3, "max_tokens": 3, "stream": False}
        )
        assert len(answer.json()["choices"]) == 3


def test_keys(model):
    with served(model, api_keys=("first", "second")) as server:
        body = LONG | {"max_tokens": 2, "stream": False}

        def status(key: str | None, path: str = "/v1/completions") -> int:
            headers = {} if key is None else {"Authorization": key}
            method = "POST" if path == "/v1/completions" else "GET"
            response = httpx.request(
                method, server.url + path, headers=headers, json=body if method == "POST" else None
            )
            if response.status_code == 401:
                assert response.json()["error"]["code"] == "invalid_api_key"
            return response.status_code

        assert [status(key) for key in ("Bearer first", "bearer second")] == [200, 200]
        wrong = [None, "", "first", "Bearer", "Bearer third", "Basic first", "Bearer f", "Bearer first2"]
        assert [status(key) for key in wrong] == [401] * len(wrong)
        assert [status(None, path) for path in ("/metrics", "/v1/models", "/health")] == [401, 401, 200]


def test_cors(model):
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    with served(model, origins=("https://page.example",), api_keys=("key",)) as server:
        path = f"{server.url}/v1/chat/completions"
        answer = httpx.options(path, headers=asked | {"Access-Control-Request-Headers": "authorization"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        other = httpx.options(path, headers=asked | {"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_without_cors_other_pages_get_no_answer(server):
    path = f"{server.url}/v1/completions"
    answer = httpx.options(path, headers={"Origin": "https://a.b", "Access-Control-Request-Method": "POST"})
    assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers
    # What a page may send unasked is no JSON.
    answer = httpx.post(path, content=json.dumps(LONG), headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415


def test_large_bodies(model):
    with served(model, largest_body=1000) as server:
        with server.connect() as connection:  # refused before it has come
            connection.sendall(post(b"").replace(b"Content-Length: 0", b"Content-Length: 1001"))
            assert error_of(read_all(connection)) == (
                413,
                {
                    "message": "the body is larger than 1000 bytes",
                    "type": "invalid_request_error",
                    "param": None,
                    "code": "body_too_large",
                },
            )
        with server.connect() as connection:  # of unknown length
            head = post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            connection.sendall(head + b"400\r\n" + b" " * 1024 + b"\r\n")
            assert error_of(read_all(connection))[0] == 413
        with server.connect() as connection:
            connection.sendall(post(json.dumps(LONG | {"stream": False, "max_tokens": 2}).encode()))
            assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_slow_bodies(model):
    with served(model, body_seconds=0.3) as server, server.connect() as connection:
        connection.sendall(post(b"").replace(b"Content-Length: 0", b"Content-Length: 100"))
        began = time.monotonic()
        status, error = error_of(read_all(connection))
        assert status == 408 and error["code"] == "timeout" and 0.2 < time.monotonic() - began < 5


def test_long_prompts(model):
    with served(model, longest_prompt=10) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json=LONG | {"prompt": [1] * 11})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("streams", [True, False])
def test_answers_that_take_too_long(model, streams):
    with served(model, seconds=0.5) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json=LONG | {"stream": streams}, timeout=30)
        if streams:
            assert answer.status_code == 200
            last = answer.text.strip().split("\n")[-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        else:
            assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        eventually(lambda: server.engine.stats.running == 0)
        assert 'losart_generations_total{reason="timeout"} 1.0' in httpx.get(f"{server.url}/metrics").text


def test_more_memory_than_there_is(model):
    with served(model, losart.Engine(model, kv_memory=1 << 18)) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json=LONG)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


def test_more_connections_than_there_may_be(model):
    with served(model, connections=3) as server:
        idle = [server.connect() for _ in range(3)]
        with server.connect() as connection:
            connection.sendall(post(json.dumps(LONG).encode()))
            assert read_all(connection).startswith(b"HTTP/1.1 503")
        for one in idle:
            one.close()
        time.sleep(0.1)
        short = LONG | {"max_tokens": 2, "stream": False}
        assert httpx.post(f"{server.url}/v1/completions", json=short).status_code == 200


def test_sockets_that_are_half_closed(server):
    body = json.dumps(LONG | {"stream": False, "max_tokens": 2}).encode()
    whole = post(body)
    with stream_of(server) as running:
        for cut in (0, 5, 60, len(whole) - len(body), len(whole) - 3, len(whole)):
            with server.connect() as connection:
                connection.sendall(whole[:cut])
                connection.shutdown(socket.SHUT_WR)
                assert b" 500 " not in read_all(connection)[:20]
        assert running.recv(65536)
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"


def test_a_client_that_does_not_read(server):
    """Its answer ends all the same, and holds up nobody."""
    body = LONG | {"n": 4, "max_tokens": 500, "losart": {"steps": True}}
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(post(json.dumps(body).encode()))
        eventually(lambda: server.engine.stats.running == 4)
        short = LONG | {"max_tokens": 2, "stream": False}
        assert httpx.post(f"{server.url}/v1/completions", json=short, timeout=30).status_code == 200
        eventually(lambda: server.engine.stats.running == 0, seconds=120)
