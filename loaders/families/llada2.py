"""LLaDA2.0 and 2.1 (arXiv 2512.15745, 2602.08676): mixtures of experts with shared ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from losart.config.decoding import Decoding
from losart.config.model import ExpertsConfig, ModelConfig
from losart.errors import ConfigError
from losart.loaders.families.family import ConfigFiles, Family, TensorPattern
from losart.loaders.families.qwen import EXPERTS, FEED_FORWARD, NORMS
from losart.loaders.json_files import errors_naming

BLOCK_LENGTH = 32
MASK_TOKEN_ID, END_TOKEN_ID = 156895, 156892
LLADA2_0 = Decoding(
    defaults=(("remasking", "low_confidence_dynamic"), ("confidence_threshold", 0.95)),
    names=(
        ("steps", "denoising_steps"),
        ("threshold", "confidence_threshold"),
        ("gen_length", "max_new_tokens"),
        ("mask_id", "mask_token_id"),
    ),
)
LLADA2_1 = replace(LLADA2_0, defaults=(*LLADA2_0.defaults, ("editing_threshold", 0.9)))


def _config_values(files: ConfigFiles) -> dict[str, Any]:
    files.refuse_unsupported()
    config = files.config
    for key in ("use_bias", "use_qkv_bias", "norm_head"):
        if config.boolean(key, False):
            raise ConfigError(f"{config.file}: {key} is not supported")
    values = files.common_values()
    rotated = config.optional_integer("rotary_dim")
    if rotated is not None and rotated != int(values["head_dim"] * values["rope"].partial):
        raise config.error("rotary_dim", rotated, "partial_rotary_factor times the head's channels")
    return values | {
        "head_norms": config.boolean("use_qk_norm", True),
        "experts": _experts(files),
        "block_length": files.block_length("block_length", "block_size") or BLOCK_LENGTH,
        "mask_token_id": files.mask_token_id(default=MASK_TOKEN_ID),
        "end_token_ids": files.end_token_ids(default=(END_TOKEN_ID,)),
    }


def _experts(files: ConfigFiles) -> ExpertsConfig:
    config = files.config
    scores = config.optional_text("score_function") or "sigmoid"
    if scores != "sigmoid":
        raise config.error("score_function", scores, "'sigmoid'")
    shared = config.optional_integer("num_shared_experts", minimum=0) or 0
    if shared > 1:
        raise config.error("num_shared_experts", shared, "0 or 1")
    layers, dense = (
        config.integer("num_hidden_layers"),
        config.optional_integer("first_k_dense_replace", 0) or 0,
    )
    with errors_naming(config.file):
        return ExpertsConfig(
            config.integer("num_experts"),
            per_token=config.integer("num_experts_per_tok"),
            intermediate_size=config.integer("moe_intermediate_size"),
            scores="sigmoid",
            normalize=config.boolean("norm_topk_prob", True),
            bias=config.boolean("moe_router_enable_expert_bias", True),
            groups=config.optional_integer("n_group") or 1,
            kept_groups=config.optional_integer("topk_group") or 1,
            scaling=config.number("routed_scaling_factor", 1.0),
            shared=shared,
            dense_layers=frozenset(range(min(dense, layers))),
        )


def _refined(config: ModelConfig, tensors: Mapping[str, Any]) -> ModelConfig:
    """2.1's files have the router's bias in float32, beside weights of 16 bits; 2.0's have not."""
    biases = [tensor for name, tensor in tensors.items() if name.endswith(".router_bias")]
    edits = biases and biases[0].dtype == "float32" and tensors["embed"].dtype != "float32"
    return replace(config, decoding=LLADA2_1) if edits else config


LLADA2 = Family(
    config_values=_config_values,
    model=(
        TensorPattern("embed", "model.word_embeddings.weight", ("vocab", "hidden")),
        TensorPattern("final_norm", "model.norm.weight", ("hidden",)),
    ),
    head=TensorPattern("head", "lm_head.weight", ("vocab", "hidden")),
    layer_prefix="model.layers.{i}.",
    layer=(
        *NORMS,
        TensorPattern("qkv", "attention.query_key_value.weight", ("qkv", "hidden")),
        TensorPattern("o", "attention.dense.weight", ("hidden", "q")),
        TensorPattern("q_norm", "attention.query_layernorm.weight", ("head_dim",), "head_norms"),
        TensorPattern("k_norm", "attention.key_layernorm.weight", ("head_dim",), "head_norms"),
        *FEED_FORWARD,
        *EXPERTS,
        TensorPattern("router_bias", "mlp.gate.expert_bias", ("experts",), "router_bias"),
        *(
            TensorPattern(f"experts.{{e}}.{name}", f"mlp.shared_experts.{name}_proj.weight", shape, "shared")
            for name, shape in (
                ("gate", ("expert_ffn", "hidden")),
                ("up", ("expert_ffn", "hidden")),
                ("down", ("hidden", "expert_ffn")),
            )
        ),
    ),
    harmless=("*.rotary_emb.inv_freq",),
    architectures=("LLaDA2MoeModelLM",),
    decoding=LLADA2_0,
    refined=_refined,
)
