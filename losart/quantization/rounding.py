"""Round to nearest: a matrix as codes, and a scale per row or group of columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from losart.backends.cpu.convert import float32_of, narrow, widen
from losart.config.checks import is_int
from losart.config.precision import FORMATS, Format
from losart.errors import OptionError, TensorError
from losart.loaders import Checkpoint, MappedTensor, QuantizedTensor
from losart.loaders.gguf.tensors import scales_and_zeros
from losart.loaders.quantized.float8 import FLOAT8_VALUES

WEIGHTS = ("int8", "int4", "fp8")
INT4_GROUP = 64  # columns that share a scale, unless somebody says otherwise
_DTYPES = {"int8": "int8", "int4": "int4", "fp8": "float8"}  # of codes
_FLOAT8_LARGEST = 448.0
_FLOAT8_CODES = FLOAT8_VALUES[:127].astype(np.float64)
_FLOAT8_MIDDLES = (_FLOAT8_CODES[1:] + _FLOAT8_CODES[:-1]) / 2  # exact, as are all sums of neighbours


@dataclass(frozen=True)
class WeightFormat:
    """How matrices are quantized.

    Attributes
    ----------
    name : {"int8", "int4", "fp8"}
    group : int or None
        Columns that share a scale; None: all of a row.

    Raises
    ------
    OptionError
        There is no such format, or it has no such groups.
    """

    name: str
    group: int | None = None

    def __post_init__(self) -> None:
        if self.name not in WEIGHTS:
            raise OptionError(f"weights must be one of {', '.join(WEIGHTS)}, not {self.name!r}")
        if self.group is not None and not (is_int(self.group) and self.group > 0 and self.group % 8 == 0):
            raise OptionError(f"group must be a multiple of 8 above 0, not {self.group!r}")
        if self.name == "fp8" and self.group is not None:
            raise OptionError("fp8 has a scale per row, and no groups")

    @classmethod
    def by_default(cls, name: str, group: int | None = None) -> WeightFormat:
        """The format of a name, `group` None for its usual groups: 64 columns for int4, else a row."""
        return cls(name, INT4_GROUP if group is None and name == "int4" else group)


@dataclass(frozen=True)
class RoundedTensor:
    """A checkpoint's matrix rounded to codes and scales, some rows at a time.

    Attributes
    ----------
    source : MappedTensor or MergedTensor
    format : WeightFormat

    Raises
    ------
    OptionError
        The groups do not divide its columns.
    """

    source: Any
    format: WeightFormat

    def __post_init__(self) -> None:
        if self.shape[1] % self.group:
            raise OptionError(
                f"{self.source.file}: groups of {self.group} do not divide the {self.shape[1]} columns of "
                f"tensor {self.source.name!r}"
            )

    @property
    def name(self) -> str:
        """The matrix's."""
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's: (out, in)."""
        return self.source.shape

    @property
    def dtype(self) -> str:
        """Of the codes: "int4", "int8" or "float8"."""
        return _DTYPES[self.format.name]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.format.group or self.shape[1]

    @property
    def parameters(self) -> str:
        """Those of the matrix, if it is merged."""
        return getattr(self.source, "parameters", "")

    @property
    def scale_dtype(self) -> str:
        """Whose numbers scales are."""
        return self.source.dtype

    uses_zeros = False
    has_invalid_codes = False
    in_order = True  # groups are of consecutive columns

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, None]:
        """Codes of some rows, int8 [rows, in], or float8's bits, uint8; scales, float32 [rows, groups].

        There are no zeros. Scales are numbers of the matrix's own dtype, and codes are rounded by them.

        Raises
        ------
        TensorError
            A value is not finite.
        """
        values = float32_of(self.source, start, stop, threads=False)  # the caller may be one of several
        if not np.isfinite(values).all():
            raise TensorError(f"{self.source.file}: tensor {self.name!r} has values that are not finite")
        groups = values.reshape(len(values), -1, self.group)
        scales = outermost_scales(groups, self.format.name, FORMATS[self.source.dtype])
        with np.errstate(over="ignore"):
            scaled = (groups / scales[:, :, None]).reshape(values.shape)
        return nearest_codes(scaled, self.format.name), scales, None

    def float32(self, start: int, stop: int) -> np.ndarray:
        """Some rows of the matrix that codes and scales stand for."""
        codes, scales, _ = self.rows(start, stop)
        values = decoded(codes, self.format.name)
        return (values.reshape(*scales.shape, -1) * scales[:, :, None]).reshape(codes.shape)

    def stored(self) -> Iterable[MappedTensor]:
        """What it is made of."""
        return self.source.stored()

    def release(self) -> None:
        """Return the matrix's pages to the operating system."""
        self.source.release()


def rounded_tensors(
    checkpoint: Checkpoint, tensors: Mapping[str, Any], weights: WeightFormat, head: WeightFormat | None
) -> dict[str, Any]:
    """A checkpoint's tensors, merged or not, with the matrices of its layers rounded, and perhaps its head.

    Raises
    ------
    OptionError
        The checkpoint is quantized, its head is its embedding, or groups do not divide a matrix.
    """
    if head is not None and "head" not in tensors:
        raise OptionError("the head is the embedding (tie_word_embeddings), which is not quantized")
    rounded: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in FORMATS:
            raise OptionError(f"{checkpoint.path}: is quantized; quantize the checkpoint that it was made of")
        matrix = name.startswith("layers.") and not name.endswith(".router")
        format = head if name == "head" else weights if matrix else None
        rounds = format is not None and len(tensor.shape) == 2
        rounded[name] = RoundedTensor(tensor, format) if rounds and format is not None else tensor
    return rounded


def requantized(
    values: np.ndarray, like: QuantizedTensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Rows of a matrix, float32, rounded to the format and in the groups of another.

    Returns
    -------
    codes : int8 [rows, in], or float8's bits, uint8
    scales : float32 [rows, groups]
        Numbers of the dtype of the other's.
    zeros : [rows, groups] or None
        Where groups of the other have zeros: int32, or float32 as the other's.
    """
    rows, columns = values.shape
    padded = np.pad(values, ((0, 0), (0, -columns % like.group)))  # 0 is a number of every group
    groups, held = padded.reshape(rows, -1, like.group), FORMATS[like.scale_dtype]
    name = "fp8" if like.dtype == "float8" else like.dtype
    if not like.uses_zeros:
        scales, zeros = outermost_scales(groups, name, held), None
        with np.errstate(over="ignore"):
            codes = nearest_codes(groups / scales[:, :, None], name)
    elif not like.whole_zeros:
        low = groups.min(axis=2)
        steps = widen(narrow((groups.max(axis=2) - low) / np.float32(15), held))
        minima = widen(narrow(low, held))
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            scaled = np.rint((groups - minima[:, :, None]) / steps[:, :, None])
        codes = np.where(steps[:, :, None] == 0, 0, np.clip(scaled, 0, 15) - 8).astype(np.int8)
        scales, zeros = scales_and_zeros(steps, minima)
    else:
        half = 1 << (like.bits - 1)
        low, high = np.minimum(groups.min(axis=2), 0), np.maximum(groups.max(axis=2), 0)
        scales = widen(narrow((high - low) / np.float32(2 * half - 1), held))
        scales[scales == 0] = 1
        zeros = np.clip(np.rint(-low / scales), 0, 2 * half - 1).astype(np.int32) - half
        with np.errstate(over="ignore"):
            scaled = np.rint(groups / scales[:, :, None]) + zeros[:, :, None]
        codes = np.clip(scaled, -half, half - 1).astype(np.int8)
    return codes.reshape(rows, -1)[:, :columns], scales, zeros


def outermost_scales(groups: np.ndarray, name: str, held: Format) -> np.ndarray:
    """Scales with which the value of largest magnitude of each group has the outermost code.

    Of groups [rows, groups, columns], as a format holds them; 1 where that would be 0.
    """
    if name == "int4":  # of 16 codes -8 is the outermost: a scale has the sign that brings the value there
        most = np.take_along_axis(groups, np.abs(groups).argmax(axis=2, keepdims=True), axis=2)[:, :, 0]
        exact = most / np.float32(-8)
    else:
        exact = np.abs(groups).max(axis=2) / np.float32(127 if name == "int8" else _FLOAT8_LARGEST)
    scales = widen(narrow(exact, held))
    scales[scales == 0] = 1  # of a group of zeros, or of values too small for the format
    return scales


def decoded(codes: np.ndarray, name: str) -> np.ndarray:
    """The numbers that codes stand for without their scale, float32."""
    return FLOAT8_VALUES[codes] if name == "fp8" else codes.astype(np.float32)


def nearest_codes(scaled: np.ndarray, name: str) -> np.ndarray:
    """The nearest codes, int8, or of fp8 their bits, uint8; ties to even."""
    if name != "fp8":
        lowest, highest = (-8, 7) if name == "int4" else (-127, 127)
        return np.clip(np.rint(scaled), lowest, highest).astype(np.int8)
    magnitude = np.abs(scaled.astype(np.float64))
    codes = np.searchsorted(_FLOAT8_MIDDLES, magnitude, side="left")
    inner = np.minimum(codes, len(_FLOAT8_MIDDLES) - 1)
    codes += (magnitude == _FLOAT8_MIDDLES[inner]) & (codes % 2 == 1)
    return (np.minimum(codes, 126) | np.signbit(scaled) << 7).astype(np.uint8)
