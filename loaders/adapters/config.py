"""adapter_config.json of PEFT: which modules a LoRA adapts, with which rank and scale."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from losart.errors import ConfigError
from losart.loaders.json_files import JsonObject

ALL_LINEAR = "all-linear"
# Keys that change how a LoRA is applied, in ways that are none of ours.
UNSUPPORTED = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias"),
    *("megatron_config", "monteclora_config", "target_parameters", "use_bdlora", "use_dora", "use_qalora"),
    "velora_config",
)
# Keys that say how it was trained, and where: nothing of them is left in its matrices.
IGNORED = (
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config"),
    *("fan_in_fan_out", "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
)
KNOWN = (
    *(
        "alpha_pattern",
        "bias",
        "ensure_weight_tying",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
    ),
    *("layers_to_transform", "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern"),
    *("target_modules", "trainable_token_indices", "use_rslora"),
)
# Initial values that leave the base as it is; others begin with another one.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraConfig:
    """What adapter_config.json says, as PEFT reads it.

    Attributes
    ----------
    keys : JsonObject
    rank : int
    alpha : float
    rank_stabilized : bool
        Whether a product is scaled by alpha over the root of its rank, and not over the rank.
    targets, excluded : str or tuple of str
        A regular expression of whole names, or ends of names; "all-linear" has been resolved.
    replaced : tuple of str
        Ends of names of modules whose tensors are replaced as wholes.
    rank_pattern, alpha_pattern : mapping
        By patterns of names, what differs.
    layers : frozenset of int or None
    layers_pattern : tuple of str
        Names of the list of layers; empty: any.
    token_rows : mapping of str to tuple of int
        By ends of names of embeddings, rows that are replaced.
    ties : bool
        Whether what replaces an embedding that is the head replaces the head, too.
    """

    keys: JsonObject
    rank: int
    alpha: float
    rank_stabilized: bool
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    replaced: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    token_rows: Mapping[str, tuple[int, ...]]
    ties: bool

    @classmethod
    def read(cls, keys: JsonObject) -> LoraConfig:
        """Check the keys.

        Raises
        ------
        ConfigError
            One is missing, impossible, or asks for something that is not supported.
        """
        kind = keys.optional_text("peft_type")
        if kind is None:
            raise keys.missing("peft_type")
        if kind != "LORA":
            raise keys.error("peft_type", kind, "'LORA'")
        for key in (*UNSUPPORTED, *(set(keys.values) - {*UNSUPPORTED, *IGNORED, *KNOWN})):
            if keys.get(key) not in (None, False, [], {}, ""):
                raise ConfigError(f"{keys.file}: {key} is not supported")
        if (keys.optional_text("bias") or "none") != "none":
            raise keys.error("bias", keys.get("bias"), "'none'")
        start = keys.get("init_lora_weights")
        if start is not None and not (isinstance(start, (bool, str)) and start in PLAIN_STARTS):
            raise ConfigError(
                f"{keys.file}: init_lora_weights {start!r} is not supported: the base that the adapter was "
                "trained on is none that a file has"
            )
        targets = _names(keys, "target_modules")
        if not targets and not keys.get("modules_to_save") and not keys.get("trainable_token_indices"):
            raise keys.missing("target_modules")
        layers = keys.get("layers_to_transform")
        if layers is not None:
            listed = layers if isinstance(layers, list) else [layers]
            layers = frozenset(keys.checked_integer("layers_to_transform", one, 0) for one in listed) or None
        patterns = _names(keys, "layers_pattern")
        alpha = keys.number("lora_alpha", 8.0)
        return cls(
            keys,
            rank=keys.integer("r"),
            alpha=alpha,
            rank_stabilized=keys.boolean("use_rslora", False),
            targets=targets,
            excluded=_names(keys, "exclude_modules"),
            replaced=_listed(keys, "modules_to_save"),
            rank_pattern=_by_pattern(keys, "rank_pattern"),
            alpha_pattern=_by_pattern(keys, "alpha_pattern"),
            layers=layers,
            layers_pattern=(patterns,) if isinstance(patterns, str) else patterns,
            token_rows=_token_rows(keys),
            ties=keys.boolean("ensure_weight_tying", False),
        )

    def adapts(self, module: str, linear: bool) -> bool:
        """Whether it has a product for a module of this name; `linear`: one of a layer's matrices."""
        if _matches(self.excluded, module) or any(
            re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.replaced
        ):
            return False
        if self.targets == ALL_LINEAR:
            return linear
        if isinstance(self.targets, str):
            return _matches(self.targets, module)
        if module in self.targets:  # as in PEFT, whichever its layer
            return True
        return _matches(self.targets, module) and (self.layers is None or self._layer(module) in self.layers)

    def replaces(self, module: str) -> bool:
        """Whether it has another tensor in place of the module's."""
        return any(module.endswith(name) for name in self.replaced)

    def rows(self, module: str) -> tuple[int, ...]:
        """Rows of a module's matrix that it replaces."""
        return next((rows for name, rows in self.token_rows.items() if _ends(module, name)), ())

    def rank_of(self, module: str) -> int:
        """The rank of a module's product."""
        return int(_of_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """By what a module's product is multiplied."""
        rank, alpha = self.rank_of(module), _of_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def _layer(self, module: str) -> int | None:
        for pattern in self.layers_pattern or (r"[^.]*",):
            found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
            if found:
                return int(found[1])
        return None


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(_ends(module, name) for name in names)


def _of_pattern(values: Mapping[str, Any], module: str, default: Any) -> Any:
    return next(
        (value for pattern, value in values.items() if re.match(rf"(.*\.)?({pattern})$", module)), default
    )


def _listed(keys: JsonObject, name: str) -> tuple[str, ...]:
    values = keys.get(name)
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise keys.error(name, values, "a list of names")
    for value in values:
        _check_pattern(keys, name, value)
    return tuple(values)


def _names(keys: JsonObject, name: str) -> str | tuple[str, ...]:
    """A regular expression, or a list of names."""
    value = keys.get(name)
    if not isinstance(value, str):
        return _listed(keys, name)
    if value.lower() == ALL_LINEAR:
        return ALL_LINEAR
    _check_pattern(keys, name, value)
    return value


def _check_pattern(keys: JsonObject, name: str, value: str) -> None:
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise keys.error(name, value, f"a regular expression ({error})") from None


def _by_pattern(keys: JsonObject, name: str) -> dict[str, Any]:
    values = keys.optional_object(name)
    if values is None:
        return {}
    for pattern in values.values:
        _check_pattern(keys, name, pattern)
    if name == "rank_pattern":
        return {pattern: values.integer(pattern) for pattern in values.values}
    return {pattern: values.number(pattern, 8.0) for pattern in values.values}


def _token_rows(keys: JsonObject) -> dict[str, tuple[int, ...]]:
    name = "trainable_token_indices"
    values = keys.get(name)
    if values is None:
        return {}
    of_modules = values if isinstance(values, dict) else {"embed_tokens": values}
    for rows in of_modules.values():
        if not isinstance(rows, list) or len(set(map(repr, rows))) != len(rows):
            raise keys.error(name, values, "a list of tokens, each once, or an object of such lists")
    return {
        module: tuple(keys.checked_integer(name, row, 0) for row in rows)
        for module, rows in of_modules.items()
    }
