"""The decoders that can be adapted: Llama, Qwen2 and Qwen3, as a dict of weights stacked over the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from losart.errors import ConfigError
from losart.loaders.json_files import JsonObject

Weights = dict[str, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

MATRICES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
BIASES = {"q_bias": "self_attn.q_proj", "k_bias": "self_attn.k_proj", "v_bias": "self_attn.v_proj"}


@dataclass(frozen=True)
class Shape:
    """Sizes and kind of a decoder.

    Attributes
    ----------
    model_type : {"llama", "qwen2", "qwen3"}
    """

    model_type: str
    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    theta: float
    eps: float
    tied: bool

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return self.model_type == "qwen2"

    @property
    def head_norms(self) -> bool:
        """Whether each head of q and k is normalised."""
        return self.model_type == "qwen3"

    @property
    def layer_tensors(self) -> dict[str, str]:
        """Each kind of a layer's tensors, and its name in a checkpoint."""
        weights = MATRICES | NORMS | (HEAD_NORMS if self.head_norms else {})
        named = {kind: f"{name}.weight" for kind, name in weights.items()}
        return named | ({kind: f"{name}.bias" for kind, name in BIASES.items()} if self.qkv_bias else {})


def read_shape(config: JsonObject) -> Shape:
    """The shape that a config.json describes.

    Raises
    ------
    ConfigError
        It is of no such decoder, or of a variant that would be computed wrongly.
    """
    kind = config.get("model_type")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise ConfigError(f"{config.file}: model_type {kind!r} cannot be adapted; llama, qwen2, qwen3 can")
    scaling = config.get("rope_scaling")
    parameters = config.get("rope_parameters") or {}  # transformers 5
    scaled = [given.get("rope_type", given.get("type")) for given in (scaling, parameters) if given]
    if any(one not in (None, "default") for one in scaled):
        raise ConfigError(f"{config.file}: rope_scaling is not supported")
    if config.get("use_sliding_window") or config.get("mlp_bias"):
        raise ConfigError(f"{config.file}: sliding windows and biases of the MLP are not supported")
    if kind != "qwen2" and config.get("attention_bias"):
        raise ConfigError(f"{config.file}: attention_bias is not supported for {kind}")
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    return Shape(
        model_type=kind,
        vocab=config.integer("vocab_size"),
        hidden=hidden,
        ffn=config.integer("intermediate_size"),
        layers=config.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=config.optional_integer("num_key_value_heads") or heads,
        head_dim=config.optional_integer("head_dim") or hidden // heads,
        max_positions=config.integer("max_position_embeddings"),
        theta=float(parameters.get("rope_theta", config.number("rope_theta", 10000.0))),
        eps=config.number("rms_norm_eps", 1e-6),
        tied=config.boolean("tie_word_embeddings", False),
    )


def rotation(shape: Shape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions' angles, float32 [..., head_dim]."""
    half = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * shape.theta ** (-half / shape.head_dim)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of [..., heads, head_dim]; cos and sin are [..., 1, head_dim]."""
    first, second = x.chunk(2, -1)
    return (x.float() * cos + torch.cat([-second, first], -1).float() * sin).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm, summed in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def fused(shape: Shape, weights: Weights) -> list[tuple[Tensor, ...]]:
    """Each layer's tensors as `layer` takes them: q, k and v in one matrix, gate and up too."""
    parts = [
        weights["input_norm"],
        torch.cat([weights[kind] for kind in "qkv"], 1),
        weights["o"],
        weights["post_norm"],
        torch.cat([weights["gate"], weights["up"]], 1),
        weights["down"],
    ]
    if shape.qkv_bias:
        parts.append(torch.cat([weights[kind] for kind in BIASES], 1))
    if shape.head_norms:
        parts += [weights[kind] for kind in HEAD_NORMS]
    return list(zip(*(part.unbind(0) for part in parts), strict=True))


def layer(
    shape: Shape, x: Tensor, tensors: tuple[Tensor, ...], cos: Tensor, sin: Tensor, attend: Attention
) -> Tensor:
    """One layer.

    Parameters
    ----------
    x : [rows, tokens, hidden]
    tensors : tuple
        Of `fused`.
    cos, sin : [rows or 1, tokens, 1, head_dim]
    attend : callable
        From q [rows, heads, tokens, head_dim], and k and v of kv_heads, to the like of q.
    """
    input_norm, qkv, out, post_norm, gate_up, down, *more = tensors
    rows, tokens, _ = x.shape
    sizes = [shape.heads, shape.kv_heads, shape.kv_heads]
    h = F.linear(rms_norm(x, input_norm, shape.eps), qkv, more[0] if shape.qkv_bias else None)
    q, k, v = h.view(rows, tokens, -1, shape.head_dim).split(sizes, 2)
    if shape.head_norms:
        q, k = rms_norm(q, more[-2], shape.eps), rms_norm(k, more[-1], shape.eps)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    found = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    x = x + F.linear(found.transpose(1, 2).reshape(rows, tokens, -1), out)
    gate, up = F.linear(rms_norm(x, post_norm, shape.eps), gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down)


def embed(weights: Weights, ids: Tensor, mask_id: int | None) -> Tensor:
    """Embeddings; the mask token's is `weights["mask"]` where there is one."""
    x = F.embedding(ids, weights["embed"])
    if mask_id is not None and "mask" in weights:
        x = torch.where((ids == mask_id)[..., None], weights["mask"], x)
    return x


def logits(shape: Shape, weights: Weights, x: Tensor) -> Tensor:
    """Of the last layer's rows."""
    head = weights["embed"] if shape.tied else weights["head"]
    return F.linear(rms_norm(x, weights["final_norm"], shape.eps), head)


class Cache:
    """Keys and values of all layers, [layers, rows, kv_heads, positions, head_dim]."""

    def __init__(self, shape: Shape, rows: int, positions: int, like: Tensor) -> None:
        sizes = (shape.layers, rows, shape.kv_heads, positions, shape.head_dim)
        self.k, self.v = like.new_zeros(sizes), like.new_zeros(sizes)


def forward(
    shape: Shape,
    weights: Weights,
    ids: Tensor,
    positions: Tensor,
    seen: Tensor | None = None,
    cache: Cache | None = None,
    mask_id: int | None = None,
) -> Tensor:
    """The last layer's rows, [rows, tokens, hidden]; not for training.

    Parameters
    ----------
    ids, positions : int64 [rows, tokens]
        Positions are also the places in the cache.
    seen : bool [rows or 1, 1, tokens, keys], optional
        Over the first places of the cache, or over the tokens without one. If not given the tokens are all
        that there is, and each sees those before it.
    cache : Cache, optional
    mask_id : int, optional
        As of `embed`.
    """
    x = embed(weights, ids, mask_id)
    cos, sin = (part[:, :, None] for part in rotation(shape, positions))
    rows = torch.arange(len(ids), device=ids.device)[:, None]

    def attend(number: int) -> Any:
        def found(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if cache is not None:
                cache.k[number][rows, :, positions] = k.transpose(1, 2)
                cache.v[number][rows, :, positions] = v.transpose(1, 2)
                if seen is not None:
                    k, v = (one[number][:, :, : seen.shape[-1]] for one in (cache.k, cache.v))
            if seen is None:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            # Under a mask no kernel that is frugal with memory takes fewer heads of k and v than of q.
            k, v = (one.repeat_interleave(shape.heads // shape.kv_heads, 1) for one in (k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

        return found

    for number, tensors in enumerate(fused(shape, weights)):
        x = layer(shape, x, tensors, cos, sin, attend(number))
    return x
