"""Immutable options of a generation and of its attention, validated once, when they are made."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from losart.config.checks import is_int, is_number
from losart.config.model import ModelConfig
from losart.errors import OptionError

PAGE_UNIT = 16  # page sizes are multiples of this many positions
LARGEST_PAGE = 65536  # a chunk of the cache is 16 pages at least
DEFAULT_BLOCK_LENGTH = 4  # of SDAR's released checkpoints, when the checkpoint does not say
STRUCTURES = ("json_schema", "regex", "grammar")
LARGEST_STRUCTURE = 65536  # characters of one
MOST_LOGPROBS = 20  # of a token's most probable alternatives
CHOICES = {
    "selector": ("auto", "both", "quest", "anchor"),
    "drift": ("auto", "previous", "refresh"),
    "candidates": ("all", "masked"),
    "first_pass": ("auto", "dense", "sparse"),
    "commit": ("dense", "sparse"),
    "planner": ("auto", "device", "host"),
}


@dataclass(frozen=True)
class AttentionConfig:
    """How later denoising passes read the prefix.

    Attributes
    ----------
    method : str
        A registered policy: "dense", "losa" (arXiv 2604.12056), "quest" (arXiv 2406.10774) or
        "sparsed" (arXiv 2509.24014).
    budget : int
        Prefix positions that each query selects, rounded up to whole pages.
    active : "auto", int or float
        losa: tokens of the block that are recomputed in a layer. "auto": those whose query has changed
        by more than `change_threshold`, however many. An int counts those that changed most (no more
        than the block has; 5 is the paper's), a float is a fraction of the block, rounded up. 0 reuses
        every stored result.
    change_threshold : float
        losa with `active="auto"`: the squared change of a token's query over the query's own square,
        both summed over heads and channels, above which the token is active.
    selector : {"auto", "both", "quest", "anchor"}
        losa: what ranks the pages for an active query: "quest", QUEST's bound, as in the paper; "anchor",
        the attention mass that each page had in the dense first pass for the same token and query head;
        "both", half of the pages by each (a page that both find is read once; by the bound the odd one).
        "auto" is "both" with `active="auto"` and a dense first pass, else "quest".
    drift : {"auto", "previous", "refresh"}
        losa: a token's query change is measured against its query of the previous pass, as the paper
        does, or against the query from which its stored result was computed, which bounds how stale the
        result is. "auto" is "refresh" with `active="auto"`, else "previous".
    candidates : {"all", "masked"}
        losa: tokens that can be active: all, or those still masked only; of fewer masked ones than
        `active` says, all are active.
    page_size : int
        Positions of a page, a multiple of 16 up to 65536.
    dense_layers : int
        This many first layers stay dense.
    first_pass : {"auto", "dense", "sparse"}
        How the first pass over a block reads the prefix: "auto" is the method's own way, dense for
        losa and sparsed, sparse for quest. When sparse, all tokens of the block select pages. What
        ranks pages by the masses of a dense first pass (`selector="anchor"` or "both", sparsed) refuses it.
    commit : {"dense", "sparse"}
        How the pass that writes a finished block's K/V reads the prefix.
    planner : {"auto", "device", "host"}
        Where tokens and pages are selected for a GPU: in its own kernels, or on the host. The same
        ones are; "auto" takes the faster. On the CPU it makes no difference.
    """

    method: str = "dense"
    budget: int = 256
    active: int | float | str = "auto"
    change_threshold: float = 0.05
    selector: str = "auto"
    drift: str = "auto"
    candidates: str = "all"
    page_size: int = 16
    dense_layers: int = 0
    first_pass: str = "auto"
    commit: str = "dense"
    planner: str = "auto"

    def __post_init__(self) -> None:
        if not (is_int(self.budget) and self.budget > 0):
            raise OptionError(f"budget must be a positive number of positions, not {self.budget!r}")
        counted = is_int(self.active) and self.active >= 0
        fraction = isinstance(self.active, float) and 0.0 <= self.active <= 1.0
        if not (self.active == "auto" or counted or fraction):
            raise OptionError(
                f"active must be a count of tokens (int, 0 or more), a fraction of the block "
                f"(float, 0.0 to 1.0) or 'auto', not {self.active!r}"
            )
        if not (is_number(self.change_threshold) and self.change_threshold >= 0):
            raise OptionError(f"change_threshold must be a number, 0 or more, not {self.change_threshold!r}")
        if not (
            is_int(self.page_size) and 0 < self.page_size <= LARGEST_PAGE and self.page_size % PAGE_UNIT == 0
        ):
            raise OptionError(
                f"page_size must be a multiple of {PAGE_UNIT} up to {LARGEST_PAGE}, not {self.page_size!r}"
            )
        if not (is_int(self.dense_layers) and self.dense_layers >= 0):
            raise OptionError(f"dense_layers must be 0 or more, not {self.dense_layers!r}")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise OptionError(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}")

    @property
    def pages_per_query(self) -> int:
        """Pages that hold `budget` positions."""
        return -(-self.budget // self.page_size)

    @property
    def pages_by_mass(self) -> int:
        """losa: of these, those that are ranked by their mass in the first pass; the others by the bound."""
        selector = self.selector
        if selector == "auto":
            selector = "both" if self.active == "auto" and self.first_pass != "sparse" else "quest"
        return {"quest": 0, "both": self.pages_per_query // 2, "anchor": self.pages_per_query}[selector]

    def active_count(self, block_length: int) -> int:
        """Tokens of a block of `block_length` that are active, at most."""
        if isinstance(self.active, str):
            return block_length
        if isinstance(self.active, float):
            # The product of an exact fraction can land a rounding above the whole number.
            return min(block_length, math.ceil(self.active * block_length - 1e-9))
        return min(block_length, self.active)


@dataclass(frozen=True)
class GenerationConfig:
    """One generation, with every default filled in.

    Made by :func:`generation_config`; the options are described at
    :meth:`losart.api.model.Model.generate`.
    """

    block_length: int
    mask_token_id: int
    denoising_steps: int
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 128
    remasking: str = "low_confidence_dynamic"
    confidence_threshold: float = 0.85
    reaches_threshold: bool = False
    sub_block_length: int | None = None
    editing_threshold: float = 1.0
    max_post_steps: int = 16
    eb_threshold: float = 0.35
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None
    logprobs: int | None = None
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    def __post_init__(self) -> None:
        for name, lowest in (
            ("max_new_tokens", 1),
            ("block_length", 1),
            ("denoising_steps", 1),
            ("max_post_steps", 0),
            ("mask_token_id", 0),
            ("top_k", 0),
        ):
            value = getattr(self, name)
            if not (is_int(value) and value >= lowest):
                raise OptionError(f"{name} must be an integer, {lowest} or more, not {value!r}")
        for name, highest in (
            ("confidence_threshold", 1.0),
            ("editing_threshold", 1.0),
            ("eb_threshold", math.inf),
            ("temperature", math.inf),
        ):
            value = getattr(self, name)
            if not (is_number(value) and 0.0 <= value <= highest):
                raise OptionError(f"{name} must be a number from 0 to {highest}, not {value!r}")
        length = self.sub_block_length
        if length is not None and not (is_int(length) and length > 0):
            raise OptionError(f"sub_block_length must be an integer, 1 or more, not {length!r}")
        if not isinstance(self.reaches_threshold, bool):
            raise OptionError(f"reaches_threshold must be true or false, not {self.reaches_threshold!r}")
        if not (is_number(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise OptionError(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        if not (self.seed is None or (is_int(self.seed) and self.seed >= 0)):
            raise OptionError(f"seed must be an integer, 0 or more, not {self.seed!r}")
        if not (self.logprobs is None or (is_int(self.logprobs) and 0 <= self.logprobs <= MOST_LOGPROBS)):
            raise OptionError(f"logprobs must be an integer from 0 to {MOST_LOGPROBS}, not {self.logprobs!r}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise OptionError(f"stop must be a string or a list of non-empty strings, not {self.stop!r}")
        if not all(is_int(token) and token >= 0 for token in self.stop_token_ids):
            raise OptionError(f"stop_token_ids must be a list of token ids, not {self.stop_token_ids!r}")
        structures = [name for name in STRUCTURES if getattr(self, name) is not None]
        for name in structures:
            text = getattr(self, name)
            if not isinstance(text, str):
                raise OptionError(f"{name} must be a string, not {text!r}")
            if len(text) > LARGEST_STRUCTURE:
                raise OptionError(f"{name} must have {LARGEST_STRUCTURE} characters at most, not {len(text)}")
        if len(structures) > 1:
            raise OptionError(f"{structures[1]} cannot be given beside {structures[0]}")
        if structures and self.edits:
            raise OptionError(
                f"editing_threshold must be 1 beside {structures[0]}, which needs tokens to stay as they are"
            )

    @property
    def structure(self) -> tuple[str, str] | None:
        """What answers must follow: one of `STRUCTURES`, and its text."""
        found = ((name, getattr(self, name)) for name in STRUCTURES)
        return next(((name, text) for name, text in found if text is not None), None)

    @property
    def edits(self) -> bool:
        """Whether tokens that a pass has fixed may be changed by those that follow."""
        return self.editing_threshold < 1


ATTENTION_OPTIONS = {f.name for f in dataclasses.fields(AttentionConfig)} - {"method"}
_GENERATION_OPTIONS = {f.name for f in dataclasses.fields(GenerationConfig)}
OPTIONS = tuple(sorted(_GENERATION_OPTIONS | ATTENTION_OPTIONS))


def _plain(value: Any) -> Any:
    """NumPy's scalars and arrays, alone or in a list, as Python's own."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, (list, tuple, set, frozenset)):
        return [item.tolist() if isinstance(item, np.generic) else item for item in value]
    return value


def _attention_config(options: dict[str, Any]) -> AttentionConfig:
    """The configuration of these options: equal ones are one object, which is quick to compare."""
    config = AttentionConfig(**options)
    key = tuple((type(value), value) for value in vars(config).values())  # 1, 1.0 and True differ
    with _LOCK:  # two threads could each find none
        return _ATTENTION_CONFIGS.setdefault(key, config)


_LOCK = threading.Lock()
_ATTENTION_CONFIGS: weakref.WeakValueDictionary[Any, AttentionConfig] = weakref.WeakValueDictionary()


def _as_tuple(name: str, value: Any, scalar: type) -> tuple[Any, ...]:
    if isinstance(value, scalar):
        return (value,)
    if isinstance(value, (list, tuple)):
        return tuple(value)
    raise OptionError(f"{name} must be a list of {scalar.__name__}, not {value!r}")


def _schema_text(schema: Any) -> str:
    """A JSON schema, or the text of one, as text."""
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        text = json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise OptionError(f"json_schema must be JSON: {error}") from None
    if not isinstance(schema, dict):
        raise OptionError(f"json_schema must be an object, not {schema!r}")
    return text


def generation_config(model: ModelConfig, options: dict[str, Any]) -> GenerationConfig:
    """The configuration of one generation, from the caller's options and the checkpoint's defaults.

    Parameters
    ----------
    model : ModelConfig
        Its block length, mask token and end tokens serve where `options` has none.
    options : dict
        Options by name, those of `GenerationConfig` and `AttentionConfig` in one; `attention`
        names the policy. NumPy's scalars and arrays serve as numbers and lists.

    Raises
    ------
    OptionError
        For an unknown option or one out of range.
    """
    own_names, given = dict(model.decoding.names), {}
    for name, value in options.items():
        if own_names.get(name, name) in given:
            raise OptionError(f"{name} and {own_names.get(name, name)} are the same option")
        given[own_names.get(name, name)] = value
    for name in given:
        if name not in OPTIONS:
            close = difflib.get_close_matches(name, OPTIONS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(OPTIONS)}"
            raise OptionError(f"unknown option {name!r}{hint}")

    values = {name: _plain(value) for name, value in given.items() if value is not None}
    attention = {name: values.pop(name) for name in list(values) if name in ATTENTION_OPTIONS}
    attention["method"] = values.pop("attention", AttentionConfig.method)
    if not isinstance(attention["method"], str):
        raise OptionError(f"attention must be the name of a policy, not {attention['method']!r}")

    block_length = values.setdefault("block_length", model.block_length or DEFAULT_BLOCK_LENGTH)
    defaults = dict(model.decoding.defaults)
    if values.keys() & set(STRUCTURES):
        defaults.pop("editing_threshold", None)  # tokens that a grammar has taken cannot change
    if "json_schema" in values:
        values["json_schema"] = _schema_text(values["json_schema"])
    values = defaults | values
    values.setdefault("denoising_steps", block_length)
    values.setdefault("mask_token_id", model.mask_token_id)
    if values["mask_token_id"] is None:
        raise OptionError("the checkpoint does not say its mask token: give mask_token_id")
    values["stop_token_ids"] = _as_tuple(
        "stop_token_ids", values.get("stop_token_ids", model.end_token_ids), int
    )
    values["stop"] = _as_tuple("stop", values.get("stop", ()), str)
    config = GenerationConfig(attention=_attention_config(attention), **values)
    for name, token in [("mask_token_id", config.mask_token_id)] + [
        ("stop_token_ids", token) for token in config.stop_token_ids
    ]:
        if token >= model.vocab_size:
            raise OptionError(f"{name}: {token} is outside the vocabulary of {model.vocab_size}")
    if config.block_length > model.max_positions:
        raise OptionError(
            f"block_length ({config.block_length}) must not be more than the model's max_positions "
            f"({model.max_positions})"
        )
    return config
