"""`losart eval`: accuracy of attention settings, as a table and as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losart.api.model import Model
from losart.attention import POLICIES
from losart.cli.arguments import (
    active,
    add_attention_details,
    add_decoding,
    add_model,
    generation_options,
    listed,
)
from losart.cli.progress import Progress, load_model
from losart.errors import OptionError

if TYPE_CHECKING:
    from losart.eval import EvalConfig

HELP = "measure the accuracy of attention methods"
DESCRIPTION = """Ask a model questions with checkable answers about long documents, and print how many it
answers with each attention setting, and what each reads. Lists are separated by commas; all combinations
are measured."""
EXAMPLE = (
    "example: losart eval path/to/SDAR-1.7B-Chat --tasks key,keys-4 --lengths 4096 "
    "--attention dense,losa,quest --budgets 64,128 --active auto,5 --samples 100 --json eval.json"
)
SWEPT = ("attention", "seed", "active")  # of the evaluation, not of its generations


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_model(command)
    group = command.add_argument_group("evaluation", argument_default=argparse.SUPPRESS)
    group.add_argument("--tasks", type=listed(str), metavar="LIST", help="(all)")
    group.add_argument("--lengths", type=listed(int), metavar="LIST", help="tokens of a prompt (1024,4096)")
    group.add_argument("--attention", type=listed(str), metavar="LIST", help=f"({','.join(POLICIES)})")
    group.add_argument(
        "--budgets", type=listed(int), metavar="LIST", help="positions that a query selects (128)"
    )
    group.add_argument(
        "--active",
        type=listed(active),
        metavar="LIST",
        help="losa: recomputed tokens, fractions, auto (auto)",
    )
    group.add_argument("--samples", type=int, metavar="N", help="questions in each cell (50)")
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same questions (0)")
    group.add_argument("--style", help="auto, symbols or english (auto: english for models that chat)")
    group.add_argument(
        "--longbench",
        metavar="DIR",
        default=None,
        help="LongBench's questions instead, from its files; --tasks are then its data sets, --lengths "
        "the longest prompt, --samples the first questions of each",
    )
    group.add_argument(
        "--locality",
        action="store_true",
        default=False,
        help="instead of accuracy: how the change of queries between passes is spread over a block's tokens",
    )
    group.add_argument(
        "--kl",
        metavar="REFERENCE",
        nargs="?",
        const="",
        default=None,
        help="instead of accuracy: how far distributions are from those of another checkpoint with dense "
        "attention (the same one, without --weights and --kv)",
    )
    group.add_argument(
        "--text",
        metavar="FILE",
        default=None,
        help="--kl, --locality: pieces of this text in place of the tasks' prompts",
    )
    group.add_argument("--json", metavar="FILE", default=None, help="write the figures here after each cell")
    add_attention_details(add_decoding(command, "enough for the answers"))


def run(args: argparse.Namespace) -> None:
    """Measure, and print a table."""
    for name in getattr(args, "attention", ()):
        if name not in POLICIES:
            raise OptionError(f"attention must be one of {', '.join(POLICIES)}, not {name!r}")
    if args.text is not None and args.kl is None and not args.locality:
        raise OptionError("--text is for --kl and --locality")
    if args.kl is not None:
        _run_divergence(args)
    elif args.locality:
        _run_locality(args)
    elif args.longbench is None:
        _run_tasks(args)
    else:
        _run_longbench(args)


def _run_tasks(args: argparse.Namespace) -> None:
    from losart.cli.eval_report import CELL_COLUMNS, JsonReport, Table
    from losart.eval import check_config, evaluate

    config = _config(args, "tasks", "lengths", "attention", "budgets", "active", "samples", "seed", "style")
    model = load_model(
        args.model, args.device, args.dtype, args.weights, args.kv, args.adapter, args.merge, args.activations
    )
    style = check_config(model, config)
    facts = _facts(args, model, config) | {"style": style, "samples": config.samples}
    with Progress("asking", "questions") as progress:
        report = Table(CELL_COLUMNS, JsonReport(args.json, facts), progress)
        evaluate(model, config, on_cell=report.add, progress=progress)


def _run_longbench(args: argparse.Namespace) -> None:
    from losart.cli.eval_report import SCORE_COLUMNS, JsonReport, Table
    from losart.eval.longbench import evaluate_longbench
    from losart.eval.longbench_data import find_datasets

    if "style" in args:
        raise OptionError("--style is for losart's own tasks, not for --longbench")
    lengths = getattr(args, "lengths", (None,))
    if len(lengths) > 1:
        raise OptionError("--longbench takes one of --lengths, the longest prompt")
    datasets = args.tasks if "tasks" in args else find_datasets(Path(args.longbench))
    config = _config(args, "attention", "budgets", "active", "samples", "seed")
    model = load_model(
        args.model, args.device, args.dtype, args.weights, args.kv, args.adapter, args.merge, args.activations
    )
    with Progress("asking", "questions") as progress:
        report = Table(SCORE_COLUMNS, JsonReport(args.json, _facts(args, model, config)), progress)
        evaluate_longbench(
            model,
            args.longbench,
            datasets,
            config,
            samples=getattr(args, "samples", None),
            max_prompt_tokens=lengths[0],
            on_score=report.add,
            progress=progress,
        )


def _run_locality(args: argparse.Namespace) -> None:
    from losart.cli.eval_report import LOCALITY_COLUMNS, JsonReport, Table
    from losart.eval import check_config
    from losart.eval.locality import measure_locality

    for name in ("attention", "budgets", "active"):
        if name in args:
            raise OptionError(f"--{name} is not for --locality, which decodes densely")
    if args.longbench is not None:
        raise OptionError("--longbench and --locality exclude each other")
    config = _config(args, "tasks", "lengths", "samples", "seed", "style", attention=("dense",))
    device = "cpu" if args.device == "auto" else args.device
    model = load_model(
        args.model, device, args.dtype, args.weights, args.kv, args.adapter, args.merge, args.activations
    )
    text = None if args.text is None else Path(args.text)
    style = check_config(model, config, questions=text is None)
    facts = _facts(args, model, config) | {"style": style, "text": args.text, "samples": config.samples}
    with Progress("asking", "prompts") as progress:
        report = Table(LOCALITY_COLUMNS, JsonReport(args.json, facts, "layers"), progress)
        for layer in measure_locality(model, config, text=text, progress=progress):
            report.add(layer)


def _run_divergence(args: argparse.Namespace) -> None:
    from losart.cli.eval_report import DIVERGENCE_COLUMNS, JsonReport, Table
    from losart.eval import check_config
    from losart.eval.divergence import measure_divergence

    if args.locality or args.longbench is not None:
        raise OptionError("--kl, --locality and --longbench exclude each other")
    config = _config(args, "tasks", "lengths", "attention", "budgets", "active", "samples", "seed", "style")
    model = load_model(
        args.model, args.device, args.dtype, args.weights, args.kv, args.adapter, args.merge, args.activations
    )
    text = None if args.text is None else Path(args.text)
    check_config(model, config, questions=text is None)
    itself = not args.kl and args.weights == args.kv == "auto"
    reference = model
    if not itself:
        adapter = None if args.kl else args.adapter
        reference = load_model(args.kl or args.model, model.device, args.dtype, adapter=adapter)
    facts = _facts(args, model, config) | {
        "reference": args.kl or args.model or "small_checkpoint",
        "reference_weights": list(reference.weights),
        "reference_kv": reference.kv,
        "text": args.text,
        "samples": config.samples,
    }
    with Progress("comparing", "prompts") as progress:
        report = Table(DIVERGENCE_COLUMNS, JsonReport(args.json, facts, "rows"), progress)
        measure_divergence(reference, model, config, text=text, on_row=report.add, progress=progress)


def _config(args: argparse.Namespace, *names: str, **fixed: Any) -> EvalConfig:
    """From those of these fields that the command line has, `fixed` ones, and the options of generations."""
    from losart.eval import EvalConfig

    options = {name: value for name, value in generation_options(args).items() if name not in SWEPT}
    fields = {name: getattr(args, name) for name in names if name in args}
    return EvalConfig(**fields, **fixed, options=options)


def _facts(args: argparse.Namespace, model: Model, config: EvalConfig) -> dict[str, Any]:
    return {
        "model": args.model or "small_checkpoint",
        "adapter": args.adapter,
        "device": model.device,
        "dtype": model.dtype,
        "weights": list(model.weights),
        "kv": model.kv,
        "activations": model.activations,
        "seed": config.seed,
        "options": config.options,
    }
