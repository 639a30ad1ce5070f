"""Quantizes a checkpoint layer by layer, each by what its matrices are given by those before it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from losart.backends.base import ExpertWeights
from losart.backends.cpu.backend import CpuBackend
from losart.backends.cpu.convert import widen
from losart.config.model import ModelConfig
from losart.config.options import generation_config
from losart.config.precision import FORMATS, Precision
from losart.engine.batch import PassBatch, PassKind, SequencePass
from losart.errors import DataError, NumericalError, OptionError, TensorError
from losart.loaders import Checkpoint, MappedTensor
from losart.models.transformer import FEED_FORWARD, LayerWeights, Transformer, attention_parts
from losart.quantization.gptq import gptq
from losart.quantization.rounding import RoundedTensor, WeightFormat

TOKENS, LEAST_TOKENS = 16384, 256  # of a text that are used, and that it, or an expert, must have
SEQUENCE = 1024  # tokens that see one another
RECORDED = 2048  # inputs that are multiplied at a time


@dataclass(frozen=True)
class CalibratedTensor(RoundedTensor):
    """A checkpoint's matrix whose codes are made when they are first asked for.

    Attributes
    ----------
    find : callable
        Codes [out, in] and scales [out, groups] of a matrix by its canonical name.
    canonical : str
    """

    find: Callable[[str], tuple[np.ndarray, np.ndarray]]
    canonical: str

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, None]:
        codes, scales = self.find(self.canonical)
        return codes[start:stop], scales[start:stop], None


class Inputs:
    """What enters a matrix.

    Parameters
    ----------
    columns : int
        Of the matrix.

    Attributes
    ----------
    rows : int
        So many inputs.
    """

    def __init__(self, columns: int) -> None:
        self.rows = self._added = 0
        self._columns = columns
        self._total: np.ndarray | None = None  # most of many experts' never take the memory
        self._waiting: list[np.ndarray] = []

    def add(self, x: np.ndarray) -> None:
        """Some more inputs [any, in]."""
        self.rows += len(x)
        self._waiting.append(x.copy())
        if self.rows - self._added >= RECORDED:
            self._total = self.hessian()

    def hessian(self) -> np.ndarray:
        """The sum of x x^T over all inputs x, float64 [in, in]."""
        total = np.zeros((self._columns, self._columns)) if self._total is None else self._total
        if self._waiting:
            inputs = np.concatenate(self._waiting)
            self._waiting, self._added = [], self.rows
            with np.errstate(over="ignore", invalid="ignore"):  # gptq says so
                total += inputs.T @ inputs
        return total


class Recorder(CpuBackend):
    """Runs one layer on rows that it is given, and keeps what enters its matrices.

    Attributes
    ----------
    given : float32 [tokens, hidden]
        What comes in place of embeddings.
    total : float32 [tokens, hidden]
        What the layer makes of it.
    inputs : dict of int to Inputs
        By the matrix's id; those that there are, are added to.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.given = self.total = np.empty((0, 0), np.float32)
        self.inputs: dict[int, Inputs] = {}

    def embed(self, table: Any, batch: PassBatch) -> np.ndarray:
        return self.given

    def add_rms_norm(self, x: Any, delta: Any, gain: Any) -> tuple[np.ndarray, np.ndarray]:
        self.total, y = super().add_rms_norm(x, delta, gain)
        return self.total, y

    def propose(self, hidden: Any, head: Any, batch: PassBatch) -> Any:
        return None

    def _products(self, parts: Sequence[tuple[np.ndarray, Any]], few: bool | None) -> np.ndarray:
        for x, weight in parts:
            if id(weight) in self.inputs:
                self.inputs[id(weight)].add(x)
        return super()._products(parts, few)


class Calibration:
    """A checkpoint's layers, one after the other, on some text and on blocks of it with masked tokens.

    What comes out of a quantized layer goes into the next one. Text is prefilled; blocks see the text before
    them, and have a random share of their tokens masked, as passes find them. An expert's matrices are
    calibrated with the tokens that go to it, and rounded to nearest where these are too few.

    Parameters
    ----------
    checkpoint : Checkpoint
    ids : sequence of int
        The text's.
    format : WeightFormat
    seed : int
        Of what is masked.

    Attributes
    ----------
    matrices, nearest : int
        Of the layers so far, and those of them that were rounded to nearest: fewer than LEAST_TOKENS rows
        entered them.

    Raises
    ------
    OptionError
        The checkpoint names no mask token.
    DataError
        The text is shorter than a block.
    """

    def __init__(self, checkpoint: Checkpoint, ids: list[int], format: WeightFormat, seed: int = 0) -> None:
        self._checkpoint, self._format = checkpoint, format
        config = checkpoint.config
        self._options = generation_config(config, {})
        length = self._options.block_length
        size = min(max(SEQUENCE, length), len(ids), config.max_positions) // length * length
        if not size:
            raise DataError(f"calibration: the text has {len(ids)} tokens, and a block {length}")
        count = len(ids) // size
        self._ids = np.array(ids[: count * size], np.int64).reshape(count, size)
        rng = np.random.default_rng(seed)
        blocks = self._ids.reshape(count, -1, length)
        shares = rng.random((*blocks.shape[:2], 1))
        self._masked = rng.random(blocks.shape) < shares
        self._masked[..., -1] |= ~self._masked.any(axis=2)
        noisy = np.where(self._masked, self._options.mask_token_id, blocks).reshape(count, size)
        embedding = checkpoint.tensors["embed"]
        assert isinstance(embedding, MappedTensor), "no checkpoint quantizes it"
        table = embedding.array()
        self._text, self._noisy = (widen(table[rows]) for rows in (self._ids, noisy))
        self.matrices = self.nearest = 0
        self._layer = -1
        self._found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def tensors(self) -> dict[str, CalibratedTensor]:
        """The layers' matrices by their canonical names; they must be read layer by layer."""
        return {
            name: CalibratedTensor(tensor, self._format, self.find, name)
            for name, tensor in self._checkpoint.tensors.items()
            if name.startswith("layers.")
            and not name.endswith(".router")
            and len(tensor.shape) == 2
            and isinstance(tensor, MappedTensor)
        }

    def find(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales of a matrix; asking for one of a later layer than before drops those before."""
        layer = int(name.split(".")[1])
        with self._lock:
            while self._layer < layer:
                self._layer += 1
                self._calibrate(self._layer)
            return self._found[name.split(".", 2)[2]]

    def _calibrate(self, layer: int) -> None:
        prefix, checkpoint = f"layers.{layer}.", self._checkpoint
        config = _layer_alone(checkpoint.config, layer)
        backend = Recorder(config, Precision.of(checkpoint.dtype))
        tensors: dict[str, Any] = {
            name.replace(prefix, "layers.0."): tensor
            for name, tensor in checkpoint.tensors.items()
            if name.startswith(prefix) or name in ("embed", "final_norm")
        }
        transformer = Transformer(config, tensors, backend)
        joined = list(_matrices(transformer.layers[0], tensors))
        for weight, parts in joined:
            backend.inputs[id(weight)] = Inputs(tensors[f"layers.0.{parts[0]}"].shape[1])
        self._run(transformer, backend)
        self._found = {}
        for weight, parts in joined:
            inputs = backend.inputs.pop(id(weight))
            hessian = None if inputs.rows < LEAST_TOKENS else inputs.hessian()
            for part in parts:
                tensor = tensors[f"layers.0.{part}"]
                self._found[part] = self._codes(tensor, hessian)
                own = self._found.__getitem__
                tensors[f"layers.0.{part}"] = CalibratedTensor(tensor, self._format, own, part)
        after = Transformer(config, tensors, backend)
        self._text, self._noisy = self._run(after, backend)

    def _codes(self, tensor: MappedTensor, hessian: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales; None: rounded to nearest."""
        self.matrices += 1
        if hessian is None:
            self.nearest += 1
            codes, scales, _ = RoundedTensor(tensor, self._format).rows(0, tensor.shape[0])
            return codes, scales
        try:
            return gptq(_float32(tensor), hessian, self._format, FORMATS[tensor.dtype])
        except NumericalError as error:
            raise NumericalError(f"calibration: tensor {tensor.name!r}: {error}") from error

    def _run(self, transformer: Transformer, backend: Recorder) -> tuple[np.ndarray, np.ndarray]:
        """The layer's outputs for the text, and for its blocks with masked tokens."""
        options, length = self._options, self._options.block_length
        text, noisy = np.empty_like(self._text), np.empty_like(self._noisy)
        count, size = self._ids.shape
        caches = []
        for number in range(count):
            cache = transformer.new_cache(options, size)
            cache.reserve(size)
            step = max(length, backend.prefill_tokens // length * length)
            for start in range(0, size, step):
                rows = slice(start, min(size, start + step))
                ids = self._ids[number, rows]
                backend.given = self._text[number, rows]
                transformer.forward(PassBatch((SequencePass(PassKind.PREFILL, ids, start, options, cache),)))
                text[number, rows] = backend.total
                cache.advance(len(ids))
            caches.append(cache)
        together = max(1, backend.batch_rows // length)
        for start in range(0, size, length):
            rows = slice(start, start + length)
            for first in range(0, count, together):
                numbers = range(first, min(count, first + together))
                backend.given = self._noisy[first : first + together, rows].reshape(-1, text.shape[2])
                passes = tuple(
                    SequencePass(
                        PassKind.FIRST,
                        self._ids[number, rows],  # which the backend does not look at
                        start,
                        options,
                        caches[number],
                        masked=np.flatnonzero(self._masked[number, start // length]),
                    )
                    for number in numbers
                )
                transformer.forward(PassBatch(passes))
                noisy[first : first + together, rows] = backend.total.reshape(len(numbers), length, -1)
        return text, noisy


def _layer_alone(config: ModelConfig, layer: int) -> ModelConfig:
    """The configuration of a model that has one layer of another's."""
    experts = config.experts_of(layer)
    if experts is not None:
        experts = replace(experts, dense_layers=frozenset())
    return replace(config, num_layers=1, experts=experts)


def _matrices(layer: LayerWeights, tensors: Mapping[str, Any]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """A layer's matrices that are quantized, and the tensors that each joins."""
    for name, parts in attention_parts(tensors, "layers.0.").items():
        yield getattr(layer, name), parts
    for name, parts in FEED_FORWARD.items():
        held = getattr(layer.feed_forward, name)
        if not isinstance(layer.feed_forward, ExpertWeights):
            yield held, parts
            continue
        for expert, weight in enumerate(held):
            yield weight, tuple(f"experts.{expert}.{part}" for part in parts)


def _float32(tensor: MappedTensor) -> np.ndarray:
    values = widen(tensor.array())
    if not np.isfinite(values).all():
        raise TensorError(f"{tensor.file}: tensor {tensor.name!r} has values that are not finite")
    return values


def calibration_ids(checkpoint: Checkpoint, file: Path) -> list[int]:
    """Token ids of the first part of a text.

    Raises
    ------
    OptionError
        The checkpoint has no tokenizer.
    DataError
        The file is no text, or has too little of it.
    """
    if checkpoint.tokenizer is None:
        raise OptionError(f"calibration: {checkpoint.path} has no tokenizer")
    ids = checkpoint.tokenizer.encode_file(file, TOKENS)
    if len(ids) < LEAST_TOKENS:
        raise DataError(f"{file}: has {len(ids)} tokens; calibration needs {LEAST_TOKENS} or more")
    return ids
