"""GPTQ (arXiv 2210.17323) as AutoGPTQ and GPTQModel write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from losart.errors import ConfigError, TensorError
from losart.loaders.json_files import JsonObject
from losart.loaders.quantized.tensor import (
    FLOATS,
    WORD_BITS,
    Quantization,
    QuantizedTensor,
    check_groups,
    check_part,
    find_parts,
    unpacked,
    widened,
)
from losart.loaders.safetensors_files import MappedTensor

ZEROS_LESS_ONE = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format: what is added to the zeros of the file


class Gptq(Quantization):
    """`quant_method` "gptq": 4 and 8 bits, zeros of versions 1 and 2, columns in any order of groups."""

    harmless: ClassVar[tuple[str, ...]] = ("*.g_idx",)

    def __init__(self, config: JsonObject) -> None:
        self._bits = config.integer("bits")
        if self._bits not in (4, 8):
            raise config.error("bits", self._bits, "4 or 8")
        group = config.get("group_size")
        self._group = None if group in (None, -1) else config.checked_integer("group_size", group, 1)
        version = config.optional_text("checkpoint_format") or "gptq"
        if version not in ZEROS_LESS_ONE:
            raise config.error("checkpoint_format", version, f"one of {', '.join(ZEROS_LESS_ONE)}")
        self._added = ZEROS_LESS_ONE[version]
        dynamic = config.optional_object("dynamic")
        if dynamic is not None and dynamic.values:
            raise ConfigError(f"{config.file}: {config.prefix}dynamic is not supported")

    def find(
        self, name: str, shape: tuple[int, ...], saved: Mapping[str, MappedTensor]
    ) -> QuantizedTensor | None:
        module = name.removesuffix(".weight")
        if f"{module}.qweight" not in saved:
            return None
        parts = find_parts(module, {"qweight": True, "scales": True, "qzeros": True, "g_idx": False}, saved)
        rows, columns = shape
        per_word, group = WORD_BITS // self._bits, self._group or columns
        groups = -(-columns // group)
        if rows % per_word or columns % per_word:
            raise TensorError(f"{parts['qweight'].file}: {name!r}, {rows} x {columns}, is not of whole words")
        check_part(parts["qweight"], (columns // per_word, rows), ("int32",))
        check_part(parts["scales"], (groups, rows), FLOATS)
        check_part(parts["qzeros"], (groups, rows // per_word), ("int32",))
        check_groups(parts, columns, group)
        return GptqTensor(name, (rows, columns), f"int{self._bits}", group, parts, self._added)


@dataclass(frozen=True)
class GptqTensor(QuantizedTensor):
    """Codes [in * bits / 32, out] and zeros [groups, out * bits / 32] in words, scales [groups, out]."""

    added: int

    @property
    def _offset(self) -> int:
        return 1 << (self.bits - 1)  # codes and zeros of the file are 0 or more

    def codes(self, start: int, stop: int) -> np.ndarray:
        words = self.parts["qweight"].codes()[:, start:stop]
        return unpacked(np.ascontiguousarray(words.T), self.bits) - self._offset

    def scales(self, start: int, stop: int) -> np.ndarray:
        return widened(np.ascontiguousarray(self.parts["scales"].array()[:, start:stop].T))

    def zeros(self, start: int, stop: int) -> np.ndarray:
        per_word = WORD_BITS // self.bits
        first = start // per_word
        words = np.ascontiguousarray(self.parts["qzeros"].codes()[:, first : -(-stop // per_word)])
        zeros = unpacked(words, self.bits)[:, start - first * per_word : stop - first * per_word]
        # Of version 1 the largest number stands for 0, as in AutoGPTQ.
        return (np.ascontiguousarray(zeros.T) + self.added) % (1 << self.bits) - self._offset
