"""What fails while answers run: it ends its own request with a 5xx, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

import httpx
from served import eventually, served
from test_model_api import spoil_row, with_tensor

import losart

MARK = 77  # new tokens of requests whose passes fail
OTHER = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 300}


def failing(model: losart.Model, error: Exception, monkeypatch, after: int = 0) -> None:
    """Passes of marked requests raise, from that on which is `after` passes later."""
    runner, passes = model._engine.runner, [0]
    begin = runner.begin

    def raising(batch: Any, observe: bool = False) -> Callable[[], Any]:
        if any(one.options.max_new_tokens == MARK for one in batch.sequences):
            passes[0] += 1
            if passes[0] > after:
                raise error
        return begin(batch, observe)

    monkeypatch.setattr(runner, "begin", raising)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (losart.OutOfMemoryError("no room"), 503, "out_of_memory"),
        (MemoryError(), 503, "out_of_memory"),
        (losart.NumericalError("the logits are not finite"), 500, "numerical_error"),
        (RuntimeError("a secret"), 500, "internal_error"),
    ],
)
def test_an_error_in_a_pass(model, error, status, code, monkeypatch):
    expected = model.generate(OTHER["prompt"], max_new_tokens=300, stop_token_ids=[]).text
    with served(model) as server, httpx.Client(timeout=60) as client:
        path = f"{server.url}/v1/completions"
        failing(model, error, monkeypatch)
        with client.stream("POST", path, json=OTHER | {"stream": True}) as other:
            lines = other.iter_lines()
            next(lines)
            for streams in (False, True):  # a stream, too, has a status until its first step
                answer = client.post(path, json=OTHER | {"max_tokens": MARK, "stream": streams})
                assert answer.status_code == status
                assert answer.json()["error"]["code"] == code
                assert answer.json()["error"]["type"] == "server_error"
                assert "secret" not in answer.text
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert expected.endswith(text) and chunks[-1]["choices"][0]["finish_reason"] == "length"
        monkeypatch.undo()
        assert client.post(path, json=OTHER | {"max_tokens": MARK}).status_code == 200
        assert 'losart_generations_total{reason="error"} 2.0' in client.get(f"{server.url}/metrics").text


def test_an_error_amid_a_stream(model, monkeypatch):
    with served(model) as server:
        failing(model, losart.OutOfMemoryError("no room"), monkeypatch, after=10)
        body = OTHER | {"max_tokens": MARK, "stream": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200
        *chunks, last = [json.loads(line[6:]) for line in answer.text.splitlines() if line]
        assert last["error"]["code"] == "out_of_memory" and chunks[0]["choices"][0]["text"]
        eventually(lambda: server.engine.stats.running == 0)

        monkeypatch.undo()
        failing(model, losart.OutOfMemoryError("no room"), monkeypatch, after=10)
        openai = pytest.importorskip("openai")
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(**body)
        with pytest.raises(openai.APIError):
            list(stream)


def test_logits_that_are_not_finite(make_checkpoint):
    spoilt = with_tensor(make_checkpoint(), "model.embed_tokens.weight", spoil_row(3, np.nan))
    model = losart.load(spoilt, "cpu")
    with served(model) as server:
        for prompt, status in (([3, 4, 5], 500), ([4, 5], 200)):
            answer = httpx.post(f"{server.url}/v1/completions", json=OTHER | {"prompt": prompt}, timeout=60)
            assert answer.status_code == status
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "running": 0, "waiting": 0}


def test_the_engine_itself(model, monkeypatch):
    """Between passes: nothing is lost but time."""
    with served(model) as server:
        step, failed = server.engine.step, []

        def once() -> bool:
            if not failed:
                failed.append(True)
                raise RuntimeError("a bug")
            return step()

        monkeypatch.setattr(server.engine, "step", once)
        answer = httpx.post(f"{server.url}/v1/completions", json=OTHER | {"max_tokens": 5}, timeout=60)
        assert answer.status_code == 200 and failed


@pytest.mark.parametrize(
    "broken", ["{{ 1 / 0 }}", "{{ raise_exception('no system messages') }}", "{% for %}"]
)
def test_templates_that_fail(tiny_checkpoint, tmp_path, broken):
    import shutil

    path = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, path)
    (path / "chat_template.jinja").write_text(broken)
    with served(losart.load(path, "cpu")) as server:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_prompt"
