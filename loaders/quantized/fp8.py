"""FP8 as DeepSeek and Qwen write it, a scale per block, and as vLLM does, one per matrix or per row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from losart.loaders.json_files import JsonObject
from losart.loaders.quantized.compressed_tensors import CompressedTensor
from losart.loaders.quantized.tensor import FLOATS, Quantization, QuantizedTensor, check_part, find_parts
from losart.loaders.safetensors_files import MappedTensor


class Fp8(Quantization):
    """`quant_method` "fp8"; activations are as `losart.load` has them, whatever it says."""

    harmless: ClassVar[tuple[str, ...]] = ("*.input_scale", "*.activation_scale")

    def __init__(self, config: JsonObject) -> None:
        sizes = config.get("weight_block_size")
        if sizes is not None and not (isinstance(sizes, list) and len(sizes) == 2):
            raise config.error("weight_block_size", sizes, "a list of two integers")
        checked = (config.checked_integer("weight_block_size", size, 1) for size in sizes or ())
        self._block = tuple(checked) or None
        if (config.optional_text("fmt") or "e4m3") not in ("e4m3", "float8_e4m3fn"):
            raise config.error("fmt", config.get("fmt"), "'e4m3'")

    def find(
        self, name: str, shape: tuple[int, ...], saved: Mapping[str, MappedTensor]
    ) -> QuantizedTensor | None:
        module = name.removesuffix(".weight")
        names = ("weight_scale_inv",) if self._block is not None else ("weight_scale", "weight_scale_inv")
        end = next((name for name in names if f"{module}.{name}" in saved), None)
        if end is None:
            return None
        parts = find_parts(module, {"weight": True, end: True}, saved)
        codes, scale = parts["weight"], parts[end]
        rows, columns = shape
        check_part(codes, (rows, columns), ("float8",))
        if self._block is not None:
            block = self._block
            check_part(scale, (-(-rows // block[0]), -(-columns // block[1])), FLOATS)
        elif scale.size == 1:
            block = rows, columns
            check_part(scale, scale.shape, FLOATS)
        else:
            block = 1, columns
            check_part(scale, (rows,) if len(scale.shape) == 1 else (rows, 1), FLOATS)
        parts = {"weight": codes, "weight_scale": scale}
        return CompressedTensor(name, (rows, columns), "float8", block[1], parts, block[0])
