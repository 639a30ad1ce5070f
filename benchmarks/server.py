"""A server under malformed requests, and under many connections: time to first token, errors, leaks.

    python -m benchmarks.server path/to/checkpoint --json FILE [-- options of `losart serve`]

Starts `losart serve` on this machine, and asks it over sockets. First malformed requests, a part of which is
hardly HTTP, while an answer runs, which must come out as it does alone; and clients that go away amid their
answers. Then rounds of chats in streams, or of completions where the checkpoint has no chat template: all
connections are open, as many as are said are at work at a time, each on a connection drawn at random.
Between rounds nothing is asked: memory and open files of the process are then those that it does not give
back. Rounds go on until there were `--rounds`, and `--seconds` have gone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.support import malformed
from benchmarks.support.environment import command, commit, versions
from losart.measure.environment import environment

WORDS = (
    *(
        "the",
        "sea",
        "a",
        "ship",
        "of",
        "light",
        "what",
        "who",
        "where",
        "green",
        "stone",
        "river",
        "why",
        "is",
    ),
    *("are", "how", "many", "in", "on", "over"),
)
SERVE = "import sys; from losart.cli import main; sys.exit(main(sys.argv[1:]))"
SECONDS = 600.0  # for one answer
REST = 2.0  # seconds between rounds


class Connection:
    """One connection to the server, which is opened again where the server has closed it."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.opened = 0

    async def open(self) -> None:
        """Open it."""
        self._reader, self._writer = await asyncio.open_connection(*self._address, limit=2**20)
        self.opened += 1

    async def send(self, request: bytes, half: bool = False) -> None:
        """Send a request; `half` closes this side after it."""
        if self._writer is None or self._writer.is_closing() or (self._reader and self._reader.at_eof()):
            await self.open()
        assert self._writer is not None
        self._writer.write(request)
        if half:
            self._writer.write_eof()
        await self._writer.drain()

    async def status(self) -> tuple[int, dict[str, str]]:
        """The head of a response; 0: there is none."""
        assert self._reader is not None
        try:
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except (asyncio.IncompleteReadError, OSError):
            return 0, {}
        first, *lines = head.strip().split("\r\n")
        return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines if ": " in line)

    async def body(self, headers: dict[str, str]) -> AsyncIterator[bytes]:
        """The parts of a body."""
        assert self._reader is not None
        if "content-length" in headers:
            yield await self._reader.readexactly(int(headers["content-length"]))
            return
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readexactly(2)

    def close(self) -> None:
        """Close it."""
        if self._writer is not None:
            self._writer.close()


class Answer(NamedTuple):
    """How an answer came: its status, seconds to the first text and in all, tokens, and the text."""

    status: int
    first: float
    seconds: float
    tokens: int
    text: str


def request(method: str, path: str, body: bytes = b"") -> bytes:
    """As it goes over a socket."""
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def get(address: tuple[str, int], path: str) -> bytes:
    """What a path has."""
    connection = Connection(address)
    await connection.send(request("GET", path))
    _, headers = await connection.status()
    body = b"".join([part async for part in connection.body(headers)])
    connection.close()
    return body


async def measures(address: tuple[str, int]) -> dict[str, float]:
    """The server's metrics that say what it holds."""
    lines = (await get(address, "/metrics")).decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {
        "MiB": float(values["process_resident_memory_bytes"]) / 2**20,
        "files": float(values["process_open_fds"]),
        "running": float(values["losart_running"]),
        "waiting": float(values["losart_waiting"]),
        "KV in use": float(values['losart_kv_bytes{state="in_use"}']),
    }


async def ask(connection: Connection, path: str, body: dict[str, Any]) -> Answer:
    """Stream an answer."""
    began = time.perf_counter()
    await connection.send(request("POST", path, json.dumps(body).encode()))
    status, headers = await connection.status()
    first, tokens, text = 0.0, 0, ""
    async for part in connection.body(headers):
        for line in part.decode().splitlines():
            if status != 200 or not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                status = 500
            for choice in chunk.get("choices", ()):
                text += (new := choice.get("text") or choice.get("delta", {}).get("content") or "")
                if new and not first:
                    first = time.perf_counter() - began
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    return Answer(status, first, time.perf_counter() - began, tokens, text)


async def send_malformed(
    address: tuple[str, int], count: int, at_once: int, model: str, running: tuple[str, dict[str, Any]]
) -> dict[str, Any]:
    """Malformed requests while an answer runs."""
    path, body = running
    expected = await ask(Connection(address), path, body)
    before, statuses = await measures(address), Counter[str]()
    numbers = iter(range(count))
    began, slowest = time.perf_counter(), 0.0

    async def work() -> None:
        nonlocal slowest
        connection = Connection(address)
        for number in numbers:
            rng, started = random.Random(number), time.perf_counter()
            if number % 4 == 0:
                raw = Connection(address)
                try:
                    await raw.send(malformed.head(rng), half=True)
                    status, _ = await raw.status()
                except OSError:
                    status = 0
                raw.close()
            else:
                to = rng.choice(malformed.PATHS)
                await connection.send(request("POST", to, malformed.body(rng, to, model)))
                status, headers = await connection.status()
                async for _ in connection.body(headers):
                    pass
            statuses[str(status or "closed")] += 1
            slowest = max(slowest, time.perf_counter() - started)
        connection.close()

    answers: list[Answer] = []

    async def run() -> None:
        while not done.is_set():
            answers.append(await ask(Connection(address), path, body))

    done = asyncio.Event()
    beside = asyncio.create_task(run())
    await asyncio.gather(*(work() for _ in range(at_once)))
    seconds = time.perf_counter() - began
    done.set()
    await beside
    await asyncio.sleep(REST)
    return {
        "requests": count,
        "seconds": seconds,
        "slowest s": slowest,
        "statuses": dict(sorted(statuses.items())),
        "answers beside": len(answers),
        "of them right": sum(answer.text == expected.text and answer.status == 200 for answer in answers),
        "before": before,
        "after": await measures(address),
    }


async def go_away(
    address: tuple[str, int], count: int, at_once: int, path: str, body: dict[str, Any]
) -> dict[str, Any]:
    """Clients that go away amid their answers, or before."""
    numbers, before, longest = iter(range(count)), await measures(address), 0.0

    async def work() -> None:
        for number in numbers:
            connection = Connection(address)
            await connection.send(request("POST", path, json.dumps(body).encode()))
            if number % 2:
                _, headers = await connection.status()
                async for _ in connection.body(headers):
                    break
            else:
                await asyncio.sleep(random.Random(number).random() / 10)
            connection.close()

    await asyncio.gather(*(work() for _ in range(at_once)))
    began = time.perf_counter()
    while (now := await measures(address))["running"] + now["waiting"]:
        longest = time.perf_counter() - began
    await asyncio.sleep(REST)
    after = await measures(address)
    return {"requests": count, "last one ran on for s": longest, "before": before, "after": after}


async def chat(
    address: tuple[str, int], count: int, connections: int, at_work: int, path: str, body: dict[str, Any]
) -> dict[str, Any]:
    """Streams over connections that are drawn at random."""
    rng = random.Random(0)
    free = [Connection(address) for _ in range(connections)]
    for one in free:
        await one.open()
    numbers, answers = iter(range(count)), list[Answer]()
    began = time.perf_counter()

    async def work() -> None:
        for _ in numbers:
            connection = free.pop(rng.randrange(len(free)))
            question = " ".join(rng.choices(WORDS, k=rng.randrange(4, 40)))
            of_path: dict[str, Any] = {"prompt": question}
            if path == malformed.PATHS[0]:
                of_path = {"messages": [{"role": "user", "content": question}]}
            answers.append(await ask(connection, path, body | of_path))
            free.append(connection)

    await asyncio.gather(*(work() for _ in range(at_work)))
    seconds = time.perf_counter() - began
    opened = sum(one.opened for one in free)
    held = await measures(address)
    for one in free:
        one.close()
    await asyncio.sleep(REST)
    good = [answer for answer in answers if answer.status == 200]
    return {
        "requests": count,
        "connections": connections,
        "opened": opened,
        "at work": at_work,
        "seconds": seconds,
        "statuses": dict(Counter(str(answer.status) for answer in answers)),
        "first token s": quantiles([answer.first for answer in good if answer.first]),
        "answer s": quantiles([answer.seconds for answer in good]),
        "tokens per second": sum(answer.tokens for answer in good) / seconds,
        "open": held,
        "after": await measures(address),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    """The median, the 99th percentile and the most."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98], "most": max(values)}


async def measure(args: argparse.Namespace, address: tuple[str, int]) -> dict[str, Any]:
    """All of it."""
    of_model = json.loads(await get(address, "/v1/models"))["data"][0]
    model = of_model["id"]
    body = {
        "model": model,
        "max_tokens": args.tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    hello = body | {"messages": [{"role": "user", "content": "Hello"}]}
    path = malformed.PATHS[0]
    if (await ask(Connection(address), path, hello)).status != 200:
        path = malformed.PATHS[1]
        hello = body | {"prompt": "Hello"}
    figures: dict[str, Any] = {"device": of_model["losart"]["device"]}
    if args.malformed:
        running = path, hello | {"max_tokens": 8 * args.tokens}
        found = await send_malformed(address, args.malformed, args.at_once, model, running)
        figures["malformed"] = found
        print(json.dumps(found, indent=2), flush=True)
    if args.gone:
        body_of_gone = hello | {"max_tokens": 100 * args.tokens}
        figures["gone"] = await go_away(address, args.gone, args.at_once, path, body_of_gone)
        print(json.dumps(figures["gone"], indent=2), flush=True)
    figures["rounds"] = []
    until = time.perf_counter() + args.seconds
    while len(figures["rounds"]) < args.rounds or time.perf_counter() < until:
        of_round = await chat(address, args.requests, args.connections, args.at_work, path, body)
        figures["rounds"].append(of_round)
        print(json.dumps(of_round, indent=2), flush=True)
    return figures


def served(args: argparse.Namespace, serve: list[str]) -> dict[str, Any]:
    """Figures of a server that is started for them."""
    with tempfile.NamedTemporaryFile("w+") as log, subprocess.Popen(serve, stderr=log) as process:
        try:
            while (
                found := re.search(r"serving .* at http://(.*):(\d+)", Path(log.name).read_text())
            ) is None:
                if process.poll() is not None:
                    raise SystemExit(f"the server did not start: {Path(log.name).read_text()}")
                time.sleep(0.1)
            figures = asyncio.run(measure(args, (found[1], int(found[2]))))
            process.terminate()
            return figures | {"exit code": process.wait(SECONDS)}
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--malformed", type=int, default=10_000, metavar="N")
    parser.add_argument("--gone", type=int, default=500, metavar="N", help="clients that go away")
    parser.add_argument("--at-once", type=int, default=32, help="of both at a time")
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--at-work", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.0, metavar="S", help="of rounds, at least")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    parser.add_argument("serve", nargs=argparse.REMAINDER, help="arguments of `losart serve`")
    args = parser.parse_args()
    serve = [*(one for one in args.serve if one != "--"), "--port", "0", "--no-log"]
    figures = served(args, [sys.executable, "-c", SERVE, "serve", *serve])
    on = environment()["gpu" if figures.pop("device") == "cuda" else "cpu"]
    facts = {
        "device": on["name"],
        "commit": commit(),
        "command": command(__file__),
        "versions": versions("losart", "starlette", "uvicorn", "pydantic"),
    }
    if args.json:
        args.json.write_text(json.dumps(facts | figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
