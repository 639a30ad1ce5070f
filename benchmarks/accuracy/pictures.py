"""Pictures of the accuracy study: accuracy against density, and where queries change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from losart.errors import LosartError
from losart.eval.locality import KINDS, TOP


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LosartError("pictures need matplotlib: pip install 'losart[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _method(setting: dict[str, Any]) -> str:
    """What a setting is but for its budget."""
    words = [setting["attention"]]
    words += [f"{setting['active']} active"] if "active" in setting else []
    words += [f"above {setting['change_threshold']:g}"] if "change_threshold" in setting else []
    words += [f"pages by {setting['selector']}"] if "selector" in setting else []
    return ", ".join(words)


def draw_accuracy(
    cells: Sequence[dict[str, Any]], settings: Sequence[dict[str, Any]], tasks: Sequence[str], length: int
) -> Any:
    """One panel per task, one line per method through its budgets, over the density of its sparse passes.

    Parameters
    ----------
    cells : list of dict
        Of study.py's JSON.
    settings : list of dict
        Those to show.
    tasks : list of str
    length : int

    Returns
    -------
    matplotlib.figure.Figure
    """
    columns = 2
    figure = _figure(9, 0.6 + 3.2 * -(-len(tasks) // columns))
    figure.suptitle(f"accuracy against density of sparse passes, {length:,} tokens (bars: 95% intervals)")
    shown = [cell for cell in cells if cell["length"] == length and cell["setting"] in settings]
    panels = figure.subplots(-(-len(tasks) // columns), columns, squeeze=False).flat
    for axes, task in zip(panels, tasks, strict=False):
        of_task = [cell for cell in shown if cell["task"] == task]
        for cell in of_task:
            if cell["attention"] == "dense":
                axes.axhline(100 * cell["accuracy"], color="black", linestyle="--", label="dense")
        sparse = [cell for cell in of_task if cell["sparse_density"] is not None]
        # In the order of the settings, so that a method has one colour in all panels.
        for method in dict.fromkeys(_method(s) for s in settings if s["attention"] != "dense"):
            points = [cell for cell in sparse if _method(cell["setting"]) == method]
            points.sort(key=lambda cell: cell["budget"])
            middle = [100 * cell["accuracy"] for cell in points]
            bars = [
                [100 * max(0.0, cell["accuracy"] - cell["low"]) for cell in points],
                [100 * max(0.0, cell["high"] - cell["accuracy"]) for cell in points],
            ]
            densities = [100 * cell["sparse_density"] for cell in points]
            axes.errorbar(densities, middle, bars, marker="o", markersize=3, capsize=2, label=method)
        axes.set(title=task, xlabel="density, %", ylabel="right, %", ylim=(-3, 103))
        if sparse and all(cell["sparse_density"] for cell in sparse):  # it can be 0
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")  # 10, not a power of ten
        axes.legend(fontsize=7)
    return figure


def draw_locality(layers: Sequence[dict[str, Any]]) -> Any:
    """Share of the change in the tokens that changed most, and in each kind of token, by layer."""
    figure = _figure(9, 3.6)
    names = ["all" if layer["layer"] is None else str(layer["layer"]) for layer in layers]
    left, right = figure.subplots(1, 2)
    for layer, name in zip(layers, names, strict=True):
        shares = [100 * layer["top"][str(count)] for count in TOP]
        left.plot(TOP, shares, marker="o", label=f"layer {name}" if name != "all" else "all layers")
    left.set(xlabel="tokens that changed most", ylabel="share of the change, %", ylim=(0, 103), xticks=TOP)
    left.legend(fontsize=7)
    below = [0.0] * len(layers)
    for kind in KINDS:
        heights = [100 * layer["change"][kind] for layer in layers]
        right.bar(names, heights, bottom=below, label=kind)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    right.set(xlabel="layer", ylabel="share of the change, %")
    right.legend(fontsize=7, loc="lower right")
    return figure
