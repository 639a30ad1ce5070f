"""`losart inspect`: what a checkpoint is, and the memory that it takes."""

from __future__ import annotations

import argparse
import json
from typing import Any

from losart.cli.arguments import add_model
from losart.cli.tables import formats, print_rows, size
from losart.loaders import open_checkpoint
from losart.measure.inspection import inspection

HELP = "show a checkpoint's sizes, memory and default options"
DESCRIPTION = """Show a checkpoint's architecture and sizes, the memory that its weights and its KV cache
take, whether there is so much, and the options that a generation runs with by default. Reads no
weights."""
EXAMPLE = "example: losart inspect path/to/SDAR-1.7B-Chat --context 8192 40960 --dtype float16"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_model(command)
    command.add_argument(
        "--context",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="lengths to show the size of the KV cache for (4096, 32768 and the model's positions)",
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Print the facts."""
    checkpoint = open_checkpoint(args.model, args.adapter)
    facts = inspection(
        checkpoint, args.device, args.dtype, args.context, args.weights, args.kv, args.merge, args.activations
    )
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print_rows(_rows(facts))


def _rows(facts: dict[str, Any]) -> list[tuple[str, object]]:
    sizes, disk = facts["sizes"], facts["dtype_on_disk"]
    ends, options = facts["end_tokens"], facts["options"]
    no_options = "the mask token must be given: mask_token_id"
    return [
        ("checkpoint", facts["path"]),
        ("architecture", _architecture(facts)),
        *([("adapter", _adapter(facts["adapter"]))] if facts["adapter"] else []),
        ("layers", sizes["layers"]),
        ("hidden, FFN", f"{sizes['hidden']}, {sizes['ffn']}"),
        *([("experts", _experts(sizes["experts"]))] if sizes["experts"] else []),
        ("heads", f"{sizes['heads']}, {sizes['kv_heads']} of keys and values, {sizes['head_dim']} wide"),
        ("vocabulary", f"{sizes['vocabulary']}{', tied embeddings' if sizes['tied_embeddings'] else ''}"),
        ("positions", f"{sizes['positions']}, rope {_rope(sizes['rope'])}"),
        ("parameters", f"{facts['parameters']:,}"),
        ("on disk", f"{size(facts['bytes_on_disk'])} in {', '.join(disk)}"),
        ("weights", f"{size(facts['weight_bytes'])} on {facts['device']}: {formats(facts['matrix_bytes'])}"),
        *([("activations", "of many tokens in fp8")] if facts["activations"] == "fp8" else []),
        ("fits", _fits(facts)),
        *((f"KV at {kv['context']}", f"{size(kv['bytes'])} in {facts['kv']}") for kv in facts["kv_cache"]),
        ("decoding", "; ".join(facts["decoding"]) or "masked tokens of a block are fixed pass by pass"),
        ("block length", facts["block_length"] or "not said"),
        ("mask token", _token(facts["mask_token"]) if facts["mask_token"] else "not said"),
        ("end tokens", ", ".join(map(_token, ends)) or "none"),
        ("tokenizer", "yes" if facts["tokenizer"] else "no"),
        ("chat template", "yes" if facts["chat_template"] else "no"),
        ("options", no_options if options is None else ", ".join(f"{k}={v!r}" for k, v in options.items())),
    ]


def _architecture(facts: dict[str, Any]) -> str:
    family, base = facts["architecture"], facts["base"]
    return family if base is None else f"{base}, which fills in blocks as {family}"


def _adapter(adapter: dict[str, Any]) -> str:
    ranks = " to ".join(str(rank) for rank in sorted({min(adapter["ranks"]), max(adapter["ranks"])}))
    parts = [
        f"{adapter['products']} matrices by products of rank {ranks}" if adapter["products"] else "",
        f"{adapter['replaced']} tensors replaced" if adapter["replaced"] else "",
        f"{adapter['rows']} rows of embeddings replaced" if adapter["rows"] else "",
    ]
    merged = f", merged in {', '.join(adapter['merged_in'])}" if adapter["merged_in"] else ""
    return f"{adapter['path']}: {', '.join(filter(None, parts))}{merged}"


def _experts(experts: dict[str, Any]) -> str:
    groups = f", of {experts['kept_groups']} of {experts['groups']} groups" if experts["groups"] > 1 else ""
    shared = f", {experts['shared']} for all" if experts["shared"] else ""
    dense = f", none in layers {experts['dense_layers']}" if experts["dense_layers"] else ""
    width = f"{experts['intermediate_size']} wide, {experts['scores']} scores"
    return f"{experts['count']} {width}, {experts['per_token']} per token{groups}{shared}{dense}"


def _fits(facts: dict[str, Any]) -> str:
    free, positions = facts["free_bytes"], facts["fitting_positions"]
    if free is None:
        return "unknown: the free memory cannot be read"
    there = f"{size(free)} are free on {facts['device']}"
    if not positions:
        return f"no, {there}"
    return f"yes, {there}: the weights and {positions} of {facts['sizes']['positions']} positions"


def _rope(rope: dict[str, Any]) -> str:
    scaling = "" if rope["kind"] == "default" else f", {rope['kind']} by {rope['factor']:g}"
    return f"theta {rope['theta']:g}{scaling}"


def _token(token: dict[str, Any]) -> str:
    return f"{token['id']} {token['text']!r}" if token["text"] else str(token["id"])
