"""Log-probabilities in OpenAI's shapes, whole and in streams: those of the model."""

from __future__ import annotations

import pytest

openai = pytest.importorskip("openai")
NEARLY = {"abs": 1e-4}  # rounded otherwise than alone
HELLO = [{"role": "user", "content": "Hello there"}]
DRAWN = {"temperature": 1.2, "top_p": 0.95, "seed": 11}


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(model, prompt, count, **options):
    return model.generate(
        prompt, **{"max_new_tokens": 12, "stop_token_ids": [], "logprobs": count, **options}
    )


def text_of(model, token):
    return model.tokenizer.decode([token], skip_special=False)


def with_text(model, result):
    return [one for one in result.logprobs if model.tokenizer.decode([one.token])]


def check_chat(model, content, result):
    known = with_text(model, result)
    assert [one.token for one in content] == [text_of(model, one.token) for one in known]
    assert [one.logprob for one in content] == pytest.approx([one.logprob for one in known], **NEARLY)
    for one, entry in zip(known, content, strict=True):
        assert entry.bytes == (None if "\ufffd" in entry.token else list(entry.token.encode()))
        assert [other.token for other in entry.top_logprobs] == [
            text_of(model, token) for token, _ in one.top
        ]
        found = [other.logprob for other in entry.top_logprobs]
        assert found == pytest.approx([logprob for _, logprob in one.top], **NEARLY)


@pytest.mark.parametrize("top", [None, 0, 4])
def test_chats(client, model, top):
    options = {} if top is None else {"top_logprobs": top}
    asked = {"model": "tiny", "messages": HELLO, "n": 2, "logprobs": True, **options, **DRAWN}
    results = [expected(model, HELLO, top or 0, **DRAWN | {"seed": 11 + choice}) for choice in range(2)]
    answer = client.chat.completions.create(**asked)
    pieces = {0: [], 1: []}
    for chunk in client.chat.completions.create(**asked, stream=True):
        choice = chunk.choices[0]
        pieces[choice.index] += choice.logprobs.content if choice.logprobs else []
    for choice, result in zip(answer.choices, results, strict=True):
        check_chat(model, choice.logprobs.content, result)
        check_chat(model, pieces[choice.index], result)


@pytest.mark.parametrize("count", [0, 3])
def test_completions(client, model, count):
    asked = {"model": "tiny", "prompt": "Hello", "logprobs": count, "max_tokens": 14, **DRAWN}
    result = expected(model, "Hello", count, max_new_tokens=14, **DRAWN)
    known = with_text(model, result)
    whole = client.completions.create(**asked).choices[0].logprobs
    assert whole.tokens == [text_of(model, one.token) for one in known]
    assert whole.token_logprobs == pytest.approx([one.logprob for one in known], **NEARLY)
    assert whole.text_offset == [len("".join(whole.tokens[:index])) for index in range(len(known))]
    for one, found in zip(known, whole.top_logprobs, strict=True):
        assert text_of(model, one.token) in found and len(found) <= count + 1
        assert {text_of(model, token) for token, _ in one.top} <= set(found)
    pieces = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [entry for one in pieces if one for entry in getattr(one, name)] == getattr(whole, name)


def test_up_to_a_stop_string(client, model):
    text = expected(model, HELLO, 0).text
    asked = {"model": "tiny", "messages": HELLO, "stop": text[5:7], "logprobs": True}
    result = expected(model, HELLO, 0, stop=text[5:7])
    assert result.finish_reason == "stop" and len(result.logprobs) == len(result.token_ids)
    check_chat(model, client.chat.completions.create(**asked).choices[0].logprobs.content, result)
    found = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        found += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    check_chat(model, found, result)


def test_of_an_answer_that_follows_a_schema(client):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    schema |= {"additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, response_format=wanted, max_tokens=40
    ).choices[0]
    assert answer.message.content.startswith("{")
    assert "".join(one.token for one in answer.logprobs.content) == answer.message.content


def test_nothing_is_given_that_was_not_asked_for(client):
    assert client.chat.completions.create(model="tiny", messages=HELLO).choices[0].logprobs is None
    assert client.completions.create(model="tiny", prompt="Hello").choices[0].logprobs is None
