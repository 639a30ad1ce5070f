"""A request for completions, from its body to the end of its answer."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from losart.observe.step import GenerationResult
from losart.server import protocol
from losart.server.answers import Writer
from losart.server.driver import Answers, Event, Submission
from losart.server.errors import ApiError, of_generation, of_request, timed_out
from losart.server.service import Service

GRACE = 30.0  # seconds beyond a request's, for a client that reads slowly
Answer = TypeVar("Answer")


class Exchange:
    """A request that is being answered."""

    def __init__(self, service: Service, request: Request) -> None:
        self._service = service
        self._request = request
        self._noted = request.state.noted
        self._arrived = time.monotonic()
        self._before = 0.0  # seconds until its generations were under way
        self._results: dict[int, GenerationResult] = {}
        self._prompts = 1

    async def response(self, asked: protocol.Request) -> Response:
        """What answers a request; of a stream the beginning."""
        service = self._service
        service.check_name(asked.model)
        self._prompts = len(asked.prompts)
        streams, settings = bool(asked.stream), service.settings
        if settings.log_prompts:
            self._noted["prompts"] = json.dumps(asked.prompts)

        def prepare() -> list[Submission]:
            return service.submissions(asked)

        count = self._prompts * asked.choices
        try:
            answers = await service.driver.submit(count, prepare, streams, asked.extra.steps)
        except ApiError:
            raise
        except Exception as error:
            raise of_request(error) from error
        self._before = time.monotonic() - self._arrived
        events = aiter(answers)
        writer = Writer(asked, asked.model, service.model.tokenizer, answers.prompt_tokens)
        self._noted["id"] = writer.id
        try:
            if streams:
                first = await self._unless_gone(self._next(events))
                return EventStream(self._chunks(first, events, writer), self, answers)
            await self._unless_gone(self._all(events))
            self.end(answers)
        except BaseException as error:
            self.end(answers, error)
            raise
        return JSONResponse(writer.whole(self._in_order(), self._prompts))

    @property
    def seconds_left(self) -> float:
        """Until the answer must be complete."""
        return max(0.0, self._arrived + self._service.settings.seconds - time.monotonic())

    def _in_order(self) -> list[GenerationResult]:
        return [self._results[index] for index in sorted(self._results)]

    async def _unless_gone(self, answer: Awaitable[Answer]) -> Answer:
        """Wait for something while the client does."""
        got, failed = list[Answer](), list[Exception]()
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                while (await self._request.receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            async def wait() -> None:
                try:
                    got.append(await answer)
                except Exception as error:  # which the group would put into one of its own
                    failed.append(error)
                group.cancel_scope.cancel()

            group.start_soon(watch)
            group.start_soon(wait)
        if failed:
            raise failed[0]
        if not got:
            raise ClientDisconnect()
        return got[0]

    async def _next(self, events: AsyncIterator[Event]) -> Event | None:
        """The next event, in time; None after the last one."""
        try:
            with anyio.fail_after(self.seconds_left):
                event = await anext(events, None)
        except TimeoutError:
            raise timed_out(self._service.settings.seconds) from None
        if event is not None and event.error is not None:
            self._service.metrics.ended("error")
            raise of_generation(event.error)
        if event is not None and event.step is not None and event.step.result is not None:
            self._results[event.choice] = event.step.result
            took = time.monotonic() - self._arrived
            self._service.metrics.finished(event.step.result, self._before, took)
        return event

    async def _all(self, events: AsyncIterator[Event]) -> None:
        while await self._next(events) is not None:
            pass

    async def _chunks(
        self, event: Event | None, events: AsyncIterator[Event], writer: Writer
    ) -> AsyncIterator[str]:
        """A stream's events of SSE."""
        try:
            while event is not None and event.step is not None:
                if (chunk := writer.chunk(event.choice, event.step, event.passes)) is not None:
                    yield _sse(chunk)
                event = await self._next(events)
        except ApiError as error:  # too late for a status
            self._noted["error"] = error.code
            yield _sse(error.object)
            return
        if (last := writer.last_chunk(self._in_order(), self._prompts)) is not None:
            yield _sse(last)
        yield "data: [DONE]\n\n"

    def end(self, answers: Answers, error: BaseException | None = None) -> None:
        """Free what is left, and note what the answer came to."""
        if isinstance(error, ApiError):
            self._noted["error"] = error.code
        if left := answers.left:
            answers.cancel()
            reason = "timeout" if self._noted.get("error") == "timeout" else "cancelled"
            self._service.metrics.ended(reason, left)
            self._noted[reason] = left
        if results := self._in_order():
            self._noted |= {
                "prompt": sum(one.stats.prompt_tokens for one in results),
                "reused": sum(one.stats.reused_tokens for one in results),
                "new": sum(one.stats.new_tokens for one in results),
                "finish": ",".join(one.finish_reason for one in results),
            }
            first = [one.stats.first_token_seconds for one in results if one.stats.first_token_seconds]
            if first:
                self._noted["first_token"] = f"{self._before + min(first):.3f}s"
            if self._service.settings.log_prompts:
                self._noted["answers"] = json.dumps([one.text for one in results])


class EventStream(StreamingResponse):
    """A stream of SSE that frees its generations however it ends."""

    def __init__(self, chunks: AsyncIterator[str], exchange: Exchange, answers: Answers) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(chunks, headers=headers, media_type="text/event-stream")
        self._exchange = exchange
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            with anyio.move_on_after(self._exchange.seconds_left + GRACE):
                await super().__call__(scope, receive, send)
        finally:
            self._exchange.end(self._answers)


def _sse(values: Any) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"
