"""The vocabulary of the symbolic tasks, and its tokenizer.json."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

PAD, END, MASK, UNKNOWN = "<|pad|>", "<|end|>", "<|MASK|>", "<|unk|>"
ASK, HOP, EARLIER = "?", ">", "+"
MARKS = (PAD, END, MASK, UNKNOWN, ASK, HOP, EARLIER)
SYMBOLS = 1024
VOCABULARY_SIZE = 1280
FIRST_FILLER = len(MARKS)
FIRST_SYMBOL = VOCABULARY_SIZE - SYMBOLS

# Everyday words, none of which looks like a symbol.
_FILLER = """
the a of and to in was it for on with as at by from that this when while where before after then there
over under near beyond along across around between behind above below inside outside through toward
again always never often seldom sometimes soon later early still only almost quite rather very once twice
old new young small large long short wide narrow high low deep shallow warm cold cool dry wet dark bright
pale grey green blue brown white black red golden silver quiet loud soft hard smooth rough heavy light
slow quick steady sudden gentle fierce calm open closed empty full broken whole plain simple strange common
river stream lake pond sea shore bank bridge ford mill harbour boat ship sail anchor island beach cliff cave
hill valley mountain ridge slope meadow field pasture orchard garden hedge fence gate path road lane track
forest wood grove oak birch pine willow elm branch leaf root bark moss fern grass clover heather thistle
stone rock sand clay dust mud snow ice frost rain mist fog cloud storm wind thunder sky sun moon star dawn
noon dusk evening night morning winter spring summer autumn week month year hour moment
house cottage barn stable roof wall door window chimney hearth stair cellar attic kitchen table chair bench
lamp candle fire smoke ash bread cheese butter honey apple pear plum grain wheat barley flour salt water
horse goat sheep dog cat fox hare deer owl crow swan goose heron trout
farmer miller baker smith weaver shepherd sailor fisher hunter carpenter traveller stranger neighbour child
stood lay sat ran walked turned rose fell grew shone waited rested
"""


def vocabulary() -> list[str]:
    """All words by token id: marks, filler, symbols."""
    filler = _FILLER.split()[: VOCABULARY_SIZE - len(MARKS) - SYMBOLS]
    consonants = "bdfghjklmnprstvz"
    first = [c + v for c, v in itertools.product(consonants, "ao")]
    second = [c + v for c, v in itertools.product(consonants, "iu")]
    return [*MARKS, *filler, *(a + b for a, b in itertools.product(first, second))]


def token_id(mark: str) -> int:
    """Token id of one of `MARKS`."""
    return MARKS.index(mark)


def write_tokenizer(directory: str | os.PathLike[str]) -> None:
    """Write tokenizer.json and tokenizer_config.json into a directory.

    Each word is a token. Case, line breaks and all punctuation but the marks `? > +` mean nothing,
    so that a document can be set as readers expect it.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    words = {word: token for token, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\w?>+]+"), "removed"),
            pre_tokenizers.Split(Regex(r"[?>+]"), "isolated"),
        ]
    )
    special = (PAD, END, MASK, UNKNOWN)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    directory = Path(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "mask_token": MASK,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
