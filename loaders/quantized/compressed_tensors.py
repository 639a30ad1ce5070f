"""The format of llm-compressor and vLLM (github.com/vllm-project/compressed-tensors)."""

from __future__ import annotations

import re
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
    bits_of,
    check_groups,
    check_part,
    find_parts,
    unpacked,
    widened,
)
from losart.loaders.safetensors_files import MappedTensor

PACKED, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
FORMATS = (PACKED, INT, FLOAT, NAIVE)
STRATEGIES = ("tensor", "channel", "group", "block")
CLASSES = ("Linear",)  # of modules, which targets may name


@dataclass(frozen=True)
class Scheme:
    """How the matrices of one of the `config_groups` are quantized.

    Attributes
    ----------
    targets : tuple of str
        Names of modules, classes, or with "re:" patterns of names.
    packed : bool
        Whether codes are packed in words of 32 bits.
    dtype : {"int4", "int8", "float8"}
    symmetric : bool
        Whether there are no zeros.
    block : (int, int)
        Rows and columns that share a scale; 0: all.
    """

    targets: tuple[str, ...]
    packed: bool
    dtype: str
    symmetric: bool
    block: tuple[int, int]

    @classmethod
    def read(cls, keys: JsonObject, format: str) -> Scheme:
        """One of the `config_groups`."""
        format = keys.optional_text("format") or format
        if format not in FORMATS:
            raise keys.error("format", format, f"one of {', '.join(FORMATS)}")
        targets = keys.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise keys.error("targets", targets, "a list of strings")
        for target in targets:
            try:
                re.compile(target.removeprefix("re:"))
            except re.error as error:
                if target.startswith("re:"):
                    raise keys.error("targets", target, f"a regular expression ({error})") from error
        weights = keys.optional_object("weights")
        if weights is None:
            raise keys.missing("weights")
        bits, kind = weights.integer("num_bits"), weights.optional_text("type") or "int"
        dtype = {"int": f"int{bits}", "float": f"float{bits}"}.get(kind)
        if dtype not in (("int4", "int8") if format == PACKED else ("int8", "float8")):
            raise weights.error("num_bits", bits, f"of a supported {kind} in the format {format}")
        strategy = weights.optional_text("strategy")
        group = weights.get("group_size")
        strategy = strategy or ("tensor" if group is None else "channel" if group == -1 else "group")
        if strategy not in STRATEGIES:
            raise weights.error("strategy", strategy, f"one of {', '.join(STRATEGIES)}")
        block = {"tensor": (0, 0), "channel": (1, 0)}.get(strategy)
        if strategy == "group":
            block = 1, weights.integer("group_size")
        elif strategy == "block":
            sizes = weights.get("block_structure")
            if not isinstance(sizes, list) or len(sizes) != 2:
                raise weights.error("block_structure", sizes, "a list of two integers")
            rows, columns = (weights.checked_integer("block_structure", size, 1) for size in sizes)
            block = rows, columns
        assert block is not None
        symmetric = weights.boolean("symmetric", True)
        return cls(tuple(targets), format == PACKED, dtype, symmetric, block)


class CompressedTensors(Quantization):
    """`quant_method` "compressed-tensors"; activations are as `losart.load` has them, whatever it says."""

    harmless: ClassVar[tuple[str, ...]] = (
        *("*.input_scale", "*.input_zero_point", "*.output_scale", "*.output_zero_point"),
        *("*.k_scale", "*.v_scale", "*.q_scale", "*.weight_g_idx", "*.weight_zero_point"),
    )

    def __init__(self, config: JsonObject) -> None:
        if (config.optional_text("quantization_status") or "compressed") not in ("compressed", "frozen"):
            raise config.error("quantization_status", config.get("quantization_status"), "'compressed'")
        sparse = config.optional_object("sparsity_config")
        if sparse is not None and (sparse.optional_text("format") or "dense") != "dense":
            raise sparse.error("format", sparse.get("format"), "'dense'")
        if config.get("transform_config"):
            raise ConfigError(f"{config.file}: {config.prefix}transform_config is not supported")
        groups = config.optional_object("config_groups")
        if groups is None:
            raise config.missing("config_groups")
        format = config.optional_text("format") or ""
        self._schemes = []
        for name in groups.values:
            keys = groups.optional_object(name)
            if keys is None:
                raise groups.error(name, None, "an object")
            self._schemes.append(Scheme.read(keys, format))

    def find(
        self, name: str, shape: tuple[int, ...], saved: Mapping[str, MappedTensor]
    ) -> QuantizedTensor | None:
        module = name.removesuffix(".weight")
        if f"{module}.weight_scale" not in saved:
            return None
        scheme = self._scheme_of(module, saved[f"{module}.weight_scale"])
        codes = "weight_packed" if scheme.packed else "weight"
        needed = {codes: True, "weight_scale": True, "weight_zero_point": not scheme.symmetric}
        parts = find_parts(module, needed | {"weight_shape": scheme.packed, "weight_g_idx": False}, saved)
        if "weight_g_idx" in parts:
            parts["g_idx"] = parts.pop("weight_g_idx")
        rows, columns = shape
        block_rows, block_columns = scheme.block[0] or rows, scheme.block[1] or columns
        groups = -(-columns // block_columns)
        per_word = WORD_BITS // bits_of(scheme.dtype)
        if scheme.packed:
            check_part(parts[codes], (rows, -(-columns // per_word)), ("int32",))
            check_part(parts["weight_shape"], (2,), ("int32", "int64"))
            if tuple(parts["weight_shape"].codes().tolist()) != shape:
                part = parts["weight_shape"]
                raise TensorError(f"{part.file}: tensor {part.name!r} says another shape than {list(shape)}")
        else:
            check_part(parts[codes], (rows, columns), (scheme.dtype,))
        scales: tuple[int, ...] = (-(-rows // block_rows), groups)
        if parts["weight_scale"].size == 1 == scales[0] * scales[1]:
            scales = parts["weight_scale"].shape  # a number may have any
        check_part(parts["weight_scale"], scales, FLOATS)
        if scheme.symmetric:
            parts.pop("weight_zero_point", None)
        elif scheme.packed and block_rows == 1:
            check_part(parts["weight_zero_point"], (-(-rows // per_word), groups), ("int32",))
        else:
            check_part(parts["weight_zero_point"], scales, ("int8",))
        check_groups(parts, columns, block_columns)
        return CompressedTensor(name, (rows, columns), scheme.dtype, block_columns, parts, block_rows)

    def _scheme_of(self, module: str, scale: MappedTensor) -> Scheme:
        """The scheme whose targets name a module: by its name before those that name its class."""
        for matches in (_names, _names_class):
            for scheme in self._schemes:
                if any(matches(target, module) for target in scheme.targets):
                    return scheme
        raise TensorError(
            f"{scale.file}: tensor {scale.name!r} is of a module that no config_groups of "
            "quantization_config name"
        )


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module or module.endswith(f".{target}")


def _names_class(target: str, module: str) -> bool:
    return target in CLASSES


@dataclass(frozen=True)
class CompressedTensor(QuantizedTensor):
    """Codes [out, in], scales [out / block_rows, groups]; packed ones and their zeros with an offset."""

    block_rows: int

    @property
    def _offset(self) -> int:
        return 1 << (self.bits - 1)

    def codes(self, start: int, stop: int) -> np.ndarray:
        if "weight_packed" in self.parts:
            words = self.parts["weight_packed"].codes(start, stop)
            return unpacked(words, self.bits)[:, : self.shape[1]] - self._offset
        codes = self.parts["weight"].codes(start, stop)
        return codes if self.dtype == "float8" else codes.astype(np.int32)

    def scales(self, start: int, stop: int) -> np.ndarray:
        scales = widened(self.parts["weight_scale"].array().reshape(-1, self.groups))
        return scales[np.arange(start, stop) // self.block_rows]

    def zeros(self, start: int, stop: int) -> np.ndarray | None:
        part = self.parts.get("weight_zero_point")
        if part is None:
            return None
        if part.dtype == "int8":
            zeros = part.codes().reshape(-1, self.groups).astype(np.int32)
            return zeros[np.arange(start, stop) // self.block_rows]
        per_word = WORD_BITS // self.bits
        first = start // per_word
        words = np.ascontiguousarray(part.codes()[first : -(-stop // per_word)].T)
        zeros = unpacked(words, self.bits)[:, start - first * per_word : stop - first * per_word]
        return np.ascontiguousarray(zeros.T) - self._offset
