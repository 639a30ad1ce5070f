"""Requests of OpenAI's API, checked, and what losart makes of them: prompts and options of a generation."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from losart.config.model import ModelConfig
from losart.config.options import OPTIONS, STRUCTURES
from losart.server.errors import LONGEST_MESSAGE, UNKNOWN, ApiError, of_validation, unknown, unsupported

LARGEST = 2**31 - 1  # of whole numbers but seeds
LARGEST_BLOCK = 256  # of a request: passes over longer ones keep all others waiting
SEEDS = 2**64
LEAST_TOP_P = 1e-9  # 0 means the most probable token
COMPLETION_TOKENS = 16  # of /v1/completions, where a request does not say
MOST_CHOICES, MOST_STOPS, MOST_PROMPTS = 128, 16, 1024
OWN_NAMES = {"max_new_tokens", "stop", "seed", "temperature", "top_p"}  # which OpenAI's API calls as it does

Count = Annotated[int, Field(ge=1, le=LARGEST)]
TokenId = Annotated[int, Field(ge=0, le=LARGEST)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Item = TypeVar("Item")
Listed = Annotated[list[Item], Field(fail_fast=True)]  # one mistake will do: a body has room for a million


class Checked(BaseModel):
    """JSON whose types are what they say, and which has nothing else."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="after")
    def _has_no_more(self) -> Checked:
        for key in self.model_extra or ():  # "forbid" would list them all
            raise PydanticCustomError(UNKNOWN, "{key}", {"key": key[:LONGEST_MESSAGE]})
        return self


class Part(Checked):
    """A part of a message's content; losart's models read text alone."""

    type: Literal["text"]
    text: str


class Function(Checked):
    """A function that an answer called; its arguments are JSON in a string."""

    name: Name
    arguments: str


class Call(Checked):
    """A call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None  # which chunks have


class Message(Checked):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Listed[Part] | None = None
    name: str | None = None
    tool_calls: Listed[Call] | None = None
    tool_call_id: str | None = None

    # Which clients send back as they came.
    refusal: str | None = None
    audio: None = None
    function_call: None = None
    annotations: Listed[Any] | None = None

    def plain(self, place: int) -> dict[str, Any]:
        """As chat templates take it."""
        if self.content is None and not self.tool_calls:
            name = f"messages[{place}].content"
            raise ApiError(400, f"Missing required parameter: '{name}'.", param=name, code="invalid_type")
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content}
        for key in ("name", "tool_call_id"):
            if (value := getattr(self, key)) is not None:
                message[key] = value
        if self.tool_calls:
            message["tool_calls"] = [_plain_call(call, place) for call in self.tool_calls]
        return message


class Definition(Checked):
    """A function that a model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Checked):
    """Something that a model may call."""

    type: Literal["function"]
    function: Definition


class StreamOptions(Checked):
    """What a stream has beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False  # of the lengths of chunks, which losart does not do


class Extra(Checked):
    """losart's own: passes in the chunks of a stream, and figures of an answer."""

    steps: bool = False
    stats: bool = False


class Request(BaseModel):
    """What both kinds of completions have in common; other keys are losart's options."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: Name
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[Listed[str], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    losart: Extra | None = None

    # Taken, and without effect.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    # Taken where they change nothing.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def extra(self) -> Extra:
        """losart's own."""
        return self.losart or Extra()

    @property
    def new_tokens(self) -> int | None:
        """New tokens at most; None: the server's default."""
        return self.max_tokens

    def check(self) -> None:
        """Refuse what is well-formed and not supported."""
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, name):
                raise unsupported(name, f"{name} is not supported: leave it out, or 0")
        if self.stream_options is not None and not self.stream:
            message = "stream_options is only allowed with stream"
            raise ApiError(400, message, param="stream_options", code="invalid_value")
        if self.extra.steps and not self.stream:
            raise ApiError(400, "losart.steps needs stream", param="losart", code="invalid_value")

    def options(self, model: ModelConfig, defaults: dict[str, Any]) -> dict[str, Any]:
        """Those of `Model.generate`: the server's defaults, and the request's."""
        own_names = dict(model.decoding.names)
        given: dict[str, Any] = {}
        for name, value in (self.model_extra or {}).items():
            option = own_names.get(name, name)
            if option not in OPTIONS or option in OWN_NAMES:
                raise unknown(name)
            if value is not None:
                _check_numbers(name, value)
                given[name] = value
        if (length := given.get("block_length", 0)) and isinstance(length, int) and length > LARGEST_BLOCK:
            message = f"block_length must be {LARGEST_BLOCK} or less here, not {length}"
            raise ApiError(400, message, param="block_length", code="invalid_value")
        for name in ("stop", "temperature", "top_p"):
            if (value := getattr(self, name)) is not None:
                given[name] = value
        if self.top_p is not None:
            given["top_p"] = max(self.top_p, LEAST_TOP_P)
        if self.seed is not None:
            given["seed"] = self.seed % SEEDS
        if self.new_tokens is not None:
            given["max_new_tokens"] = self.new_tokens
        given |= wanted_of_logits(self)
        replaced = {own_names.get(name, name) for name in given}
        if replaced & set(STRUCTURES):
            replaced |= set(STRUCTURES)
        kept = {name: value for name, value in defaults.items() if own_names.get(name, name) not in replaced}
        return kept | given


class ChatRequest(Request):
    """Of /v1/chat/completions."""

    messages: Annotated[Listed[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    tools: Listed[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None

    # Taken where they change nothing.
    modalities: Listed[str] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def prompts(self) -> list[Any]:
        """One conversation."""
        return [[message.plain(place) for place, message in enumerate(self.messages)]]

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """Tools that the model is told of."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def check(self) -> None:
        super().check()
        if self.tool_choice not in (None, "none", "auto"):
            message = "tool_choice must be 'auto' or 'none': losart does not force calls"
            raise ApiError(400, message, param="tool_choice", code="unsupported_value")
        if self.parallel_tool_calls is False and self.offered:
            raise unsupported("parallel_tool_calls", "an answer cannot be kept to one call: leave it out")
        if self.modalities not in (None, ["text"]):
            raise unsupported("modalities", "losart's models write text alone")
        for name in ("reasoning_effort", "verbosity"):
            if getattr(self, name) is not None:
                raise unsupported(name, f"{name} is not supported: leave it out")
        if self.max_tokens and self.max_completion_tokens:
            message = "max_tokens and max_completion_tokens are the same"
            raise ApiError(400, message, param="max_tokens", code="invalid_value")


class CompletionRequest(Request):
    """Of /v1/completions."""

    prompt: (
        str
        | Annotated[Listed[TokenId], Field(min_length=1)]
        | Annotated[Listed[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[Listed[Listed[TokenId]], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    suffix: str | None = None

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens or COMPLETION_TOKENS

    @property
    def prompts(self) -> list[Any]:
        """Each text, or token ids."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]

    @property
    def offered(self) -> None:
        """Texts know of no tools."""

    def check(self) -> None:
        super().check()
        if self.echo:
            raise unsupported("echo", "echo is not supported: leave it out")
        if self.suffix:
            raise unsupported("suffix", "suffix is not supported: leave it out")
        if self.best_of is not None and self.best_of != self.choices:
            raise unsupported("best_of", "best_of is not supported: leave it out")


def wanted_of_logits(request: Request) -> dict[str, Any]:
    """Options of `Model.generate` for what a request wants of logits."""
    wanted = dict[str, Any]()
    if isinstance(request, ChatRequest):
        if request.logprobs:
            wanted["logprobs"] = request.top_logprobs or 0
        elif request.top_logprobs is not None:
            message = "top_logprobs can be given only where logprobs is true"
            raise ApiError(400, message, param="top_logprobs", code="invalid_value")
    elif isinstance(request, CompletionRequest) and request.logprobs is not None:
        wanted["logprobs"] = request.logprobs
    schema = _schema_of(getattr(request, "response_format", None) or {"type": "text"})
    if schema is None:
        return wanted
    if beside := [name for name in STRUCTURES if (request.model_extra or {}).get(name) is not None]:
        message = f"{beside[0]} cannot be given beside response_format"
        raise ApiError(400, message, param=beside[0], code="invalid_value")
    return wanted | {"json_schema": schema}


def _schema_of(wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The schema that a `response_format` asks for; None where it asks for text."""
    kind = wanted.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        message = "response_format.type must be 'text', 'json_object' or 'json_schema'"
        raise ApiError(400, message, param="response_format", code="invalid_value")
    described = wanted.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        message = "response_format.json_schema.schema must be an object"
        raise ApiError(400, message, param="response_format", code="invalid_value")
    return schema


def parsed(kind: type[Request], body: bytes) -> Request:
    """A request from its body; an `ApiError` says what is wrong with it."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise of_validation(error) from None
    request.check()
    return request


def _check_numbers(name: str, value: Any) -> None:
    """Whole numbers of options fit in 32 bits, as what they count does."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, int) and abs(one) > LARGEST:
            raise ApiError(400, f"{name} must be {LARGEST} or less", param=name, code="invalid_value")


def _plain_call(call: Call, place: int) -> dict[str, Any]:
    """A call as chat templates take it: the arguments are an object."""
    name = f"messages[{place}].tool_calls"
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        message = f"the arguments in {name} must be a JSON object in a string"
        raise ApiError(400, message, param=name, code="invalid_value") from None
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
