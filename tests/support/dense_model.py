"""SDAR's transformer in float64 NumPy from a checkpoint's files, under the block-causal mask."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from reference import softmax_attention
from safetensors.numpy import load_file

Floats = NDArray[np.float64]


class DenseModel:
    """The logits of any block after any tokens.

    Parameters
    ----------
    directory : Path
        Of float32 weights.
    """

    def __init__(self, directory: Path) -> None:
        self.keys = json.loads((directory / "config.json").read_text())
        tensors = load_file(directory / "model.safetensors")
        self.tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def logits(self, before: Sequence[int], block: Sequence[int], block_length: int) -> Floats:
        """Of a block's rows [len(block), vocab], after tokens that fill blocks."""
        assert len(before) % block_length == 0
        ids, keys = [*before, *block], self.keys
        x = self.tensors["model.embed_tokens.weight"][ids]
        seen = [min(len(ids), (i // block_length + 1) * block_length) for i in range(len(ids))]
        for layer in range(keys["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            h = self._norm(x, prefix + "input_layernorm")
            q, k, v = (
                self._linear(h, f"{prefix}self_attn.{name}_proj").reshape(len(ids), -1, keys["head_dim"])
                for name in "qkv"
            )
            q, k = (
                self._rotated(self._norm(one, f"{prefix}self_attn.{name}_norm"))
                for one, name in ((q, "q"), (k, "k"))
            )
            o = np.concatenate(
                [softmax_attention(q[i : i + 1], k[:end], v[:end])[0] for i, end in enumerate(seen)]
            )
            x = x + self._linear(o.reshape(len(ids), -1), prefix + "self_attn.o_proj")
            h = self._norm(x, prefix + "post_attention_layernorm")
            gate, up = (self._linear(h, f"{prefix}mlp.{name}_proj") for name in ("gate", "up"))
            x = x + self._linear(gate / (1 + np.exp(-gate)) * up, prefix + "mlp.down_proj")
        head = "model.embed_tokens" if keys["tie_word_embeddings"] else "lm_head"
        return self._linear(self._norm(x, "model.norm")[len(before) :], head)

    def _norm(self, x: Floats, name: str) -> Floats:
        scale = np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.keys["rms_norm_eps"])
        return x / scale * self.tensors[name + ".weight"]

    def _linear(self, x: Floats, name: str) -> Floats:
        return x @ self.tensors[name + ".weight"].T

    def _rotated(self, x: Floats) -> Floats:
        half = x.shape[-1] // 2
        frequencies = self.keys["rope_theta"] ** (-np.arange(half) / half)
        angles = (np.arange(len(x))[:, None] * frequencies)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate(
            [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1
        )


def log_softmax(logits: Floats, mask_token: int) -> Floats:
    """Over all tokens but the mask token, whose logits become -inf."""
    logits = np.asarray(logits, np.float64).copy()
    logits[..., mask_token] = -np.inf
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
