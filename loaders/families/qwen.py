"""What Llama, Qwen, and most of their descendants have in common: names of tensors."""

from collections.abc import Callable
from typing import Any

from losart.config.decoding import Decoding
from losart.loaders.families.family import ConfigFiles, Family, TensorPattern

MODEL = (
    TensorPattern("embed", "model.embed_tokens.weight", ("vocab", "hidden")),
    TensorPattern("final_norm", "model.norm.weight", ("hidden",)),
)
HEAD = TensorPattern("head", "lm_head.weight", ("vocab", "hidden"))
NORMS = (
    TensorPattern("input_norm", "input_layernorm.weight", ("hidden",)),
    TensorPattern("post_norm", "post_attention_layernorm.weight", ("hidden",)),
)
ATTENTION = (
    TensorPattern("q", "self_attn.q_proj.weight", ("q", "hidden")),
    TensorPattern("k", "self_attn.k_proj.weight", ("kv", "hidden")),
    TensorPattern("v", "self_attn.v_proj.weight", ("kv", "hidden")),
    TensorPattern("o", "self_attn.o_proj.weight", ("hidden", "q")),
    TensorPattern("q_norm", "self_attn.q_norm.weight", ("head_dim",), "head_norms"),
    TensorPattern("k_norm", "self_attn.k_norm.weight", ("head_dim",), "head_norms"),
    TensorPattern("q_bias", "self_attn.q_proj.bias", ("q",), "qkv_bias"),
    TensorPattern("k_bias", "self_attn.k_proj.bias", ("kv",), "qkv_bias"),
    TensorPattern("v_bias", "self_attn.v_proj.bias", ("kv",), "qkv_bias"),
    TensorPattern("o_bias", "self_attn.o_proj.bias", ("hidden",), "o_bias"),
)
FEED_FORWARD = (
    TensorPattern("gate", "mlp.gate_proj.weight", ("ffn", "hidden"), "dense"),
    TensorPattern("up", "mlp.up_proj.weight", ("ffn", "hidden"), "dense"),
    TensorPattern("down", "mlp.down_proj.weight", ("hidden", "ffn"), "dense"),
)
EXPERTS = (
    TensorPattern("router", "mlp.gate.weight", ("experts", "hidden"), "experts"),
    TensorPattern(
        "experts.{e}.gate", "mlp.experts.{e}.gate_proj.weight", ("expert_ffn", "hidden"), "experts"
    ),
    TensorPattern("experts.{e}.up", "mlp.experts.{e}.up_proj.weight", ("expert_ffn", "hidden"), "experts"),
    TensorPattern(
        "experts.{e}.down", "mlp.experts.{e}.down_proj.weight", ("hidden", "expert_ffn"), "experts"
    ),
)


def qwen_family(
    config_values: Callable[[ConfigFiles], dict[str, Any]],
    architecture: str,
    more: tuple[TensorPattern, ...] = (),
    decoding: Decoding | None = None,
) -> Family:
    """A family whose files have these names, and in layers perhaps `more`."""
    return Family(
        config_values=config_values,
        model=MODEL,
        head=HEAD,
        layer_prefix="model.layers.{i}.",
        layer=(*NORMS, *ATTENTION, *FEED_FORWARD, *more),
        harmless=("*.rotary_emb.inv_freq",),
        architectures=(architecture,),
        decoding=decoding or Decoding(),
    )
