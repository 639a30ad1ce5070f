"""The model that is adapted: a directory as transformers writes it, or the GGUF of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from losart.errors import CheckpointError, TensorError
from losart.loaders.chat_template import ChatTemplate, read_chat_template
from losart.loaders.json_files import JsonObject, read_json_object
from losart.loaders.safetensors_files import map_tensors
from losart.loaders.tokenizer import Tokenizer, read_tokenizer

from .decoder import Shape, Weights, read_shape


@dataclass(frozen=True)
class Base:
    """A base model's files.

    Attributes
    ----------
    directory : Path
    config : JsonObject
    shape : Shape
    tokenizer : Tokenizer
    chat_template : ChatTemplate or None
    end_id : int
        The token that ends a turn.
    """

    directory: Path
    config: JsonObject
    shape: Shape
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    end_id: int

    @property
    def text_tokens(self) -> list[int]:
        """Ids of tokens that are not special: a vocabulary may have ids without a token, too."""
        backend = self.tokenizer.backend
        special = {number for number, one in backend.get_added_tokens_decoder().items() if one.special}
        return sorted(set(backend.get_vocab().values()) - special)

    def weights(self, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Weights:
        """All weights, those of the layers stacked.

        Raises
        ------
        TensorError
            One is missing, or of another shape.
        """
        shape, mapped = self.shape, map_tensors(self.directory)

        def read(name: str) -> torch.Tensor:
            if name not in mapped:
                raise TensorError(f"{self.directory}: tensor {name!r} is missing")
            with safe_open(mapped[name].file, framework="pt") as file:
                return file.get_tensor(name).to(device=device, dtype=dtype)

        weights = {"embed": read("model.embed_tokens.weight"), "final_norm": read("model.norm.weight")}
        if not shape.tied:
            weights["head"] = read("lm_head.weight")
        for kind, name in shape.layer_tensors.items():
            weights[kind] = torch.stack([read(f"model.layers.{i}.{name}") for i in range(shape.layers)])
        if weights["embed"].shape != (shape.vocab, shape.hidden):
            raise TensorError(f"{self.directory}: embeddings are not those that config.json asks for")
        return weights


def read_base(directory: Path) -> Base:
    """Open a base model.

    Raises
    ------
    CheckpointError
        A file is missing or corrupt, or names no end token.
    ConfigError
        The model cannot be adapted.
    """
    config = read_json_object(directory / "config.json")
    tokenizer = read_tokenizer(directory)
    if tokenizer is None:
        raise CheckpointError(f"{directory}: there is no tokenizer.json")
    end = tokenizer.eos_token_id
    if end is None:
        raise CheckpointError(f"{directory}: tokenizer_config.json names no eos_token")
    template = read_chat_template(directory, tokenizer.special_tokens)
    return Base(directory, config, read_shape(config), tokenizer, template, end)
