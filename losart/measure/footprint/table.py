"""The figures of both sides as a Markdown table, beside losart's targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OURS, THEIRS = "losart", "torch + transformers"


@dataclass(frozen=True)
class Row:
    """A figure: its title, its key, how it is written, and its target on the CPU and on CUDA.

    A target is the largest share of their figure that ours should be.
    """

    title: str
    key: str
    write: Callable[[Any], str]
    cpu: float | None = None
    cuda: float | None = None


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _held(sizes: dict[str, int]) -> str:
    return ", ".join(f"{_mebibytes(count)} in {name}" for name, count in sizes.items())


def _total(figure: Any) -> float:
    return sum(figure.values()) if isinstance(figure, dict) else figure


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s"


ROWS = (
    Row("installed", "installed_bytes", _mebibytes, cpu=1 / 6, cuda=1 / 10),
    Row("packages", "package_count", str),
    Row("import", "import_seconds", _seconds, cpu=1 / 10),
    Row("resident after import", "imported_bytes", _mebibytes),
    Row("weights", "weights", _held),
    Row("keys and values", "kv", _held),
    Row("resident after generating, beyond the weights", "generated_bytes", _mebibytes, cpu=1 / 2),
    Row("resident after generating, without mapped files", "generated_anonymous_bytes", _mebibytes),
    Row("peak, beyond the weights", "peak_bytes", _mebibytes),
    Row("device memory beyond weights and KV", "device_bytes", _mebibytes, cuda=1 / 4),
    Row("process start to first token", "first_token_seconds", _seconds),
    Row("from there to the last token", "generate_seconds", _seconds),
)


def markdown(figures: dict[str, Any]) -> str:
    """What was measured, the table, and which targets are missed.

    Parameters
    ----------
    figures : dict
        As `losart footprint --json` writes them.
    """
    ours, theirs = figures["losart"], figures["transformers"]
    other_build = figures["device"] == "cpu" and theirs["torch_cuda"]
    lines = [f"| | {OURS} | {THEIRS} | ratio | target |", "|---|---|---|---|---|"]
    missed = []
    for row in ROWS:
        if row.key not in ours or row.key not in theirs:
            continue
        one, other = _total(ours[row.key]), _total(theirs[row.key])
        target = row.cuda if figures["device"] == "cuda" else row.cpu
        if other_build and row.key == "installed_bytes":
            target = None
        if target is not None and one > target * other:
            missed.append(row.title)
        ratio = f"{other / one:.1f}x" if one > 0 and other > 0 else ""
        verdict = "missed" if row.title in missed else "met"
        goal = "" if target is None else f"{1 / target:.0f}x, {verdict}"
        lines.append(
            f"| {row.title} | {row.write(ours[row.key])} | {row.write(theirs[row.key])} | {ratio} | {goal} |"
        )
    notes = [f"Targets missed: {', '.join(missed)}."] if missed else []
    if other_build:
        notes.append("torch's CPU build was not found: what is installed is its CUDA build, without target.")
    if "requirements" in ours:
        required = [" and ".join(side["requirements"]) for side in (ours, theirs)]
        notes.append(
            "Measured in existing environments: installed size, without .pyc files, and packages are "
            f"of {required[0]}, and of {required[1]}, each with all that it requires."
        )
        missing = [*ours["not_installed"], *theirs["not_installed"]]
        if missing:
            notes.append(f"Required but not installed, so not counted: {', '.join(missing)}.")
    return "\n".join([f"{description(figures)}\n", *lines, *(f"\n{note}" for note in notes)]) + "\n"


def description(figures: dict[str, Any]) -> str:
    """What the figures were measured on, in one line."""
    versions, cuda = figures["versions"], figures["transformers"]["torch_cuda"]
    build = f"CUDA {cuda}" if cuda else "CPU"
    packages = (
        f"losart {versions['losart']}, torch {versions['torch']} ({build} build), transformers "
        f"{versions['transformers']}"
    )
    if "checkpoint" not in figures:
        return f"{figures['system']}, Python {figures['python']}; {packages}"
    machine = [figures["cpu"], f"{figures['threads']} threads", *filter(None, [figures["gpu"]])]
    return (
        f"{', '.join(machine)}; "
        f"{figures['checkpoint']} in {', '.join(figures['dtype_on_disk'])} "
        f"({_mebibytes(figures['bytes_on_disk'])}), "
        f"{figures['prompt_tokens']} prompt and {figures['new_tokens']} new tokens; {packages}"
    )
