"""AWQ (arXiv 2306.00978) as AutoAWQ writes it for its gemm kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from losart.errors import TensorError
from losart.loaders.json_files import JsonObject
from losart.loaders.quantized.tensor import (
    FLOATS,
    WORD_BITS,
    Quantization,
    QuantizedTensor,
    check_part,
    find_parts,
    unpacked,
    widened,
)
from losart.loaders.safetensors_files import MappedTensor

BITS = 4
PER_WORD = WORD_BITS // BITS
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the row that each place of a word holds


class Awq(Quantization):
    """`quant_method` "awq", `version` "gemm", 4 bits."""

    def __init__(self, config: JsonObject) -> None:
        version = (config.optional_text("version") or "gemm").lower()
        if version != "gemm":
            raise config.error("version", version, "'gemm'")
        bits = config.optional_integer("bits") or config.optional_integer("w_bit") or BITS
        if bits != BITS:
            raise config.error("bits", bits, str(BITS))
        group = next((value for key in ("group_size", "q_group_size") if (value := config.get(key))), 128)
        self._group = None if group == -1 else config.checked_integer("group_size", group, 1)
        if not config.boolean("zero_point", True):
            raise config.error("zero_point", False, "true")

    def find(
        self, name: str, shape: tuple[int, ...], saved: Mapping[str, MappedTensor]
    ) -> QuantizedTensor | None:
        module = name.removesuffix(".weight")
        if f"{module}.qweight" not in saved:
            return None
        parts = find_parts(module, dict.fromkeys(("qweight", "scales", "qzeros"), True), saved)
        rows, columns = shape
        group = self._group or columns
        groups = -(-columns // group)
        if rows % PER_WORD:
            raise TensorError(f"{parts['qweight'].file}: {name!r}, {rows} x {columns}, is not of whole words")
        check_part(parts["qweight"], (columns, rows // PER_WORD), ("int32",))
        check_part(parts["scales"], (groups, rows), FLOATS)
        check_part(parts["qzeros"], (groups, rows // PER_WORD), ("int32",))
        return AwqTensor(name, (rows, columns), f"int{BITS}", group, parts)


@dataclass(frozen=True)
class AwqTensor(QuantizedTensor):
    """Codes [in, out / 8] and zeros [groups, out / 8], eight to a word, scales [groups, out]."""

    def codes(self, start: int, stop: int) -> np.ndarray:
        return self._rows("qweight", start, stop)

    def scales(self, start: int, stop: int) -> np.ndarray:
        return widened(np.ascontiguousarray(self.parts["scales"].array()[:, start:stop].T))

    def zeros(self, start: int, stop: int) -> np.ndarray:
        return self._rows("qzeros", start, stop)

    def _rows(self, end: str, start: int, stop: int) -> np.ndarray:
        first = start // PER_WORD
        words = np.ascontiguousarray(self.parts[end].codes()[:, first : -(-stop // PER_WORD)])
        codes = unpacked(words, BITS, ORDER)[:, start - first * PER_WORD : stop - first * PER_WORD]
        return np.ascontiguousarray(codes.T) - (1 << (BITS - 1))  # those of the file are 0 or more
