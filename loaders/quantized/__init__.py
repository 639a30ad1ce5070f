"""Checkpoints whose matrices are codes and scales: one file per way to write them."""

from __future__ import annotations

from losart.errors import ConfigError
from losart.loaders.json_files import JsonObject
from losart.loaders.quantized.awq import Awq
from losart.loaders.quantized.compressed_tensors import CompressedTensors
from losart.loaders.quantized.fp8 import Fp8
from losart.loaders.quantized.gptq import Gptq
from losart.loaders.quantized.tensor import Quantization, QuantizedTensor

METHODS: dict[str, type[Quantization]] = {
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "fp8": Fp8,
    "gptq": Gptq,
}


def read_quantization(config: JsonObject) -> Quantization | None:
    """What `quantization_config` of config.json says; None where there is none.

    Raises
    ------
    ConfigError
        It asks for something that is not supported, or is inconsistent.
    """
    keys = config.optional_object("quantization_config")
    if keys is None:
        return None
    method = keys.optional_text("quant_method")
    if method is None:
        raise keys.missing("quant_method")
    if method not in METHODS:
        raise ConfigError(
            f"{config.file}: quant_method {method!r} is not supported; supported: {', '.join(METHODS)}"
        )
    return METHODS[method](keys)


__all__ = ["METHODS", "Quantization", "QuantizedTensor", "read_quantization"]
