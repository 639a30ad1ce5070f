"""What families' checkpoints have beside the keys of all, and the sizes that are released."""

from __future__ import annotations

from typing import Any

QWEN3: dict[str, Any] = {"num_kv_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_positions": 40960}
SIZES: dict[str, dict[str, Any]] = {  # SDAR's
    "tiny": {},
    "0.6B": QWEN3
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_layers": 28, "num_heads": 16, "tied": True},
    "1.7B": QWEN3
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_layers": 28, "num_heads": 16, "tied": True},
    "4B": QWEN3
    | {"hidden_size": 2560, "intermediate_size": 9728, "num_layers": 36, "num_heads": 32, "tied": True},
    "8B": QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "num_layers": 36, "num_heads": 32},
}


def _sizes(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    named = {"hidden_size": hidden, "intermediate_size": ffn, "num_layers": layers, "num_heads": heads}
    return named | {"num_kv_heads": kv_heads, "head_dim": 128, "max_positions": 32768} | more


FAMILY_SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "Fast_dLLM_Qwen": {
        "tiny": {},
        "1.5B": _sizes(1536, 8960, 28, 12, 2, vocab_size=151936, tied=True),
        "7B": _sizes(3584, 18944, 28, 28, 4, vocab_size=152064),
    },
    "llada2_moe": {
        "tiny": {},
        "mini": _sizes(2048, 5120, 20, 16, 4, vocab_size=157184, rope_theta=600000.0)
        | {
            "extra_config": {
                "moe_intermediate_size": 512,
                "n_group": 8,
                "num_experts": 256,
                "num_experts_per_tok": 8,
                "topk_group": 4,
            }
        },
    },
    "nemotron_labs_diffusion": {
        "tiny": {},
        "3B": _sizes(3072, 9216, 26, 32, 8, vocab_size=131072, max_positions=262144),
        "8B": _sizes(4096, 14336, 34, 32, 8, vocab_size=131072, max_positions=262144),
        "14B": _sizes(5120, 16384, 40, 32, 8, vocab_size=131072, max_positions=262144),
    },
    "sdar": SIZES,
    "sdar_moe": {
        "tiny": {},
        "30B-A3B": _sizes(2048, 6144, 48, 32, 4, vocab_size=151936)
        | {
            "extra_config": {
                "moe_intermediate_size": 768,
                "num_experts": 128,
                "num_experts_per_tok": 8,
            }
        },
    },
    "stable_diffcoder": {
        "tiny": {},
        "8B": _sizes(4096, 14336, 32, 32, 8, vocab_size=155136, max_positions=8192, rope_theta=5e5),
    },
}
# Keys of config.json, with experts small enough for "tiny".
FAMILY_KEYS: dict[str, dict[str, Any]] = {
    "Fast_dLLM_Qwen": {"architectures": ["Fast_dLLM_QwenForCausalLM"]},
    "llada2_moe": {
        "architectures": ["LLaDA2MoeModelLM"],
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 64,
        "moe_router_enable_expert_bias": True,
        "n_group": 4,
        "norm_topk_prob": True,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_shared_experts": 1,
        "partial_rotary_factor": 0.5,
        "routed_scaling_factor": 2.5,
        "score_function": "sigmoid",
        "topk_group": 2,
        "use_qk_norm": True,
    },
    "nemotron_labs_diffusion": {
        "architectures": ["NemotronLabsDiffusionModel"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "sdar": {"architectures": ["SDARForCausalLM"]},
    "sdar_moe": {
        "architectures": ["SDARMoeForCausalLM"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "stable_diffcoder": {"architectures": ["StableDiffcoderForCausalLM"], "model_type": "llama"},
}
