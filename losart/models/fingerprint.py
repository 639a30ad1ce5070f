"""What tells one model from another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from losart.config.model import ModelConfig

STRETCHES, STRETCH_BYTES = 16, 256


def model_fingerprint(config: ModelConfig, tensors: Mapping[str, Any]) -> str:
    """A digest of a checkpoint's configuration and weights.

    Of each tensor it takes the name, the shape, the dtype, and 16 stretches of 256 bytes, spread evenly:
    enough to tell checkpoints apart that were trained apart, without reading them.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        merged = getattr(tensor, "parameters", "")  # what an adapter's configuration says
        digest.update(f"{name} {tensor.shape} {tensor.dtype} {merged}".encode())
        for values in (stored.bytes() for stored in tensor.stored()):
            for start in np.linspace(0, max(0, len(values) - STRETCH_BYTES), STRETCHES).astype(int):
                digest.update(values[start : start + STRETCH_BYTES])
    return digest.hexdigest()
