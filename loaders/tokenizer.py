"""The tokenizer of a checkpoint, and prompts of any kind to token ids."""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from losart.config.model import ModelConfig
from losart.errors import CheckpointError, DataError, PromptError
from losart.loaders.byte_level import bytes_of
from losart.loaders.chat_template import ChatTemplate
from losart.loaders.json_files import JsonObject, read_optional_json_object, read_text

if TYPE_CHECKING:
    import tokenizers

SPECIAL_TOKEN_KEYS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# SDAR's mask token; some of its checkpoints add it without declaring its role.
UNDECLARED_MASK_TOKEN = "<|MASK|>"

Prompt = str | Sequence[int] | Sequence[dict[str, str]]


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes
    ----------
    backend : tokenizers.Tokenizer
    special_tokens : mapping of str to str
        Content by role ("eos_token", "mask_token", ...) of those that are declared.
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    special_tokens: Mapping[str, str]

    def encode_file(self, file: Path, count: int) -> list[int]:
        """Token ids of the first part of a text, `count` of them or all; no more is read than that takes.

        Raises
        ------
        DataError
            The file is no text in UTF-8.
        """
        decoder, text, ids = codecs.getincrementaldecoder("utf-8")(), "", list[int]()
        with file.open("rb") as stream:
            while len(ids) < count:
                piece = stream.read(4 * count)
                try:
                    text += decoder.decode(piece, final=not piece)
                except UnicodeDecodeError as error:
                    raise DataError(f"{file}: is no text in UTF-8 ({error.reason})") from error
                ids = self.encode(text)
                if not piece:
                    break
        return ids[:count]

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`.

        Parameters
        ----------
        text : str
            Special tokens spelled out in it become their ids.
        special : bool
            Whether to add the special tokens that the tokenizer puts around every text.

        Raises
        ------
        PromptError
            If `text` is not a string of valid Unicode, or the tokenizer cannot encode it.
        """
        if not isinstance(text, str):
            raise PromptError(f"cannot tokenize {type(text).__name__}; expected a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(f"cannot tokenize text that is not valid Unicode: {error}") from error
        try:
            return self.backend.encode(text, add_special_tokens=special).ids
        except Exception as error:  # the library has no exception of its own
            raise PromptError(f"the tokenizer cannot tokenize the text: {error}") from error

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids; ids without a token are skipped, partial UTF-8 becomes U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def token_bytes(self, token: int) -> bytes | None:
        """What one token adds to a text in UTF-8, which may be a part of a character; special tokens as well.

        Empty for an id without a token. None where the tokenizer does not tell: it is not byte-level BPE.
        """
        if not self._byte_level:
            return None
        return bytes_of(self.backend.id_to_token(token) or "")

    @cached_property
    def _byte_level(self) -> bool:
        from tokenizers import decoders

        return isinstance(self.backend.decoder, decoders.ByteLevel)

    def token_to_id(self, token: str) -> int | None:
        """Id of the token with this content, None where there is none."""
        return self.backend.token_to_id(token)

    @property
    def mask_token_id(self) -> int | None:
        """Id of the mask token, None where the tokenizer has none."""
        return self._special_token_id("mask_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-sequence token, None where the tokenizer has none."""
        return self._special_token_id("eos_token")

    def _special_token_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.token_to_id(token)


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of the checkpoint in `directory`, None where there is no tokenizer.json.

    As in transformers, tokens that only tokenizer_config.json or special_tokens_map.json declares
    are added.

    Raises
    ------
    CheckpointError
        If a file is corrupt, or an added token cannot have the id that it claims.
    """
    file = directory / "tokenizer.json"
    if not file.exists():
        return None
    backend = _parse(file)
    # A saved length limit would silently truncate prompts.
    backend.no_truncation()
    backend.no_padding()

    config = read_optional_json_object(directory / "tokenizer_config.json")
    special_tokens_map = read_optional_json_object(directory / "special_tokens_map.json")
    _add_numbered_tokens(backend, config)
    special_tokens: dict[str, str] = {}
    for keys in (config, special_tokens_map):
        for role in SPECIAL_TOKEN_KEYS:
            if keys.get(role) is not None:
                special_tokens.setdefault(role, _content(keys, role, keys.get(role)))
        for key in ("additional_special_tokens", "extra_special_tokens"):
            _add_special_tokens(backend, _contents(keys, key))
    _add_special_tokens(backend, special_tokens.values())

    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    if UNDECLARED_MASK_TOKEN in added:
        special_tokens.setdefault("mask_token", UNDECLARED_MASK_TOKEN)
    return Tokenizer(backend, special_tokens)


def _parse(file: Path) -> tokenizers.Tokenizer:
    import tokenizers

    text = read_text(file)
    with errors_of_tokenizers(file):
        return tokenizers.Tokenizer.from_str(text)


@contextmanager
def errors_of_tokenizers(file: Path) -> Iterator[None]:
    """Make an error of the library, while a tokenizer is built, a CheckpointError that names the file."""
    try:
        yield
    except BaseException as error:
        # A panic inside the library is not an Exception; a KeyboardInterrupt must pass.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CheckpointError(f"{file}: not a sound tokenizer: {error}") from error
        raise
    # What parsing has freed glibc keeps, 116 MB of it for 150,000 merges.
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _add_numbered_tokens(backend: tokenizers.Tokenizer, config: JsonObject) -> None:
    """Add the tokens of tokenizer_config.json's added_tokens_decoder, each with its id."""
    import tokenizers

    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(key.isdecimal() and len(key) < 11 for key in decoder):
        raise CheckpointError(f"{config.file}: added_tokens_decoder must be an object of tokens by id")
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for key, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
        content = _content(config, f"added_tokens_decoder.{key}", entry)
        if content not in known:
            flags = entry if isinstance(entry, dict) else {"special": True}
            token = tokenizers.AddedToken(
                content,
                single_word=bool(flags.get("single_word", False)),
                lstrip=bool(flags.get("lstrip", False)),
                rstrip=bool(flags.get("rstrip", False)),
                special=bool(flags.get("special", False)),
                normalized=bool(flags.get("normalized", not flags.get("special", False))),
            )
            backend.add_tokens([token])
        if backend.token_to_id(content) != int(key):
            raise CheckpointError(
                f"{config.file}: added token {content!r} should have the id {key}, but tokenizer.json "
                f"gives it {backend.token_to_id(content)}"
            )


def _add_special_tokens(backend: tokenizers.Tokenizer, contents: Iterable[str]) -> None:
    import tokenizers

    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    new = dict.fromkeys(content for content in contents if content not in known)
    backend.add_special_tokens([tokenizers.AddedToken(content, special=True) for content in new])


def _contents(keys: JsonObject, key: str) -> list[str]:
    entries = keys.get(key) or []
    if isinstance(entries, dict):  # transformers 4.5x: content by role
        entries = list(entries.values())
    if not isinstance(entries, list):
        raise CheckpointError(f"{keys.file}: {key} must be a list of tokens")
    return [_content(keys, key, entry) for entry in entries]


def _content(keys: JsonObject, key: str, entry: Any) -> str:
    """Of a token that is written as its content, or as an object that holds it."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(content, str) or not content:
        raise CheckpointError(f"{keys.file}: {key} must be a token, a string or an object with its content")
    return content


def prompt_ids(
    prompt: Any,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids of one prompt.

    Parameters
    ----------
    prompt : str, list of dict, or list of int
        Text, chat messages, or token ids.
    config : ModelConfig
    tokenizer : Tokenizer or None
    template : ChatTemplate or None
    tools : list of dict, optional
        That a model may call which answers chat messages.

    Raises
    ------
    PromptError
        If the prompt is empty, too long, out of the vocabulary, or needs a tokenizer or chat template
        that the checkpoint does not have.
    """
    if isinstance(prompt, str):
        ids = _required(tokenizer, "a string").encode(prompt)
    elif _is_list(prompt) and len(prompt) > 0 and all(isinstance(item, dict) for item in prompt):
        encode = _required(tokenizer, "chat messages").encode
        if template is None:
            raise PromptError("the checkpoint has no chat template; give a string or token ids")
        ids = encode(template.render(prompt, tools=tools), special=False)
    elif _is_list(prompt) and all(_is_id(token) for token in prompt):
        ids = [int(token) for token in prompt]
    elif is_batch(prompt):
        raise PromptError("stream takes one prompt, not a list of prompts")
    else:
        raise PromptError("a prompt is a string, a list of chat messages, or a list of token ids")
    if not ids:
        raise PromptError("the prompt is empty")
    for i, token in enumerate(ids):
        if not 0 <= token < config.vocab_size:
            raise PromptError(
                f"token id {token} at place {i} of the prompt is outside the vocabulary of "
                f"{config.vocab_size}"
            )
    if len(ids) >= config.max_positions:
        raise PromptError(
            f"the prompt has {len(ids)} tokens; the model has {config.max_positions} positions for it "
            f"and the answer"
        )
    return ids


def is_batch(prompt: Any) -> bool:
    """Whether `prompt` is a list of prompts rather than one prompt."""
    return (
        _is_list(prompt)
        and len(prompt) > 0
        and all(isinstance(item, str) or _is_list(item) for item in prompt)
    )


def _required(tokenizer: Tokenizer | None, kind: str) -> Tokenizer:
    if tokenizer is None:
        raise PromptError(f"the checkpoint has no tokenizer.json for {kind}; give token ids")
    return tokenizer


def _is_id(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim > 0)
