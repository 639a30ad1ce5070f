"""The building blocks of model families: tensors, and readers for the keys that many families share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from losart.config.decoding import Decoding
from losart.config.model import ModelConfig
from losart.errors import ConfigError
from losart.loaders.families.rope import rope_config
from losart.loaders.json_files import JsonObject
from losart.loaders.tokenizer import Tokenizer


@dataclass(frozen=True)
class ConfigFiles:
    """What a model's configuration is read from.

    Attributes
    ----------
    config, generation : JsonObject
        config.json and generation_config.json; the latter is empty where there is none.
    tokenizer : Tokenizer or None
        Its mask and end tokens are used where the files specify none.
    """

    config: JsonObject
    generation: JsonObject
    tokenizer: Tokenizer | None = None

    def common_values(self) -> dict[str, Any]:
        """Arguments of ModelConfig that Llama, Qwen, and their descendants write under the same keys."""
        config = self.config
        hidden_size = config.integer("hidden_size")
        num_heads = config.integer("num_attention_heads")
        max_positions = config.integer("max_position_embeddings")
        dtype = config.optional_text("dtype") or config.optional_text("torch_dtype")
        return {
            "vocab_size": config.integer("vocab_size"),
            "hidden_size": hidden_size,
            "intermediate_size": config.integer("intermediate_size"),
            "num_layers": config.integer("num_hidden_layers"),
            "num_heads": num_heads,
            "num_kv_heads": config.optional_integer("num_key_value_heads") or num_heads,
            "head_dim": config.optional_integer("head_dim") or hidden_size // num_heads,
            "max_positions": max_positions,
            "rms_norm_eps": config.number("rms_norm_eps", ModelConfig.rms_norm_eps),
            "rope": rope_config(config, max_positions),
            "tie_embeddings": config.boolean("tie_word_embeddings", False),
            "dtype": dtype.removeprefix("torch.") if dtype else None,
        }

    def refuse_unsupported(self) -> None:
        """Refuse variants of the layers that would silently be computed wrongly.

        Raises
        ------
        ConfigError
            For another activation than SiLU, or sliding windows.
        """
        config = self.config
        if config.optional_text("hidden_act") not in (None, "silu"):
            raise config.error("hidden_act", config.get("hidden_act"), "'silu'")
        if config.boolean("use_sliding_window", False):
            raise ConfigError(f"{config.file}: use_sliding_window is not supported")
        kinds = config.get("layer_types")
        if kinds is not None and not (isinstance(kinds, list) and all(k == "full_attention" for k in kinds)):
            raise config.error("layer_types", kinds, "'full_attention' for every layer")

    def block_length(self, *names: str) -> int | None:
        """The first of the keys `names` in config.json, then in generation_config.json."""
        largest = self.config.integer("max_position_embeddings")
        for keys in (self.config, self.generation):
            for name in names:
                value = keys.optional_integer(name)
                if value is not None and value > largest:
                    raise keys.error(name, value, f"at most max_position_embeddings ({largest})")
                if value is not None:
                    return value
        return None

    def mask_token_id(self, default: int, token: str | None = None) -> int | None:
        """mask_token_id of either file, else the tokenizer's, else `default` if it is in the vocabulary.

        The tokenizer's is its id of `token`, if one is given.
        """
        for keys in (self.config, self.generation):
            value = keys.get("mask_token_id")
            if value is not None:
                return self._token_id(keys, "mask_token_id", value)
        if self.tokenizer is not None:
            known = self.tokenizer.mask_token_id if token is None else self.tokenizer.token_to_id(token)
            if known is not None:
                return known
        return default if default < self.config.integer("vocab_size") else None

    def end_token_ids(self, default: tuple[int, ...] = (), listed: bool = True) -> tuple[int, ...]:
        """eos_token_id of generation_config.json, else of config.json, else the tokenizer's end token.

        Without `listed` not that of generation_config.json. `default` where none is known, if it is in the
        vocabulary.
        """
        for keys in (self.generation, self.config) if listed else (self.config,):
            value = keys.get("eos_token_id")
            if value is not None:
                tokens = value if isinstance(value, list) else [value]
                return tuple(dict.fromkeys(self._token_id(keys, "eos_token_id", token) for token in tokens))
        if self.tokenizer is None or self.tokenizer.eos_token_id is None:
            vocab_size = self.config.integer("vocab_size")
            return tuple(token for token in default if token < vocab_size)
        return (self.tokenizer.eos_token_id,)

    def _token_id(self, keys: JsonObject, name: str, value: object) -> int:
        vocab_size = self.config.integer("vocab_size")
        token = keys.checked_integer(name, value, minimum=0)
        if token >= vocab_size:
            raise keys.error(name, token, f"inside the vocabulary of {vocab_size}")
        return token


@dataclass(frozen=True)
class TensorPattern:
    """A tensor of the model, or of each of its layers, in a family's files.

    Attributes
    ----------
    name : str
        Canonical name, as in `Transformer`; without "layers.{i}." for a layer's tensor.
    source : str
        Name in the files; without the family's `layer_prefix` for a layer's tensor. With "{e}", as the name
        has then too, there is one for each expert.
    shape : tuple of str
        Its dimensions: "vocab", "hidden", "ffn", "head_dim", "q" and "kv" (the width of all query heads
        and of all kv heads), "qkv" (of both kinds of kv heads too), "experts" (their number), "expert_ffn".
    part : str
        Of a layer that has it: "head_norms", "qkv_bias", "o_bias", "dense" (a feed-forward), "experts",
        "router_bias" or "shared"; "" for what all layers have.
    """

    name: str
    source: str
    shape: tuple[str, ...]
    part: str = ""


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that a checkpoint must hold: canonical name, name in the files, shape."""

    name: str
    source: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """Checkpoints of one `model_type`.

    Attributes
    ----------
    config_values : callable
        Reads the arguments of ModelConfig, except `model_type` and `decoding`, from ConfigFiles; raises
        ConfigError for what is not supported.
    model : tuple of TensorPattern
        Tensors outside the layers.
    head : TensorPattern
        The output projection. With tied embeddings it is not needed, and ignored where it is present.
    layer_prefix : str
        Prefix of the names of a layer's tensors in the files, with "{i}" for the layer.
    layer : tuple of TensorPattern
        Tensors of each layer, if it has their part.
    harmless : tuple of str
        Patterns (as in `fnmatch`) of names in the files that are ignored.
    architectures : tuple of str
        What config.json may name as its own.
    decoding : Decoding
        Of its checkpoints, unless `refined` says otherwise.
    refined : callable, optional
        From a configuration and the checkpoint's tensors to one that says what only the tensors tell.
    """

    config_values: Callable[[ConfigFiles], dict[str, Any]]
    model: tuple[TensorPattern, ...]
    head: TensorPattern
    layer_prefix: str
    layer: tuple[TensorPattern, ...]
    harmless: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    decoding: Decoding = field(default_factory=Decoding)
    refined: Callable[[ModelConfig, Mapping[str, Any]], ModelConfig] | None = None

    def expected_tensors(self, config: ModelConfig) -> Iterator[ExpectedTensor]:
        """All tensors that a checkpoint of `config` must hold, generated lazily."""
        sizes = {
            "vocab": config.vocab_size,
            "hidden": config.hidden_size,
            "ffn": config.intermediate_size,
            "head_dim": config.head_dim,
            "q": config.num_heads * config.head_dim,
            "kv": config.num_kv_heads * config.head_dim,
            "qkv": (config.num_heads + 2 * config.num_kv_heads) * config.head_dim,
        }
        experts = config.experts
        if experts is not None:
            sizes |= {"experts": experts.count, "expert_ffn": experts.intermediate_size}

        def expected(
            pattern: TensorPattern, name_prefix: str = "", source_prefix: str = "", expert: int = 0
        ) -> ExpectedTensor:
            shape = tuple(sizes[dimension] for dimension in pattern.shape)
            name, source = name_prefix + pattern.name, source_prefix + pattern.source
            return ExpectedTensor(name.replace("{e}", str(expert)), source.replace("{e}", str(expert)), shape)

        yield from map(expected, self.model)
        if not config.tie_embeddings:
            yield expected(self.head)
        for i in range(config.num_layers):
            parts, prefixes = _parts(config, i), (f"layers.{i}.", self.layer_prefix.format(i=i))
            for pattern in self.layer:
                if pattern.part in parts:
                    for expert in parts[pattern.part] if "{e}" in pattern.name else range(1):
                        yield expected(pattern, *prefixes, expert)

    def named(self, config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Canonical names and shapes of a checkpoint's tensors by their names in the files.

        The output projection is among them with tied embeddings, too.
        """
        expected = list(self.expected_tensors(config))
        named = {tensor.source: (tensor.name, tensor.shape) for tensor in expected}
        if config.tie_embeddings:
            named[self.head.source] = self.head.name, (config.vocab_size, config.hidden_size)
        return named

    def is_harmless(self, source: str, config: ModelConfig) -> bool:
        """Whether a tensor of the files that is not expected may be ignored."""
        if config.tie_embeddings and source == self.head.source:
            return True
        return any(fnmatchcase(source, pattern) for pattern in self.harmless)


def _parts(config: ModelConfig, layer: int) -> dict[str, range]:
    """The parts that a layer has, and the experts that each is of."""
    once, experts = range(1), config.experts_of(layer)
    optional = (name for name in ("head_norms", "qkv_bias", "o_bias") if getattr(config, name))
    parts = dict.fromkeys(("", *optional), once)
    if experts is None:
        return parts | {"dense": once}
    parts["experts"] = range(experts.count)
    if experts.bias:
        parts["router_bias"] = once
    if experts.shared:
        parts["shared"] = range(experts.count, experts.count + experts.shared)
    return parts
