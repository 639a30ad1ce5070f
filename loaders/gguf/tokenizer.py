"""The tokenizer and the chat template in a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from losart.errors import CheckpointError, ConfigError
from losart.loaders.chat_template import ChatTemplate
from losart.loaders.gguf.reader import Metadata
from losart.loaders.tokenizer import Tokenizer, errors_of_tokenizers

if TYPE_CHECKING:
    import tokenizers

PREFIX = "tokenizer.ggml."
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# By `tokenizer.ggml.pre`: how a text is split before merges.
PRE = ("gpt-2", "smollm", "qwen2", "deepseek-r1-qwen", "llama-bpe")


def read_tokenizer(metadata: Metadata) -> Tokenizer | None:
    """The tokenizer of a file, None where it has none.

    Raises
    ------
    ConfigError
        It is of a kind that is not supported, or a key is missing or impossible.
    CheckpointError
        Tokens and merges make up none.
    """
    kind = metadata.optional_text(f"{PREFIX}model")
    if kind in (None, "none"):
        return None
    if kind != "gpt2":
        raise metadata.error(f"{PREFIX}model", "'gpt2', which is byte-level BPE")
    pre = metadata.text(f"{PREFIX}pre")
    if pre not in PRE:
        raise metadata.error(f"{PREFIX}pre", f"one of {', '.join(PRE)}")
    tokens, merges = metadata.texts(f"{PREFIX}tokens"), metadata.texts(f"{PREFIX}merges")
    kinds = metadata.optional_integers(f"{PREFIX}token_type")
    kinds = np.ones(len(tokens), np.int32) if kinds is None else kinds
    if len(kinds) != len(tokens):
        raise metadata.error(f"{PREFIX}token_type", f"one for each of {len(tokens)} tokens")
    vocabulary = {token: i for i, token in enumerate(tokens) if kinds[i] != UNUSED}
    if len(vocabulary) != int((kinds != UNUSED).sum()):
        raise ConfigError(f"{metadata.file}: {PREFIX}tokens has a token twice")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    wrong = next((merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2), None)
    if wrong is not None:
        raise ConfigError(f"{metadata.file}: {PREFIX}merges must be pairs of tokens, not {wrong!r:.60}")
    special = {}
    for role, name in ROLES.items():
        number = metadata.optional_integer(PREFIX + name)
        if number is not None and number < len(tokens):
            special[role] = tokens[number]
    with errors_of_tokenizers(metadata.file):
        backend = _backend(pre, vocabulary, pairs)
        _add(backend, tokens, kinds)
        adds = metadata.optional_boolean(f"{PREFIX}add_bos_token")
        if (pre == "llama-bpe" if adds is None else adds) and "bos_token" in special:
            _begin_with(backend, special["bos_token"])
    return Tokenizer(backend, special)


def read_chat_template(metadata: Metadata, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """The chat template of a file, None where it has none."""
    source = metadata.optional_text("tokenizer.chat_template")
    return None if source is None else ChatTemplate(source, metadata.file, special_tokens)


def _backend(pre: str, vocabulary: dict[str, int], merges: list[Any]) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    parts: list[Any] = []
    if pre == "smollm":
        parts.append(pre_tokenizers.Digits(individual_digits=True))
    elif pre != "gpt-2":
        digits = r"\p{N}{1,3}" if pre == "llama-bpe" else r"\p{N}"
        parts.append(pre_tokenizers.Split(Regex(_WORDS + digits + _REST), "isolated"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*parts, byte_level])
    if pre in ("qwen2", "deepseek-r1-qwen"):
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _add(backend: tokenizers.Tokenizer, tokens: list[str], kinds: np.ndarray) -> None:
    """Tokens that are found in a text before it is split."""
    from tokenizers import AddedToken

    for index in np.flatnonzero((kinds == CONTROL) | (kinds == USER_DEFINED)):
        token, control = tokens[index], bool(kinds[index] == CONTROL)
        if not token:
            raise ValueError(f"token {index} is empty")
        added = AddedToken(token, special=control, normalized=False)
        (backend.add_special_tokens if control else backend.add_tokens)([added])


def _begin_with(backend: tokenizers.Tokenizer, token: str) -> None:
    from tokenizers import processors

    number = backend.token_to_id(token)
    if number is None:
        raise CheckpointError(f"the token {token!r} is unused, and begins every text")
    backend.post_processor = processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B:1"], special_tokens=[(token, number)]
    )
