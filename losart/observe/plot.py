"""Pictures of a trace: density by pass and layer, the pages that were read, the tokens that were active."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from losart.errors import LosartError, OptionError, TraceError
from losart.observe.trace import Trace

TITLE_WIDTH = 90  # characters that fit over the panels
KINDS = ("both", "density", "pages", "active")
SPARSE_OPTIONS = ("budget", "page_size", "dense_layers", "first_pass", "commit")
LOSA_OPTIONS = ("active", "change_threshold", "selector", "drift", "candidates")
CLIP = 4  # powers of two around the threshold that are told apart


def density_map(trace: Trace) -> np.ndarray:
    """Density of each layer and pass: float [layers, passes], NaN where the prefix is empty."""
    rows = [[layer.density for layer in step.layers] for step in trace.passes]
    return np.array(rows, np.float64).T


def page_map(trace: Trace, layer: int | None = None) -> np.ndarray:
    """Share of kv heads that read each page: float [passes, pages], NaN past the prefix.

    Parameters
    ----------
    trace : Trace
    layer : int, optional
        Default: the mean over all layers.
    """
    chosen = range(trace.layers) if layer is None else [layer]
    counts = [-(-step.block_start // trace.page_size) for step in trace.passes]
    shares = np.full((len(counts), max(counts)), np.nan)
    for row, count, step in zip(shares, counts, trace.passes, strict=True):
        row[:count] = 0.0
        for index in chosen:
            for pages in step.layers[index].pages:
                row[pages] += 1 / (len(chosen) * trace.kv_heads)
    return shares


def active_map(trace: Trace) -> np.ndarray:
    """Which tokens were active, and how far they were from the threshold: float [layers * tokens, passes].

    Positive: active. The logarithm to base 2 of the change over the threshold, infinite where no change was
    measured or the threshold is none.
    """
    attention = trace.options["attention"]
    threshold = attention["change_threshold"] if attention["active"] == "auto" else 0.0
    columns = []
    for step in trace.passes:
        for layer in step.layers:
            active = np.isin(np.arange(trace.block_length), layer.active)
            column = np.where(active, np.inf, -np.inf)
            if layer.change is not None and threshold:
                with np.errstate(divide="ignore"):
                    column = np.log2(layer.change / threshold)
            columns.append(np.where(active, np.maximum(column, 0.0), np.minimum(column, 0.0)))
    return np.array(columns, np.float64).reshape(len(trace.passes), -1).T


def draw(trace: Trace, kind: str = "both", layer: int | None = None) -> Any:
    """Draw a trace.

    Parameters
    ----------
    trace : Trace
    kind : {"both", "density", "pages", "active"}
        "both" is density and pages.
    layer : int, optional
        Whose pages are shown; default: the mean over all layers.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    OptionError
        There is no such layer.
    TraceError
        The trace has no passes over a prefix.
    LosartError
        matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LosartError("plots need matplotlib: pip install 'losart[plot]'") from error
    if layer is not None and not 0 <= layer < trace.layers:
        raise OptionError(f"layer must be 0 to {trace.layers - 1}, not {layer}")
    if not any(step.block_start for step in trace.passes):
        raise TraceError("the trace has no pass over a prefix, so there is nothing to draw")
    panels = ("density", "pages") if kind == "both" else (kind,)
    figure = Figure(figsize=(8, 0.8 + 3.6 * len(panels)), layout="constrained", dpi=150)
    figure.suptitle(_title(trace), fontsize=9, parse_math=False)
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        _draw_panel(figure, axes, trace, panel, layer)
    return figure


def _title(trace: Trace) -> str:
    attention = trace.options["attention"]
    method = attention["method"]
    shown: tuple[str, ...] = () if method == "dense" else SPARSE_OPTIONS
    shown += LOSA_OPTIONS if method == "losa" else ()
    # Traces that are older than an option lack it.
    options = [f"{name}={attention[name]}" for name in shown if name in attention]
    line = ", ".join([method, f"block_length={trace.block_length}", *options])
    return "\n".join([*textwrap.wrap(trace.model, TITLE_WIDTH), *textwrap.wrap(line, TITLE_WIDTH)])


def _draw_panel(figure: Any, axes: Any, trace: Trace, panel: str, layer: int | None) -> None:
    limits, colours = (0, 1), None
    if panel == "density":
        values, origin, line, unit = density_map(trace), "lower", axes.axvline, "density"
        axes.set(xlabel="pass (lines: a new block begins)", ylabel="layer", title="share of the prefix read")
    elif panel == "active":
        active, limits = active_map(trace), (-CLIP, CLIP)
        values, origin, line = active.clip(*limits), "upper", axes.axvline
        measured = "change over the threshold, log2; " if np.isfinite(active).any() else ""
        colours, unit = "RdBu_r", f"{measured}red: active"
        axes.set(xlabel="pass (lines: a new block begins)", title="active tokens")
        axes.set_ylabel(f"layer * {trace.block_length} + token of the block")
    else:
        values, origin, line = page_map(trace, layer), "upper", axes.axhline
        unit = "share of kv heads that read"
        of = "mean over the layers" if layer is None else f"layer {layer}"
        axes.set(ylabel="pass", title=f"pages read, {of}")
        axes.set_xlabel(f"page of the prefix ({trace.page_size} positions each)")
    image = axes.imshow(
        values, colours, aspect="auto", interpolation="nearest", origin=origin, vmin=limits[0], vmax=limits[1]
    )
    for index in _block_starts(trace):
        line(index - 0.5, color="white", linewidth=0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.colorbar(image, ax=axes, label=unit)


def _block_starts(trace: Trace) -> list[int]:
    """Passes that are the first of their block, but for the first block."""
    starts = [step.block_start for step in trace.passes]
    return [index for index in range(1, len(starts)) if starts[index] != starts[index - 1]]
