"""`losart eval`: accuracy of attention settings, as a table and as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

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

EXAMPLE = (
    "example: losart eval path/to/SDAR-1.7B-Chat --tasks key,keys-4 --lengths 4096 "
    "--attention dense,losa,quest --budgets 64,128 --active 3,5 --samples 100 --json eval.json"
)
SWEPT = ("attention", "seed", "active")  # of the evaluation, not of its generations


def add_command(commands: Any) -> None:
    """Add this command to the subparsers of `losart`."""
    command = commands.add_parser(
        "eval",
        help="measure the accuracy of attention methods",
        description="Ask a model questions with checkable answers about long documents, and print how many "
        "it answers with each attention setting, and what each reads. Lists are given with commas; all "
        "combinations are measured.",
        epilog=EXAMPLE,
    )
    command.set_defaults(run=run)
    add_model(command)
    group = command.add_argument_group("evaluation", argument_default=argparse.SUPPRESS)
    group.add_argument("--tasks", type=listed(str), metavar="LIST", help="(all)")
    group.add_argument("--lengths", type=listed(int), metavar="LIST", help="tokens of a prompt (1024,4096)")
    group.add_argument("--attention", type=listed(str), metavar="LIST", help=f"({','.join(POLICIES)})")
    group.add_argument(
        "--budgets", type=listed(int), metavar="LIST", help="positions that a query selects (128)"
    )
    group.add_argument(
        "--active", type=listed(active), metavar="LIST", help="losa: recomputed tokens, or fractions (5)"
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
    group.add_argument("--json", metavar="FILE", default=None, help="write figures here after each cell")
    add_attention_details(add_decoding(command, "enough for the answers"))


def run(args: argparse.Namespace) -> None:
    """Measure, and print a table."""
    given = vars(args)
    for name in given.get("attention", ()):
        if name not in POLICIES:
            raise OptionError(f"attention must be one of {', '.join(POLICIES)}, not {name!r}")
    options = {name: value for name, value in generation_options(args).items() if name not in SWEPT}
    if args.locality:
        _run_locality(args, given, options)
    elif args.longbench is None:
        _run_tasks(args, given, options)
    else:
        _run_longbench(args, given, options)


def _run_tasks(args: argparse.Namespace, given: dict[str, Any], options: dict[str, Any]) -> None:
    from losart.cli.eval_report import CELL_COLUMNS, JsonReport, Table
    from losart.eval import EvalConfig, check_config, evaluate

    names = ("tasks", "lengths", "attention", "budgets", "active", "samples", "seed", "style")
    config = EvalConfig(**{name: given[name] for name in names if name in given}, options=options)
    model = load_model(args.model, args.device, args.dtype)
    style = check_config(model, config)
    facts = _facts(args, model, config) | {"style": style, "samples": config.samples}
    with Progress("asking", "questions") as progress:
        report = Table(CELL_COLUMNS, JsonReport(args.json, facts), progress)
        evaluate(model, config, on_cell=report.add, progress=progress)


def _run_longbench(args: argparse.Namespace, given: dict[str, Any], options: dict[str, Any]) -> None:
    from losart.cli.eval_report import SCORE_COLUMNS, JsonReport, Table
    from losart.eval import EvalConfig
    from losart.eval.longbench import evaluate_longbench
    from losart.eval.longbench_data import find_datasets

    if "style" in given:
        raise OptionError("--style is for losart's own tasks, not for --longbench")
    lengths = given.get("lengths", (None,))
    if len(lengths) > 1:
        raise OptionError("--longbench takes one of --lengths, the longest prompt")
    datasets = given.get("tasks") or find_datasets(Path(args.longbench))
    names = ("attention", "budgets", "active", "samples", "seed")
    config = EvalConfig(**{name: given[name] for name in names if name in given}, options=options)
    model = load_model(args.model, args.device, args.dtype)
    with Progress("asking", "questions") as progress:
        report = Table(SCORE_COLUMNS, JsonReport(args.json, _facts(args, model, config)), progress)
        evaluate_longbench(
            model,
            args.longbench,
            datasets,
            config,
            samples=given.get("samples"),
            max_prompt_tokens=lengths[0],
            on_score=report.add,
            progress=progress,
        )


def _run_locality(args: argparse.Namespace, given: dict[str, Any], options: dict[str, Any]) -> None:
    from losart.cli.eval_report import LOCALITY_COLUMNS, JsonReport, Table
    from losart.eval import EvalConfig, check_config
    from losart.eval.locality import measure_locality

    for name in ("attention", "budgets", "active"):
        if name in given:
            raise OptionError(f"--{name} is not for --locality, which decodes densely")
    if args.longbench is not None:
        raise OptionError("--longbench and --locality exclude each other")
    names = ("tasks", "lengths", "samples", "seed", "style")
    config = EvalConfig(
        **{name: given[name] for name in names if name in given}, attention=("dense",), options=options
    )
    model = load_model(args.model, "cpu" if args.device == "auto" else args.device, args.dtype)
    style = check_config(model, config)
    facts = _facts(args, model, config) | {"style": style, "samples": config.samples}
    with Progress("asking", "questions") as progress:
        report = Table(LOCALITY_COLUMNS, JsonReport(args.json, facts, "layers"), progress)
        for layer in measure_locality(model, config, progress=progress):
            report.add(layer)


def _facts(args: argparse.Namespace, model: Any, config: Any) -> dict[str, Any]:
    return {
        "model": args.model or "small_checkpoint",
        "device": model.device,
        "dtype": model.dtype,
        "seed": config.seed,
        "options": config.options,
    }
