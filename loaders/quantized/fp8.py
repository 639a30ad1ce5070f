"""FP8 as DeepSeek and Qwen write it: a scale per block of a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from losart.loaders.json_files import JsonObject
from losart.loaders.quantized.compressed_tensors import CompressedTensor
from losart.loaders.quantized.tensor import FLOATS, Quantization, QuantizedTensor, check_part, find_parts
from losart.loaders.safetensors_files import MappedTensor


class Fp8(Quantization):
    """`quant_method` "fp8" with `weight_block_size`; activations are not quantized, whatever it says."""

    harmless: ClassVar[tuple[str, ...]] = ("*.input_scale", "*.activation_scale")

    def __init__(self, config: JsonObject) -> None:
        sizes = config.get("weight_block_size")
        if not isinstance(sizes, list) or len(sizes) != 2:
            raise config.error("weight_block_size", sizes, "a list of two integers")
        self._rows, self._columns = (config.checked_integer("weight_block_size", size, 1) for size in sizes)
        if (config.optional_text("fmt") or "e4m3") not in ("e4m3", "float8_e4m3fn"):
            raise config.error("fmt", config.get("fmt"), "'e4m3'")

    def find(
        self, name: str, shape: tuple[int, ...], saved: Mapping[str, MappedTensor]
    ) -> QuantizedTensor | None:
        module = name.removesuffix(".weight")
        if f"{module}.weight_scale_inv" not in saved:
            return None
        parts = find_parts(module, {"weight": True, "weight_scale_inv": True}, saved)
        rows, columns = shape
        check_part(parts["weight"], (rows, columns), ("float8",))
        blocks = -(-rows // self._rows), -(-columns // self._columns)
        check_part(parts["weight_scale_inv"], blocks, FLOATS)
        parts = {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"]}
        return CompressedTensor(name, (rows, columns), "float8", self._columns, parts, self._rows)
