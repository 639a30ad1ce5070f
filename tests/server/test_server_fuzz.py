"""Malformed requests: each gets a 4xx that says why, and running answers go on as if there were none."""

from __future__ import annotations

import json
import re
import socket

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import post, read_all

from benchmarks.support.malformed import PATHS, body, head

CASES = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
RUNNING = {"model": "tiny", "prompt": [4, 5, 6], "max_tokens": 1500, "stream": True}


@pytest.fixture(scope="module", autouse=True)
def running_answer(server, model):
    """An answer that runs all the while, and comes out right."""
    with server.connect() as connection:
        connection.settimeout(120)
        connection.sendall(post(json.dumps(RUNNING).encode()))
        yield
        lines = read_all(connection).decode().splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == model.generate([4, 5, 6], max_new_tokens=1500, stop_token_ids=[]).text
    assert server.engine.stats.running == server.engine.stats.waiting == 0


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@CASES
@given(st.randoms(use_true_random=False), st.sampled_from(PATHS))
def test_bodies(client, random, path):
    sent = body(random, path, "tiny")
    answer = client.post(path, content=sent, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, (sent, answer.text)
    if answer.status_code == 200:
        return
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] == "invalid_request_error" and error["code"]
    assert len(answer.content) < 5000


@CASES
@given(st.randoms(use_true_random=False))
def test_heads(server, random):
    sent = head(random)
    with server.connect() as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            answer = read_all(connection)
        except OSError:  # it was cut short
            return
    statuses = re.findall(rb"^HTTP/1\.1 (\d)", answer, re.MULTILINE)
    assert set(statuses) <= {b"1", b"2", b"4"} and bool(statuses) == bool(answer), (sent, answer)
