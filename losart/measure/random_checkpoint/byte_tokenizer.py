"""An untrained byte-level BPE tokenizer in Qwen's format, for a vocabulary of any size."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

QWEN_TEXT_TOKENS = 151643  # of Qwen's vocabulary; its special tokens follow
_RESERVED_IN_QWEN = 23  # special tokens between <|im_end|> and <|MASK|>
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def special_token_ids(vocab_size: int) -> dict[str, int]:
    """Ids of the special tokens; SDAR's where the vocabulary is Qwen's of 151936.

    As in released checkpoints, the last few ids of the vocabulary have no token.
    """
    first = min(vocab_size - 8, QWEN_TEXT_TOKENS)
    if first < 1:
        raise ValueError(f"a vocabulary of {vocab_size} has no room for the special tokens")
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    if first == QWEN_TEXT_TOKENS:
        names += [f"<|reserved_{i}|>" for i in range(_RESERVED_IN_QWEN)]
    return {name: first + i for i, name in enumerate([*names, "<|MASK|>"])}


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json with a ChatML template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    ids = special_token_ids(vocab_size)
    first_special = min(ids.values())
    if first_special < 256:
        raise ValueError(f"a byte-level tokenizer needs a vocabulary of 264 or more, not {vocab_size}")
    vocab = {text: i for i, text in enumerate(itertools.islice(_texts(), first_special))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ids])
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)

    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {str(i): {"content": name} | flags for name, i in ids.items()},
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "mask_token": "<|MASK|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _texts() -> Iterator[str]:
    """The bytes, in the alphabet of byte-level BPE, then pairs, then triples of them.

    Without merges, encoding yields only single bytes, but every id that a model may predict has a text.
    """
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    yield from letters
    for length in itertools.count(2):
        for text in itertools.product(letters, repeat=length):
            yield "".join(text)
