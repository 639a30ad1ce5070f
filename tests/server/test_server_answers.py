"""What is in answers beside the text: passes, figures, metrics and the log."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

import httpx
from served import eventually, served

import losart

ASKED = {"model": "tiny", "prompt": list(range(1, 41)), "max_tokens": 10}
LOSA = {"attention": "losa", "budget": 16, "active": 2}


def chunks_of(server, **body) -> list[dict]:
    answer = httpx.post(f"{server.url}/v1/completions", json=ASKED | {"stream": True} | body, timeout=60)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_passes_are_those_that_an_observer_sees(server, model):
    seen: list[losart.Step] = []
    model.generate(ASKED["prompt"], max_new_tokens=10, stop_token_ids=[], observer=seen.append, **LOSA)
    chunks = chunks_of(server, losart={"steps": True}, **LOSA)
    passes = [one for chunk in chunks for one in chunk["losart"]["passes"]]
    assert [one["kind"] for one in passes] == [step.kind for step in seen]
    assert len({one["kind"] for one in passes}) == 3
    for one, step in zip(passes, seen, strict=True):
        assert one["block_start"] == step.block_start and one["fixed"] == step.fixed
        assert one["masked"] == [place for place, token in enumerate(step.block) if token is None]
        assert [text is None for text in one["tokens"]] == [token is None for token in step.block]
        assert np.allclose(one["layers"], [layer.density for layer in step.layers], atol=1e-3)
        shares = np.mean([np.isin(range(len(step.block)), layer.active) for layer in step.layers], axis=0)
        assert np.allclose(one["active"], shares, atol=1e-3) and one["density"] == step.density
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "".join(
        chunk["choices"][0]["text"] for chunk in chunks_of(server, **LOSA)
    )


def test_passes_say_what_of_a_block_is_the_prompt(server):
    chunks = chunks_of(server, losart={"steps": True}, prompt=ASKED["prompt"][:38])
    heads = {one["block_start"]: one["prompt"] for chunk in chunks for one in chunk["losart"]["passes"]}
    assert heads == {36: 2, 40: 0, 44: 0}


def test_passes_need_a_stream(ask):
    status, answer = ask(losart={"steps": True})
    assert status == 400 and answer["error"]["param"] == "losart"


def test_figures(server, ask):
    _, answer = ask(losart={"stats": True}, n=2)
    assert [one["new_tokens"] for one in answer["losart"]["stats"]] == [16, 16]
    assert chunks_of(server, losart={"stats": True})[-1]["losart"]["stats"]["new_tokens"] == 10


def test_usage_says_what_was_reused(server, ask):
    prompt = list(range(100, 180))
    cached = [ask(prompt=prompt)[1]["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)]
    assert cached == [0, 80]
    *_, last = chunks_of(server, prompt=prompt, stream_options={"include_usage": True})
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 80


def test_metrics(model):
    with served(model) as server:
        for body in (ASKED, ASKED | {"n": 2}, ASKED | LOSA, ASKED | {"max_tokens": 0}):
            httpx.post(f"{server.url}/v1/completions", json=body)
        httpx.get(f"{server.url}/nothing/here")
        text = httpx.get(f"{server.url}/metrics").text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        for name, value in {
            'losart_requests_total{path="/v1/completions",status="200"}': 3,
            'losart_requests_total{path="/v1/completions",status="400"}': 1,
            'losart_requests_total{path="other",status="404"}': 1,
            'losart_generations_total{reason="length"}': 4,
            "losart_first_token_seconds_count": 4,
            "losart_queue_seconds_count": 4,
            "losart_new_tokens_total": 40,
            "losart_running": 0,
            "losart_waiting": 0,
            'losart_kv_bytes{state="in_use"}': 0,
        }.items():
            assert float(values[name]) == value, name
        stats = server.engine.stats
        assert float(values["losart_density"]) == stats.density < 1
        assert float(values["losart_passes_total"]) == stats.passes
        assert float(values["losart_reused_tokens_total"]) == stats.reused_tokens > 0
        assert float(values["losart_batch_size"]) == stats.mean_sequences
        assert float(values['losart_kv_bytes{state="held"}']) == stats.kv_bytes_held > 0


@pytest.mark.parametrize("shows", [False, True])
def test_the_log_has_prompts_only_if_asked(model, caplog, shows):
    caplog.set_level(logging.INFO, "losart.server")
    with served(model, log_prompts=shows) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json=ASKED | {"prompt": "a secret"}).json()
        httpx.post(f"{server.url}/v1/completions", json=ASKED | {"budgett": 1})
        eventually(lambda: len(caplog.messages) == 2)
    good, bad = caplog.messages
    assert "POST '/v1/completions' 200" in good and f"id={answer['id']}" in good and "new=10" in good
    assert "POST '/v1/completions' 400" in bad
    assert ("a secret" in good) is shows
    assert (json.dumps(answer["choices"][0]["text"]) in good) is shows


def test_models_health_and_what_is_not_there(server):
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/health").json()["status"] == "ok"
        told = client.get("/v1/models").json()["data"][0]
        assert told["max_model_len"] == 4096
        assert told["losart"] | {"device": "cpu", "dtype": "float32"} == told["losart"]
        for method, path, status in (
            ("GET", "/v1/nothing", 404),
            ("GET", "/v1/completions", 405),
            ("DELETE", "/v1/models", 405),
        ):
            answer = client.request(method, path)
            assert answer.status_code == status and answer.json()["error"]["message"]


def test_several_names(model):
    with served(model, names=("first", "second")) as server:
        for name in ("first", "second"):
            answer = httpx.post(f"{server.url}/v1/completions", json=ASKED | {"model": name})
            assert answer.json()["model"] == name
