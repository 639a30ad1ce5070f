"""The thread that runs an engine's passes, and hands what they give to asyncio."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

from anyio import CapacityLimiter, to_thread

from losart.api.engine import Engine
from losart.engine.stream import Stream
from losart.observe.step import Step
from losart.server.errors import LIMIT, SERVER, ApiError

PREPARING = 4  # requests whose prompts are made at a time
LONGEST_RETRY = 60  # seconds
STUCK = 0.05  # seconds until a thread looks again that found nothing to do
logger = logging.getLogger("losart.server")


class Event(NamedTuple):
    """What a generation gave: a step, and the passes over its block since the one before, or an error."""

    choice: int
    step: Step | None
    passes: list[Step]
    error: Exception | None


class Submission(NamedTuple):
    """A generation to come, as `Engine.submit` takes it."""

    prompt: Sequence[int]
    options: dict[str, Any]


class Answers:
    """The generations of one request: an asynchronous iterator over their events, until all have ended.

    Attributes
    ----------
    left : int
        That have not ended.
    prompt_tokens : list of int
        Of each generation.
    """

    def __init__(self, driver: Driver, places: int) -> None:
        self.left = places
        self.prompt_tokens: list[int] = []
        self._began = time.monotonic()
        self._driver = driver
        self._places = places
        self._streams: list[Stream] = []
        self._passes: list[list[Step]] = []  # by generation, which the driver's thread fills and empties
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def begin(self, submissions: Sequence[Submission], each_step: bool, observed: bool) -> None:
        """Submit them all; in a thread that may wait."""
        engine = self._driver.engine
        for index, (prompt, options) in enumerate(submissions):
            passes = list[Step]()
            observer = passes.append if observed else None
            stream = engine.submit(prompt, observer=observer, each_step=each_step, **options)
            self._passes.append(passes)
            self.prompt_tokens.append(len(prompt))
            self._streams.append(stream)
            self._driver.add(stream, self, index)

    def events_of(self, index: int, stream: Stream) -> tuple[list[Event], bool]:
        """What a generation has given since it was last asked, and whether it has ended; runs no pass."""
        events = list[Event]()
        while stream.ready:
            step, error = None, None
            try:
                step = next(stream)
            except StopIteration:  # it was cancelled
                return events, True
            except Exception as raised:
                error = raised
            passes = self._passes[index][:]
            del self._passes[index][: len(passes)]
            events.append(Event(index, step, passes, error))
            if step is None or step.result is not None:
                return events, True
        return events, False

    def take(self, event: Event) -> None:
        """An event, in asyncio's thread."""
        self._events.put_nowait(event)

    async def __aiter__(self) -> AsyncIterator[Event]:
        while self.left:
            event = await self._events.get()
            if event.step is None or event.step.result is not None:
                self.left -= 1
                self._leave(1)
                self._driver.took(time.monotonic() - self._began)
            yield event

    def cancel(self) -> None:
        """End what is under way, now; its memory is free for others. Again it does nothing."""
        streams, self._streams = self._streams, []
        self._driver.remove(streams)
        for stream in streams:
            stream.cancel()
        self._leave(self._places)

    def _leave(self, places: int) -> None:
        places = min(places, self._places)
        self._places -= places
        self._driver.places_left += places


class Driver:
    """Runs the passes of all generations, in a thread of its own, while there are any.

    The engine batches and orders them; the thread asks for pass after pass, and hands each generation's
    steps to the asyncio loop that asked for it.

    Parameters
    ----------
    engine : Engine
    queue : int
        Generations that may wait beside those that the engine runs at a time; more are refused.

    Attributes
    ----------
    places : int
        Generations that are taken at a time.
    places_left : int
    """

    def __init__(self, engine: Engine, queue: int) -> None:
        self.engine = engine
        self.places = self.places_left = engine.max_sequences + queue
        self._live: dict[Stream, tuple[Answers, int]] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="losart-driver", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._preparing: CapacityLimiter | None = None
        self._seconds = 1.0  # that a generation took, lately

    def start(self) -> None:
        """Begin, in a running loop, which gets the events."""
        self._loop = asyncio.get_running_loop()
        self._preparing = CapacityLimiter(PREPARING)
        self._thread.start()

    async def stop(self) -> None:
        """End the thread once its generations have ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        await to_thread.run_sync(self._thread.join)

    @property
    def alive(self) -> bool:
        """Whether passes are run."""
        return self._thread.is_alive()

    async def submit(
        self,
        count: int,
        prepare: Callable[[], Sequence[Submission]],
        each_step: bool = True,
        observed: bool = False,
    ) -> Answers:
        """Begin `count` generations, which `prepare` makes ready in a thread.

        Raises
        ------
        ApiError
            There is no place for them.
        """
        if count > self.places:
            message = f"the request asks for {count} answers, and the server takes {self.places} at a time"
            raise ApiError(400, message, param="n", code="invalid_value")
        if not self.alive:
            raise ApiError(503, "the server has stopped", code="unavailable", kind=SERVER)
        if count > self.places_left:
            retry = {"Retry-After": str(self._retry_seconds())}
            message = "the server has more requests than it can answer: try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", kind=LIMIT, headers=retry)
        self.places_left -= count
        answers = Answers(self, count)

        def begin() -> None:
            answers.begin(prepare(), each_step, observed)

        try:
            await to_thread.run_sync(begin, limiter=self._preparing)
        except BaseException:
            answers.cancel()
            raise
        return answers

    def took(self, seconds: float) -> None:
        """Note how long a generation took, which says when others may come."""
        self._seconds += (seconds - self._seconds) / 8

    def _retry_seconds(self) -> int:
        ahead = (self.places - self.places_left) / self.engine.max_sequences
        return max(1, min(LONGEST_RETRY, math.ceil(self._seconds * ahead / 2)))

    def add(self, stream: Stream, answers: Answers, index: int) -> None:
        """Run its passes, from now on."""
        with self._changed:
            self._live[stream] = answers, index
            self._changed.notify()

    def remove(self, streams: Sequence[Stream]) -> None:
        """Ask these for nothing any more."""
        with self._changed:
            for stream in streams:
                self._live.pop(stream, None)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._live and not self._stopping:
                    self._changed.wait()
                if not self._live:
                    return
            ran = False
            try:
                ran = self.engine.step()
            except Exception:  # what a pass raises ends its generation alone
                logger.exception("the engine failed between passes")
            if not self._hand_over() and not ran:
                time.sleep(STUCK)

    def _hand_over(self) -> bool:
        """Give asyncio what the last pass gave; False: nothing."""
        with self._changed:
            live = list(self._live.items())
        given = []
        for stream, (answers, index) in live:
            events, ended = answers.events_of(index, stream)
            given += [(answers, event) for event in events]
            if ended:
                self.remove([stream])
        if given:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(_give, given)
        return bool(given)


def _give(given: list[tuple[Answers, Event]]) -> None:
    for answers, event in given:
        answers.take(event)
