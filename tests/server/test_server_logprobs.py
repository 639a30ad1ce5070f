"""Log-probabilities in OpenAI's shapes, whole and in streams: those of the model."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("starlette")
pytest.importorskip("openai")

import openai

from losart.loaders import Tokenizer
from losart.observe.step import GenerationResult, Stats, Step, TokenLogprob
from losart.server.answers import Writer
from losart.server.logprobs import ChoiceLogprobs
from losart.server.protocol import ChatRequest, parsed

NEARLY = {"abs": 1e-4}  # rounded otherwise than alone
HELLO = [{"role": "user", "content": "Hello there"}]
DRAWN = {"temperature": 1.2, "top_p": 0.95, "seed": 13}


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(model, prompt, count, **options):
    return model.generate(
        prompt, **{"max_new_tokens": 12, "stop_token_ids": [], "logprobs": count, **options}
    )


def name_of(model, token, before=""):
    """Its text, or where it is a part of a character its bytes, spelled out."""
    known = model.tokenizer.token_bytes(token)
    try:
        return known.decode()
    except UnicodeDecodeError:
        return before + str(known)[2:-1]


def offsets_of(model, result):
    """Characters before each token, but a last one that may go on."""
    ids = result.token_ids
    return [len(model.tokenizer.decode(ids[:place]).rstrip("\ufffd")) for place in range(len(ids))]


def in_text(model, result):
    offsets = offsets_of(model, result)
    return [
        one
        for one, offset in zip(result.logprobs, offsets, strict=True)
        if offset < len(result.text) and model.tokenizer.decode([one.token])
    ]


def text_of(content):
    return b"".join(bytes(one.bytes) for one in content).decode(errors="replace")


def check_chat(model, content, result):
    known = in_text(model, result)
    assert [bytes(one.bytes) for one in content] == [model.tokenizer.token_bytes(one.token) for one in known]
    assert [one.token for one in content] == [name_of(model, one.token) for one in known]
    assert [one.logprob for one in content] == pytest.approx([one.logprob for one in known], **NEARLY)
    for one, entry in zip(known, content, strict=True):
        assert [(other.token, bytes(other.bytes)) for other in entry.top_logprobs] == [
            (name_of(model, token), model.tokenizer.token_bytes(token)) for token, _ in one.top
        ]
        found = [other.logprob for other in entry.top_logprobs]
        assert found == pytest.approx([logprob for _, logprob in one.top], **NEARLY)


def streamed(client, **asked):
    """The text and the entries of each choice of a chat, which come together."""
    texts, contents = {}, {}
    for chunk in client.chat.completions.create(model="tiny", messages=HELLO, stream=True, **asked):
        choice = chunk.choices[0]
        text = texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        content = contents.setdefault(choice.index, [])
        if choice.logprobs:
            content += choice.logprobs.content
            before = text_of(content[:-1]).rstrip("\ufffd")
            assert text.startswith(before) and len(before) < len(text)
        assert text_of(content).startswith(text)
    return texts, contents


@pytest.mark.parametrize("top", [None, 0, 4])
def test_chats(client, model, top):
    options = {} if top is None else {"top_logprobs": top}
    asked = {"n": 2, "logprobs": True, "max_tokens": 24, **options, **DRAWN}
    results = [
        expected(model, HELLO, top or 0, max_new_tokens=24, **DRAWN | {"seed": 13 + choice})
        for choice in range(2)
    ]
    answer = client.chat.completions.create(model="tiny", messages=HELLO, **asked)
    texts, contents = streamed(client, **asked)
    for choice, result in zip(answer.choices, results, strict=True):
        assert choice.message.content == texts[choice.index] == text_of(choice.logprobs.content)
        check_chat(model, choice.logprobs.content, result)
        check_chat(model, contents[choice.index], result)


@pytest.mark.parametrize("count", [0, 3])
def test_completions(client, model, count):
    asked = {"model": "tiny", "prompt": "Hello", "logprobs": count, "max_tokens": 24, "n": 2, **DRAWN}
    answer = client.completions.create(**asked)
    pieces = {0: [], 1: []}
    for chunk in client.completions.create(**asked, stream=True):
        pieces[chunk.choices[0].index].append(chunk.choices[0].logprobs)
    for index, choice in enumerate(answer.choices):
        drawn = {**DRAWN, "seed": DRAWN["seed"] + index}
        result = expected(model, "Hello", count, max_new_tokens=24, **drawn)
        known = result.logprobs
        assert known == in_text(model, result)
        got = {name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        for piece in filter(None, pieces[index]):
            for name, entries in got.items():
                entries += getattr(piece, name)
        for found in (choice.logprobs.model_dump(), got):
            assert found["tokens"] == [name_of(model, one.token, "bytes:") for one in known]
            assert found["token_logprobs"] == pytest.approx([one.logprob for one in known], **NEARLY)
            assert found["text_offset"] == offsets_of(model, result)
            for one, top in zip(known, found["top_logprobs"], strict=True):
                ids = dict([*one.top, (one.token, one.logprob)])
                named = {name_of(model, token, "bytes:"): logprob for token, logprob in ids.items()}
                assert len(named) == len(ids) and top == pytest.approx(named, **NEARLY)


def test_tokens_of_a_stop_string_have_none(client, model):
    drawn = expected(model, HELLO, 0, max_new_tokens=24, **DRAWN)
    pair = next(
        name
        for one in drawn.token_ids
        if len(name := name_of(model, one)) == 2 and drawn.text.find(name) == drawn.text.find(name[1]) - 1 > 0
    )
    for stop, last in ((pair, drawn.text[drawn.text.find(pair) - 1]), (pair[1], pair)):
        asked = {"stop": stop, "logprobs": True, "max_tokens": 24, **DRAWN}
        result = expected(model, HELLO, 0, max_new_tokens=24, stop=stop, **DRAWN)
        choice = client.chat.completions.create(model="tiny", messages=HELLO, **asked).choices[0]
        assert choice.finish_reason == "stop" and choice.message.content == result.text
        assert choice.logprobs.content[-1].token == last  # cut, where the text ends within it
        check_chat(model, choice.logprobs.content, result)
        texts, contents = streamed(client, **asked)
        assert texts == {0: result.text}
        check_chat(model, contents[0], result)


def test_a_text_that_may_become_a_stop_string_keeps_its_tokens_back(client, model):
    plain = expected(model, HELLO, 0, max_new_tokens=24, **DRAWN)
    stops = [letter + "\0" for letter in sorted({*plain.text} - {"\ufffd"})][:16]  # held, and let go
    texts, contents = streamed(client, stop=stops, logprobs=True, max_tokens=24, **DRAWN)
    assert texts == {0: plain.text}
    check_chat(model, contents[0], plain)


def test_of_an_answer_that_follows_a_schema(client):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    schema |= {"additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    asked = {"logprobs": True, "top_logprobs": 2, "response_format": wanted, "max_tokens": 40}
    answer = client.chat.completions.create(model="tiny", messages=HELLO, **asked).choices[0]
    assert answer.message.content.startswith("{")
    assert "".join(one.token for one in answer.logprobs.content) == answer.message.content
    texts, contents = streamed(client, **asked)
    assert texts == {0: answer.message.content}
    assert [one.token for one in contents[0]] == [one.token for one in answer.logprobs.content]


def test_tokens_of_calls_have_some_too(model):
    text = 'So: <tool_call>{"name": "f", "arguments": {"city": "Zürich"}}</tool_call>'
    ids = model.tokenizer.encode(text)
    found = [TokenLogprob(token, -1.0 - place, (), 1) for place, token in enumerate(ids)]
    stats = Stats(3, len(ids), 0, 0, 1, 0, 0.0, 0.1, None, None, None)
    result = GenerationResult(text, ids, "stop", stats, found)
    tool = {"type": "function", "function": {"name": "f"}}
    body = {"model": "tiny", "messages": HELLO, "tools": [tool], "logprobs": True, "stream": True}
    writer = Writer(parsed(ChatRequest, json.dumps(body).encode()), "tiny", model.tokenizer, [3])
    whole = writer.whole([result], 1)["choices"][0]
    assert whole["finish_reason"] == "tool_calls" and whole["message"]["content"] == "So:"
    logprobs = whole["logprobs"]["content"]
    assert [one["logprob"] for one in logprobs] == [one.logprob for one in found]
    pieces = []
    for end in range(7, len(ids) + 7, 7):
        known = model.tokenizer.decode(ids[:end]).rstrip("\ufffd")
        last = result if end >= len(ids) else None
        step = Step("later", 0, [], [], known, result=last, logprobs=found[end - 7 : end])
        if (chunk := writer.chunk(0, step, [])) is not None:
            pieces += (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    assert pieces == logprobs


def test_special_tokens_have_none(model):
    ids = [*model.tokenizer.encode("a<|im_start|>b"), model.tokenizer.eos_token_id]
    found = [TokenLogprob(token, -0.5, (), 1) for token in ids]
    for chat, name in ((True, "content"), (False, "tokens")):
        made = ChoiceLogprobs(chat, model.tokenizer).whole(found, 2)[name]
        assert [one["token"] if chat else one for one in made] == ["a", "b"]
        assert ChoiceLogprobs(chat, model.tokenizer).whole(found[-1:], 0)[name] == []


def test_bytes_that_the_tokenizer_does_not_tell(model):
    class Untold(Tokenizer):
        def token_bytes(self, token):
            return None

    tokenizer = Untold(model.tokenizer.backend, model.tokenizer.special_tokens)
    ids = tokenizer.encode("aé")
    found = [TokenLogprob(token, -0.5, (), 1) for token in ids]
    content = ChoiceLogprobs(True, tokenizer).whole(found, 2)["content"]
    assert [(one["token"], one["bytes"]) for one in content] == [
        ("a", [97]),
        ("\ufffd", None),
        ("\ufffd", None),
    ]


@pytest.mark.parametrize(
    ("path", "param", "wrong"),
    [
        ("chat/completions", "top_logprobs", {"top_logprobs": 0}),
        ("chat/completions", "top_logprobs", {"top_logprobs": 2, "logprobs": False}),
        ("chat/completions", "top_logprobs", {"top_logprobs": 21, "logprobs": True}),
        ("chat/completions", "top_logprobs", {"top_logprobs": -1, "logprobs": True}),
        ("chat/completions", "logprobs", {"logprobs": 3}),
        ("completions", "logprobs", {"logprobs": 6}),
        ("completions", "logprobs", {"logprobs": -1}),
        ("completions", "logprobs", {"logprobs": True}),
        ("completions", "top_logprobs", {"logprobs": 2, "top_logprobs": 2}),
    ],
)
def test_wrong_values(ask, path, param, wrong):
    prompt = {"messages": HELLO} if path.startswith("chat") else {"prompt": "Hello"}
    status, answer = ask(f"/v1/{path}", **prompt, **wrong)
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["type"] == "invalid_request_error"


def test_nothing_is_given_that_was_not_asked_for(client):
    assert client.chat.completions.create(model="tiny", messages=HELLO).choices[0].logprobs is None
    assert client.completions.create(model="tiny", prompt="Hello").choices[0].logprobs is None
