"""OpenAI's own client, and LangChain's, against losart's server."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Literal

import pytest

import losart

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")
HELLO = [{"role": "user", "content": "Hello there"}]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(model: losart.Model, prompt=HELLO, **options) -> losart.GenerationResult:
    return model.generate(prompt, **{"max_new_tokens": 12, "stop_token_ids": [], **options})


def test_models(client):
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "losart"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_chat_answers_as_the_model_does(client, model):
    answer = client.chat.completions.create(model="tiny", messages=HELLO)
    result = expected(model)
    assert answer.choices[0].message.content == result.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (result.stats.prompt_tokens, 12)
    assert usage.total_tokens == usage.prompt_tokens + 12


def test_a_stream_gives_the_same_in_pieces(client, model):
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    *chunks, last = chunks
    assert last.choices == [] and last.usage.completion_tokens == 12
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected(model).text
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"] and len(chunks) > 3


def test_several_choices_have_seeds_of_their_own(client, model):
    options = {"temperature": 1.5, "seed": 7, "top_p": 0.9}
    answer = client.chat.completions.create(model="tiny", messages=HELLO, n=3, **options)
    results = [expected(model, **options | {"seed": 7 + choice}) for choice in range(3)]
    assert [one.message.content for one in answer.choices] == [result.text for result in results]
    assert [one.index for one in answer.choices] == [0, 1, 2] and len({one.text for one in results}) == 3
    assert answer.usage.completion_tokens == 36
    assert answer.usage.prompt_tokens == results[0].stats.prompt_tokens

    text = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(model="tiny", messages=HELLO, n=3, stream=True, **options):
        text[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(text.values()) == [result.text for result in results]


def test_stop_ends_an_answer_before_it(client, model):
    text = expected(model).text
    stop = text[5:7]
    for given in (stop, [stop, "never so"]):
        answer = client.chat.completions.create(model="tiny", messages=HELLO, stop=given)
        assert answer.choices[0].message.content == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_number_of_tokens(client, name):
    answer = client.chat.completions.create(model="tiny", messages=HELLO, **{name: 3})
    assert answer.usage.completion_tokens == 3


def test_content_in_parts_and_the_developers_role(client, model):
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="tiny", messages=messages)
    plain = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert answer.choices[0].message.content == expected(model, plain).text


@pytest.mark.parametrize("prompt", ["Once", ["Once", "upon"], [9, 8, 7], [[9, 8, 7], [1, 2]]])
def test_completions(client, model, prompt):
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=5, n=2, temperature=0)
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    prompts = [one for one in (prompt if several else [prompt]) for _ in range(2)]
    results = [expected(model, one, max_new_tokens=5) for one in prompts]
    assert [one.text for one in answer.choices] == [result.text for result in results]
    assert answer.usage.prompt_tokens == sum(result.stats.prompt_tokens for result in results[::2])


def test_completions_are_16_tokens_long_and_stream(client, model):
    chunks = list(client.completions.create(model="tiny", prompt="Once", stream=True))
    assert (
        "".join(chunk.choices[0].text for chunk in chunks) == expected(model, "Once", max_new_tokens=16).text
    )
    assert chunks[-1].choices[0].finish_reason == "length"


def test_losarts_options_are_extra_fields(client, model):
    own = {"attention": "losa", "budget": 16, "active": 0.5, "block_length": 8, "denoising_steps": 3}
    own |= {"remasking": "low_confidence_static", "confidence_threshold": 0.5, "top_k": 3}
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0.5, seed=1, extra_body=own | {"losart": {"stats": True}}
    )
    result = expected(model, temperature=0.5, seed=1, **own)
    assert answer.choices[0].message.content == result.text
    assert answer.losart["stats"][0]["denoising_passes"] == result.stats.denoising_passes


def test_a_conversation_goes_on_with_the_answer_as_it_came(client, model):
    first = client.chat.completions.create(model="tiny", messages=HELLO).choices[0].message
    for answer in (first, first.model_dump(), {"role": "assistant", "content": first.content}):
        messages = [*HELLO, answer, {"role": "user", "content": "And?"}]
        text = client.chat.completions.create(model="tiny", messages=messages).choices[0].message.content
        plain = [*HELLO, {"role": "assistant", "content": first.content}, messages[-1]]
        assert text == expected(model, plain).text


def test_errors_are_the_clients_own(client):
    def refused(kind, **options):
        with pytest.raises(kind) as raised:
            client.chat.completions.create(**{"model": "tiny", "messages": HELLO, **options})
        return raised.value

    error = refused(openai.BadRequestError, extra_body={"budgett": 3})
    assert (error.code, error.param, error.type) == ("unknown_parameter", "budgett", "invalid_request_error")
    error = refused(openai.BadRequestError, extra_body={"budget": -3})
    assert (error.code, error.param) == ("invalid_value", "budget") and "positive" in error.message
    error = refused(openai.NotFoundError, model="gpt-4o")
    assert error.code == "model_not_found"
    error = refused(openai.BadRequestError, messages=[{"role": "user", "content": "x" * 5000}])
    assert error.code == "context_length_exceeded"
    for options in ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 21}):
        error = refused(openai.BadRequestError, **options)
        assert (error.code, error.param) == ("invalid_value", "top_logprobs")
    for name, value in {
        "frequency_penalty": 0.5,
        "logit_bias": {"5": 3},
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }.items():
        error = refused(openai.BadRequestError, **{name: value})
        assert (error.code, error.param) == ("unsupported_parameter", name)


def test_what_changes_nothing_is_taken(client):
    client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        logprobs=False,
        response_format={"type": "text"},
        n=1,
        store=False,
        user="me",
        service_tier="auto",
        tool_choice="auto",
        top_p=0,
        seed=-1,
        temperature=1,
    )


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    age: Annotated[int, pydantic.Field(ge=0, le=150)]
    likes: Annotated[list[Literal["tea", "chess"]], pydantic.Field(max_length=3)]


def test_answers_follow_a_schema(client):
    pytest.importorskip("llguidance")
    ask = {"model": "tiny", "messages": HELLO, "max_tokens": 300}
    answer = client.chat.completions.parse(**ask, response_format=Person).choices[0]
    assert isinstance(answer.message.parsed, Person) and answer.finish_reason == "stop"
    schema = {"name": "person", "schema": Person.model_json_schema()}
    wanted = {"type": "json_schema", "json_schema": schema}
    chunks = list(client.chat.completions.create(**ask, response_format=wanted, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.message.content and chunks[-1].choices[0].finish_reason == "stop"
    text = client.chat.completions.create(**ask, extra_body={"regex": "(yes|no)"}).choices[0].message.content
    assert text in ("yes", "no")
    choice = client.chat.completions.create(**ask, response_format={"type": "json_object"}).choices[0]
    assert choice.message.content.startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "json_schema",
        ),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex"),
        ({"regex": "a", "grammar": "start: A"}, "grammar"),
        ({"regex": "(.{1,500}){1,100}x", "max_tokens": 200}, "regex"),  # which shows on the way
    ],
)
def test_a_wrong_schema_is_named(client, options, param):
    pytest.importorskip("llguidance")
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body=options)
    assert (raised.value.code, raised.value.param) == ("invalid_value", param)


def test_many_at_once(server, model):
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(model="tiny", prompt=[n, 5, n], max_tokens=8)
                    for n in range(1, 41)
                )
            )
        return [answer.choices[0].text for answer in answers]

    results = [expected(model, [n, 5, n], max_new_tokens=8).text for n in range(1, 41)]
    assert asyncio.run(ask()) == results


def test_langchain(server, model):
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(model="tiny", base_url=f"{server.url}/v1", api_key="none", max_tokens=9)
    text = expected(model, max_new_tokens=9).text
    answer = chat.invoke("Hello there")
    assert answer.content == text and answer.usage_metadata["output_tokens"] == 9
    assert answer.response_metadata["finish_reason"] == "length"
    chunks = list(chat.stream("Hello there"))
    assert "".join(chunk.content for chunk in chunks) == text and len(chunks) > 2
    assert [one.content for one in chat.batch(["Hello there"] * 3)] == [text] * 3
