"""`losart serve`: a server that speaks OpenAI's API."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from losart.api.engine import Engine
from losart.cli.arguments import add_generation, add_model, generation_options, positive
from losart.cli.engines import add_engine, memory
from losart.cli.progress import load_model
from losart.errors import OptionError

HELP = "serve a model by OpenAI's API"
DESCRIPTION = """Serve a model over HTTP by OpenAI's API: /v1/chat/completions, /v1/completions and
/v1/models, beside /health and /metrics. Options of generations are defaults, which a request may have
otherwise. Needs pip install 'losart[serve]'."""
EXAMPLE = "example: losart serve path/to/SDAR-1.7B-Chat --port 8000 --attention losa"
NEW_TOKENS = 2048  # where neither the command nor a chat's request says
KEYS_VARIABLE = "LOSART_API_KEY"
QUEUE = 4  # times as many generations wait as run


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_model(command)
    group = command.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="(127.0.0.1: this machine alone)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (8000)")
    group.add_argument(
        "--name", action="append", metavar="NAME", help="of the model; repeatable (MODEL, or its file's name)"
    )
    group.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help=f"that requests must have; repeatable (${KEYS_VARIABLE}, else none)",
    )
    group.add_argument(
        "--cors", action="append", default=[], metavar="ORIGIN", help="whose pages may ask; * is all (none)"
    )
    group.add_argument(
        "--max-queue", type=int, metavar="N", help="answers that wait; more get a 429 (4 * --max-sequences)"
    )
    group.add_argument(
        "--max-connections", type=positive, default=1000, metavar="N", help="more get a 503 (1000)"
    )
    group.add_argument("--max-body", type=memory, default="2M", metavar="SIZE", help="of a request (2M)")
    group.add_argument(
        "--max-prompt", type=positive, metavar="TOKENS", help="of a prompt (the model's positions)"
    )
    group.add_argument("--timeout", type=seconds, default=600.0, metavar="S", help="for an answer (600)")
    group.add_argument("--body-timeout", type=seconds, default=30.0, metavar="S", help="for a body (30)")
    group.add_argument(
        "--grace", type=seconds, metavar="S", help="for running answers, after SIGTERM (until they end)"
    )
    group.add_argument("--log-prompts", action="store_true", help="prompts and answers in the log, too")
    group.add_argument("--no-log", action="store_true", help="no line per request")
    add_engine(command)
    add_generation(command)


def run(args: argparse.Namespace) -> None:
    """Serve until a signal."""
    try:
        from losart.server.app import make_app
        from losart.server.serving import listen, make_server, serve, url
        from losart.server.settings import Settings
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("losart"):
            raise
        raise OptionError(f"serving needs {error.name}: pip install 'losart[serve]'") from None
    if args.max_queue is not None and args.max_queue < 0:
        raise OptionError(f"--max-queue must be 0 or more, not {args.max_queue}")
    if not 0 <= args.port < 65536:
        raise OptionError(f"--port must be from 0 to 65535, not {args.port}")
    keys = tuple(args.api_key or _keys_of_environment())
    if not keys and args.host not in ("localhost", "::1") and not args.host.startswith("127."):
        warnings.warn(
            f"any client that reaches {args.host} can ask this server: give it an --api-key", stacklevel=2
        )
    listener = listen(args.host, args.port)  # before the model, which takes longer
    model = load_model(
        args.model, args.device, args.dtype, args.weights, args.kv, args.adapter, args.merge, args.activations
    )
    engine = Engine(model, max_sequences=args.max_sequences, kv_memory=args.kv_memory)
    for file in args.prefix:
        engine.load_prefix(file)
    options = {"max_new_tokens": NEW_TOKENS} | generation_options(args)
    model.session(**options)  # which refuses options that are wrong for every request
    settings = Settings(
        names=tuple(args.name or [_name(args.model)]),
        api_keys=keys,
        origins=tuple(args.cors),
        queue=QUEUE * engine.max_sequences if args.max_queue is None else args.max_queue,
        largest_body=args.max_body,
        longest_prompt=args.max_prompt,
        seconds=args.timeout,
        body_seconds=args.body_timeout,
        log_prompts=args.log_prompts,
        options=options,
    )
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("losart.server").setLevel(logging.WARNING if args.no_log else logging.INFO)
    server = make_server(make_app(model, engine, settings), args.max_connections, args.grace)
    where = url(listener)
    told = f"losart: serving {settings.names[0]} at {where}/v1, and a chat at {where}"
    print(told, file=sys.stderr, flush=True)
    serve(server, listener)


def _name(model: str | None) -> str:
    """What a model is called: a hub id as it is, of a path the last part."""
    if model is None:
        return "small_checkpoint"
    path = Path(model)
    return path.resolve().name if path.exists() else model


def _keys_of_environment() -> list[Any]:
    key = os.environ.get(KEYS_VARIABLE)
    return [key] if key else []


def seconds(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be seconds, above 0, not {text!r}")
    return value
