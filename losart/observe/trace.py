"""Trace files: what every pass of a generation read, as JSON lines; docs/guide/watching.md has the format."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from losart.config.model import ModelConfig
from losart.config.options import GenerationConfig
from losart.errors import TraceError
from losart.observe.step import GenerationResult, ObservedLayer, Step
from losart.version import __version__

FORMAT = 1  # raised when a reader of the format before would misread a file
PASS_FIELDS = ("kind", "block_start", "block", "fixed")  # and "layers"


class Configured(Protocol):
    """What generates with options: a `Session`."""

    @property
    def options(self) -> GenerationConfig: ...

    @property
    def model_config(self) -> ModelConfig: ...


class TraceWriter:
    """An observer that writes a trace file, one line per pass.

    session = model.session(attention="losa")
    with losart.TraceWriter("run.jsonl", session) as trace:
        trace.finish(session.generate(prompt, observer=trace))

    Parameters
    ----------
    file : path
        Is overwritten.
    session : Session
        Whose passes are written, and whose own options, not those of one generation.
    name : str
        Of the model, for titles.

    Raises
    ------
    OSError
        The file cannot be written.
    """

    def __init__(self, file: str | os.PathLike[str], session: Configured, name: str = "") -> None:
        model, options = session.model_config, session.options
        self._file = open(file, "w", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        self._write(
            {
                "losart_trace": FORMAT,
                "losart": __version__,
                "model": name,
                "layers": model.num_layers,
                "kv_heads": model.num_kv_heads,
                "page_size": options.attention.page_size,
                "block_length": options.block_length,
                "options": dataclasses.asdict(options),
            }
        )

    def __call__(self, step: Step) -> None:
        """Write one pass."""
        values = {name: getattr(step, name) for name in PASS_FIELDS}
        values |= {"edited": step.edited} if step.edited else {}
        self._write(values | {"layers": [_layer_line(layer) for layer in step.layers]})

    def finish(self, result: GenerationResult) -> None:
        """Write the last line: what the generation gave."""
        self._write(dataclasses.asdict(result))

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Write what is buffered, and close the file."""
        self._file.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _layer_line(layer: ObservedLayer) -> dict[str, Any]:
    everything = {"active": "all", "pages": "all"}
    lists = {"active": layer.active.tolist(), "pages": [pages.tolist() for pages in layer.pages]}
    # float32 in as few digits as it needs.
    change = {} if layer.change is None else {"change": [float(str(x)) for x in layer.change]}
    return (everything if layer.dense else lists) | {"density": layer.density} | change


@dataclass(frozen=True)
class Trace:
    """A trace file's content.

    Attributes
    ----------
    losart, model : str
        Version of losart that wrote it; name of the model.
    layers, kv_heads, page_size, block_length : int
    options : dict
        Of the generation; those of the attention under "attention".
    passes : list of Step
    result : dict or None
        Text, token_ids, finish_reason and stats; None when the generation was cut off.
    """

    losart: str
    model: str
    layers: int
    kv_heads: int
    page_size: int
    block_length: int
    options: dict[str, Any]
    passes: list[Step]
    result: dict[str, Any] | None


def read_trace(file: str | os.PathLike[str]) -> Trace:
    """Read a trace file.

    Raises
    ------
    TraceError
        It is not a trace, or damaged; the message names the file and the line.
    OSError
        It cannot be read.
    """
    lines = _lines(Path(file))
    number, header = next(lines, (1, {}))
    if header.pop("losart_trace", None) != FORMAT:
        raise TraceError(f"{file}: line 1: not the header of a losart trace of format {FORMAT}")
    passes: list[Step] = []
    result = None
    try:
        trace = Trace(**header, passes=passes, result=None)
        for number, line in lines:  # noqa: B007 - for the message below
            if "finish_reason" in line:
                result = line
            else:
                passes.append(_pass(line, trace))
    except TraceError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TraceError(f"{file}: line {number}: not a line of a losart trace: {error}") from error
    return dataclasses.replace(trace, result=result)


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open("rb") as opened:
        for number, text in enumerate(opened, 1):
            try:
                line = json.loads(text)
            except ValueError as error:  # JSON's and UTF-8's errors are among these
                raise TraceError(f"{file}: line {number}: not JSON: {error}") from error
            if not isinstance(line, dict):
                raise TraceError(f"{file}: line {number}: not a JSON object")
            yield number, line


def _pass(line: dict[str, Any], trace: Trace) -> Step:
    if len(line["layers"]) != trace.layers:
        raise ValueError(f"it has {len(line['layers'])} layers, the header says {trace.layers}")
    where = line["block_start"], len(line["block"])
    layers = tuple(_layer(layer, *where, trace) for layer in line["layers"])
    fields = {name: line[name] for name in PASS_FIELDS}
    return Step(**fields, layers=layers, edited=line.get("edited", []))


def _layer(line: dict[str, Any], prefix_length: int, tokens: int, trace: Trace) -> ObservedLayer:
    pages = -(-prefix_length // trace.page_size)
    dense = line["pages"] == "all"
    lists = [range(pages)] * trace.kv_heads if dense else line["pages"]
    if len(lists) != trace.kv_heads:
        raise ValueError(f"pages of {len(lists)} kv heads, the header says {trace.kv_heads}")
    active = range(tokens) if dense else line["active"]
    arrays = tuple(np.asarray(ids, np.int64) for ids in lists)
    if any(ids.size and not 0 <= ids.min() <= ids.max() < pages for ids in arrays):
        raise ValueError(f"a page that is not among the {pages} of the prefix")
    density, change = line["density"], line.get("change")  # traces of losart 0.1.0 have no change
    return ObservedLayer(
        np.asarray(active, np.int64),
        arrays,
        None if density is None else float(density),
        dense,
        None if change is None else np.asarray(change, np.float32),
    )
