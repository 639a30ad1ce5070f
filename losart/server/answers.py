"""Answers as OpenAI's API has them: whole ones, and the chunks of streams."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from losart.loaders import Tokenizer
from losart.observe.step import GenerationResult, Step, TokenLogprob
from losart.server.logprobs import ChoiceLogprobs
from losart.server.protocol import ChatRequest, Request
from losart.server.tools import Call, call_object, said


class Writer:
    """Makes the objects of one request's answer.

    Parameters
    ----------
    request : Request
    model : str
        The model's name.
    tokenizer : Tokenizer or None
        For the tokens of blocks.
    prompt_tokens : sequence of int
        Of each choice.

    Attributes
    ----------
    id : str
        The answer's.
    """

    def __init__(
        self, request: Request, model: str, tokenizer: Tokenizer | None, prompt_tokens: Sequence[int]
    ) -> None:
        self._chat = isinstance(request, ChatRequest)
        self._tools = request.offered is not None
        self._extra = request.extra
        self._usage = request.stream_options is not None and request.stream_options.include_usage
        self._tokenizer = tokenizer
        self._prompt_tokens = prompt_tokens
        self._model = model
        self._created = int(time.time())
        self.id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._sent: dict[int, tuple[str, int]] = {}  # by choice, text and calls in chunks so far
        self._logprobs: dict[int, ChoiceLogprobs] = {}  # by choice, of streams that have any

    def whole(self, results: Sequence[GenerationResult], prompts: int) -> dict[str, Any]:
        """An answer that is complete; of `prompts` prompts, each with as many choices."""
        made = self._object("chat.completion" if self._chat else "text_completion")
        made["choices"] = [self._choice(index, result) for index, result in enumerate(results)]
        made["usage"] = usage(results, prompts)
        if self._extra.stats:
            made["losart"] = {"stats": [_stats(result) for result in results]}
        return made

    def _choice(self, index: int, result: GenerationResult) -> dict[str, Any]:
        logprobs = None
        if self._tokenizer is not None and result.logprobs is not None:
            logprobs = ChoiceLogprobs(self._chat, self._tokenizer).whole(result.logprobs, len(result.text))
        if not self._chat:
            return {**_finish(index, result.finish_reason, logprobs), "text": result.text}
        message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
        reason = result.finish_reason
        if self._tools:
            content, calls = said(result.text, finished=True)
            message["content"] = content
            if calls:
                message["content"] = content or None
                message["tool_calls"] = [call_object(call) for call in calls]
                reason = "tool_calls" if reason == "stop" else reason
        return {**_finish(index, reason, logprobs), "message": message}

    def chunk(self, index: int, step: Step, passes: Sequence[Step]) -> dict[str, Any] | None:
        """What a step adds to a choice; None: nothing that a client asked for."""
        begins = index not in self._sent
        text, called = self._sent.get(index, ("", 0))
        result, calls = step.result, list[Call]()
        now = step.text if result is None else result.text
        known = len(now)  # text of calls too
        if self._tools:
            now, calls = said(now, finished=result is not None)
        delta: dict[str, Any] = {}
        if self._chat and begins:
            delta["role"] = "assistant"
        if len(now) > len(text):
            delta["content"] = now[len(text) :]
        elif self._chat and begins:
            delta["content"] = ""
        if new := calls[called:]:
            delta["tool_calls"] = [call_object(call, called + place) for place, call in enumerate(new)]
        self._sent[index] = max(now, text, key=len), len(calls)
        reason = None if result is None else result.finish_reason
        if calls and reason == "stop":
            reason = "tool_calls"
        logprobs = self._next_logprobs(index, step.logprobs, known)
        if not delta and reason is None and not passes and logprobs is None:
            return None
        made = self._object("chat.completion.chunk" if self._chat else "text_completion")
        choice = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        made["choices"] = [{**_finish(index, reason, logprobs), **choice}]
        if self._usage:
            made["usage"] = None
        own: dict[str, Any] = {}
        if self._extra.steps:
            own["passes"] = [self._pass(one, self._prompt_tokens[index]) for one in passes]
        if self._extra.stats and result is not None:
            own["stats"] = _stats(result)
        if own:
            made["losart"] = own
        return made

    def _next_logprobs(
        self, index: int, found: list[TokenLogprob] | None, characters: int
    ) -> dict[str, Any] | None:
        if found is None or self._tokenizer is None:
            return None
        of_choice = self._logprobs.setdefault(index, ChoiceLogprobs(self._chat, self._tokenizer))
        return of_choice.next(found, characters)

    def last_chunk(self, results: Sequence[GenerationResult], prompts: int) -> dict[str, Any] | None:
        """What follows all others: the usage, where it was asked for."""
        if not self._usage:
            return None
        made = self._object("chat.completion.chunk" if self._chat else "text_completion")
        return {**made, "choices": [], "usage": usage(results, prompts)}

    def _object(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _pass(self, step: Step, prompt_tokens: int) -> dict[str, Any]:
        """A pass over a block, for who draws it; the block may begin with the prompt's end."""
        length, layers = len(step.block), len(step.layers)
        active = np.zeros(length)
        for layer in step.layers:
            active[layer.active] += 1 / layers
        return {
            "kind": step.kind,
            "block_start": step.block_start,
            "prompt": min(length, max(0, prompt_tokens - step.block_start)),
            "tokens": [None if token is None else self._text(token) for token in step.block],
            "masked": [place for place, token in enumerate(step.block) if token is None],
            "fixed": step.fixed,
            "edited": step.edited,
            "active": active.round(3).tolist(),
            "density": step.density,
            "layers": [None if one.density is None else round(one.density, 3) for one in step.layers],
        }

    def _text(self, token: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode([token], skip_special=False)


def usage(results: Sequence[GenerationResult], prompts: int) -> dict[str, Any]:
    """Tokens; a prompt counts once, however many choices it has."""
    firsts = results[:: max(1, len(results) // prompts)]
    prompt = sum(result.stats.prompt_tokens for result in firsts)
    new = sum(result.stats.new_tokens for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(result.stats.reused_tokens for result in firsts)},
    }


def _finish(index: int, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": index, "logprobs": logprobs, "finish_reason": reason}


def _stats(result: GenerationResult) -> dict[str, Any]:
    return {**dataclasses.asdict(result.stats), "tokens_per_second": result.stats.tokens_per_second}
