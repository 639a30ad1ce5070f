"""Tools: rendered by the chat template, and calls read back from answers."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

import httpx
from served import served

import losart
from losart.api.engine import Engine
from losart.engine.stream import Stream
from losart.observe.step import GenerationResult, Stats, Step
from losart.server.tools import Call, said

TEMPLATE = """{% if tools %}<|im_start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
Call them as <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
PARSED = Call("weather", '{"city": "Zürich"}')


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello <b>", "Hello <b>", []),
        (CALL, "", [PARSED]),
        (f"Let me see.\n\n{CALL}\n{CALL}", "Let me see.", [PARSED, PARSED]),
        (CALL.removesuffix("</tool_call>"), "", [PARSED]),
        ("<tool_call>no JSON</tool_call> so", "<tool_call>no JSON</tool_call> so", []),
        ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
        ('<tool_call>{"name": "f", "arg', '<tool_call>{"name": "f", "arg', []),
        ('<tool_call>{"name": "f"}</tool_call>', "", [Call("f", "{}")]),
        ("<tool_call>" + "[" * 100_000, "<tool_call>" + "[" * 100_000, []),
    ],
)
def test_what_an_answer_says_and_calls(text, content, calls):
    assert said(text, finished=True) == (content, calls)
    before = said("", finished=False)
    for end in range(0, len(text), max(1, len(text) // 200)):  # as it grows, both grow
        now = said(text[:end], finished=False)
        assert now.content.startswith(before.content) and now.calls[: len(before.calls)] == before.calls
        assert content.startswith(now.content) and calls[: len(now.calls)] == now.calls
        before = now


class Scripted(Engine):
    """Says what it is told to, in pieces, and keeps the prompts."""

    answer = ""
    prompts: list[list[int]]

    def submit(self, prompt: Any, **options: Any) -> Stream:
        self.prompts = [*getattr(self, "prompts", []), prompt]
        ends = range(7, len(self.answer), 7)
        stats = Stats(len(prompt), 5, 0, 0, 1, 0, 0.0, 0.1, None, None, None)
        result = GenerationResult(self.answer, [1] * 5, "stop", stats)
        steps = [Step("later", 0, [], [], self.answer[:end]) for end in ends]
        return Stream(
            iter([*steps, Step("later", 0, [], [], self.answer, result=result)]), ready=lambda: True
        )

    def step(self) -> bool:
        return True


@pytest.fixture(scope="module")
def caller(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(tiny_checkpoint, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    model = losart.load(path, "cpu")
    engine = Scripted(model)
    with served(model, engine) as server:
        yield server, engine, model


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("before", ["", "Let me see."])
def test_calls_of_the_openai_client(caller, streams, before):
    openai = pytest.importorskip("openai")
    server, engine, model = caller
    engine.answer = f"{before}\n{CALL}" if before else CALL
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    messages: list[Any] = [{"role": "user", "content": "How is it in Zürich?"}]
    options: dict[str, Any] = {"model": "tiny", "tools": [TOOL], "tool_choice": "auto"}
    if not streams:
        answer = client.chat.completions.create(messages=messages, **options)
        message, reason = answer.choices[0].message, answer.choices[0].finish_reason
        content, (call,) = message.content or "", message.tool_calls
        name, arguments = call.function.name, call.function.arguments
    else:
        content = arguments = name = ""
        for chunk in client.chat.completions.create(messages=messages, stream=True, **options):
            choice = chunk.choices[0]
            content += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                assert call.index == 0 and call.id
                name += call.function.name
                arguments += call.function.arguments
            reason = choice.finish_reason
    assert (content, name, json.loads(arguments), reason) == (
        before,
        "weather",
        {"city": "Zürich"},
        "tool_calls",
    )
    prompt = model.tokenizer.decode(engine.prompts[-1], skip_special=False)
    assert '"name": "weather"' in prompt.split("<|im_end|>")[0]

    if not streams:  # the conversation goes on, with what the call gave
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Sunny."}
        client.chat.completions.create(
            messages=[*messages, message.model_dump(exclude_none=True), result], **options
        )
        prompt = model.tokenizer.decode(engine.prompts[-1], skip_special=False)
        assert CALL in prompt and "<|im_start|>tool\nSunny.<|im_end|>" in prompt


def test_langchain_calls(caller):
    langchain = pytest.importorskip("langchain_openai")
    server, engine, _ = caller
    engine.answer = CALL
    chat = langchain.ChatOpenAI(model="tiny", base_url=f"{server.url}/v1", api_key="none").bind_tools([TOOL])
    streamed = list(chat.stream("How is it?"))
    whole = streamed[0]
    for chunk in streamed[1:]:
        whole += chunk
    for answer in (chat.invoke("How is it?"), whole):
        (call,) = answer.tool_calls
        assert (call["name"], call["args"]) == ("weather", {"city": "Zürich"})


def test_without_tools_a_call_is_text(caller):
    server, engine, _ = caller
    engine.answer = CALL
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    for own in ({}, {"tools": [TOOL], "tool_choice": "none"}, {"tools": []}):
        message = httpx.post(f"{server.url}/v1/chat/completions", json=body | own).json()["choices"][0][
            "message"
        ]
        assert message["content"] == CALL and "tool_calls" not in message


@pytest.mark.parametrize(
    ("own", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type"),
    ],
)
def test_what_is_refused(caller, own, param):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": [TOOL], **own}
    answer = httpx.post(f"{caller[0].url}/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_templates_that_know_of_no_calls(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ tools }} {{ messages[0].content }}")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": [TOOL]}
    with served(losart.load(tmp_path / "model", "cpu")) as server:
        error = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["error"]
    assert error["param"] == "tools" and "another format" in error["message"]
