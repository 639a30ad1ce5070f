"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from losart.attention import POLICIES
from losart.config.options import CHOICES, OPTIONS
from losart.config.precision import ACTIVATIONS, DTYPES, KV_FORMATS
from losart.engine.sampling import STRATEGIES
from losart.measure.random_checkpoint import FAMILY_SIZES
from losart.quantization import LOADED, MERGED

Group = argparse._ArgumentGroup
ATTENTION_DETAILS = {
    "change_threshold": "losa with --active auto: a query's relative change that recomputes its token (0.05)",
    "selector": "losa: what ranks pages for a query (auto)",
    "drift": "losa: against which pass change is measured (auto)",
    "candidates": "losa: tokens that can be recomputed (all)",
    "page_size": "a multiple of 16 (16)",
    "dense_layers": "first layers that stay dense (0)",
    "first_pass": "how the first pass over a block reads the prefix (auto: as the method does it)",
    "commit": "(dense)",
    "planner": "where a GPU's tokens and pages are selected (auto)",
}


def add_model(command: argparse.ArgumentParser, required: bool = False) -> None:
    """Which checkpoint, and how it is loaded."""
    command.add_argument(
        "model",
        metavar="MODEL",
        nargs=None if required else "?",
        help="checkpoint directory, hub id or GGUF file"
        + ("" if required else " (the small one that comes with losart)"),
    )
    add_loading(command)


def add_model_option(command: argparse.ArgumentParser) -> None:
    """The same, for commands whose first arguments are files."""
    command.add_argument(
        "--model",
        metavar="MODEL",
        help="checkpoint directory, hub id or GGUF file (the small one that comes with losart)",
    )
    add_loading(command)


def add_loading(command: argparse.ArgumentParser) -> None:
    """How a checkpoint is loaded."""
    command.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    command.add_argument("--dtype", choices=["auto", *DTYPES], default="auto")
    command.add_argument(
        "--weights", choices=LOADED, default="auto", help="round them as they are loaded (no)"
    )
    command.add_argument(
        "--kv", choices=["auto", *KV_FORMATS], default="auto", help="hold keys and values in 8 bits (no)"
    )
    command.add_argument(
        "--adapter", metavar="PATH", help="a LoRA as PEFT writes it, which is merged into the weights (none)"
    )
    command.add_argument(
        "--merge", choices=MERGED, default="dtype", help="what quantized matrices become by it (dtype)"
    )
    command.add_argument(
        "--activations",
        choices=ACTIVATIONS,
        default="auto",
        help="round those of many tokens to fp8 for weights in fp8 (no)",
    )


def add_model_or_size(command: argparse.ArgumentParser) -> None:
    """Which checkpoint, or random weights of which size."""
    command.add_argument(
        "model", metavar="MODEL", nargs="?", help="checkpoint directory, hub id or GGUF file (random weights)"
    )
    command.add_argument(
        "--family", choices=FAMILY_SIZES, default="sdar", help="of the random weights, without MODEL (sdar)"
    )
    sizes = "; ".join(f"{family}: {', '.join(sizes)}" for family, sizes in FAMILY_SIZES.items())
    command.add_argument(
        "--size", metavar="SIZE", help=f"of the random weights (sdar 0.6B, else tiny). {sizes}"
    )


def add_generation(command: argparse.ArgumentParser) -> None:
    """The options of `Model.generate`, absent from the namespace unless the command line has them."""
    group = add_decoding(command)
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same output")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    structure = group.add_mutually_exclusive_group()
    structure.add_argument(
        "--json-schema",
        type=json_or_file,
        metavar="FILE_OR_JSON",
        help="answer with JSON that this schema describes",
    )
    structure.add_argument(
        "--regex", metavar="REGEX", help="answer with what this regular expression matches"
    )
    structure.add_argument(
        "--grammar", type=text_of, metavar="FILE", help="answer with what this Lark grammar describes"
    )
    group = command.add_argument_group("attention", argument_default=argparse.SUPPRESS)
    group.add_argument("--attention", choices=POLICIES, help="how passes read the prefix (dense)")
    group.add_argument("--budget", type=int, metavar="N", help="prefix positions that a query selects (256)")
    group.add_argument(
        "--active",
        type=active,
        metavar="N",
        help="losa: recomputed tokens, their fraction of the block (0.3), or auto: those that changed (auto)",
    )
    add_attention_details(group)


def add_logprobs(command: argparse.ArgumentParser) -> None:
    """The option of `Model.generate`, for commands that print results as JSON."""
    command.add_argument(
        "--logprobs",
        type=int,
        metavar="K",
        default=argparse.SUPPRESS,
        help="give each token's log-probability, and the K most probable tokens in its place (no)",
    )


def add_decoding(command: argparse.ArgumentParser, new_tokens: str = "128") -> Group:
    """How blocks are decoded, whatever the attention; `new_tokens` is what help calls the default."""
    group = command.add_argument_group("generation", argument_default=argparse.SUPPRESS)
    group.add_argument("--max-new-tokens", type=int, metavar="N", help=f"new tokens at most ({new_tokens})")
    group.add_argument("--block-length", type=int, metavar="N", help="tokens of a block (the checkpoint's)")
    group.add_argument("--denoising-steps", type=int, metavar="N", help="passes per block (the block length)")
    group.add_argument("--remasking", choices=STRATEGIES, help="(low_confidence_dynamic)")
    group.add_argument("--confidence-threshold", type=float, metavar="P", help="(0.85)")
    group.add_argument(
        "--sub-block-length", type=int, metavar="N", help="tokens of which all are fixed before the next (no)"
    )
    group.add_argument(
        "--editing-threshold", type=float, metavar="P", help="above it fixed tokens are changed (1: never)"
    )
    group.add_argument(
        "--max-post-steps", type=int, metavar="N", help="passes that only change fixed tokens, at most (16)"
    )
    group.add_argument("--eb-threshold", type=float, metavar="NATS", help="(0.35)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (0)")
    group.add_argument("--top-k", type=int, metavar="K", help="0 keeps all (0)")
    group.add_argument("--top-p", type=float, metavar="P", help="(1.0)")
    group.add_argument("--stop-token-ids", type=int, nargs="*", metavar="ID", help="(the checkpoint's)")
    group.add_argument("--mask-token-id", type=int, metavar="ID", help="(the checkpoint's)")
    return group


def add_attention_details(group: Group) -> None:
    """The attention's options but the method, its budget and its active tokens."""
    for name, text in ATTENTION_DETAILS.items():
        kind: dict[str, Any] = {"type": float if name == "change_threshold" else int, "metavar": "N"}
        if name in CHOICES:
            kind = {"choices": CHOICES[name]}
        group.add_argument(f"--{name.replace('_', '-')}", help=text, **kind)


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those that the command line has."""
    return {name: value for name, value in vars(args).items() if name in OPTIONS}


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not {text!r}")
    return int(text)


def json_or_file(text: str) -> str:
    """JSON: the argument itself where it looks like an object, else what a file has."""
    return text if text.lstrip().startswith("{") else text_of(text)


def text_of(file: str) -> str:
    """The text of a file."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"cannot be read: {error}") from None


def active(text: str) -> int | float | str:
    """A count of tokens, a fraction of the block, or "auto"."""
    if text == "auto":
        return text
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    raise argparse.ArgumentTypeError(
        f"must be a count of tokens, such as 5, a fraction of the block, such as 0.3, or auto, not {text!r}"
    )


def listed(item: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """The type of an argument that is a comma-separated list."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(item(part.strip()) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a list such as 1,2, not {text!r}") from None

    return parse
