"""The growing text of a generation, and where it ends."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losart.engine.output import CONTEXT_TOKENS, TAIL_TOKENS, Output
from losart.loaders import Tokenizer, open_checkpoint

TEXTS = st.text(alphabet=st.sampled_from("ab \n\tß€漢😀\u200d\ufffd"), max_size=150)
quick = settings(max_examples=100, deadline=None)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint) -> Tokenizer:
    tokenizer = open_checkpoint(tiny_checkpoint).tokenizer
    assert tokenizer is not None
    return tokenizer


def bytes_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """A token for each byte of the text: the tokenizer merges nothing."""
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text.encode()) and tokenizer.decode(tokens) == text
    return tokens


def cut(tokens: list[int], sizes: list[int]) -> list[list[int]]:
    """The tokens in pieces of these sizes, over and over."""
    pieces, start = [], 0
    while start < len(tokens):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(tokens[start : start + size])
        start += size
    return pieces


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=6)


# Text


@quick
@given(tokens=st.lists(st.integers(0, 319), max_size=300), sizes=sizes)
def test_text_grows_to_the_decoded_tokens(tokenizer, tokens, sizes):
    """Of any tokens: bytes that are no UTF-8, special tokens, ids without a token."""
    output, shown = Output(10**6, decode=tokenizer.decode), ""
    for piece in cut(tokens, sizes):
        output.extend(piece)
        assert output.text.startswith(shown)
        shown = output.text
        whole = tokenizer.decode(output.tokens)
        assert shown == whole.rstrip("\ufffd")
    assert output.tokens == tokens and output.finish_reason is None


@quick
@given(text=TEXTS, sizes=sizes)
def test_a_cut_character_is_held_back(tokenizer, text, sizes):
    tokens = bytes_of(tokenizer, text)
    output = Output(len(tokens) or 1, decode=tokenizer.decode)
    for piece in cut(tokens, sizes):
        output.extend(piece)
        assert text.startswith(output.text)
    assert output.text == text
    assert output.finish_reason == ("length" if tokens else None)


def test_an_early_prefix_of_the_text_is_shown(tokenizer):
    """Only what is cut is held back, not more."""
    output = Output(100, decode=tokenizer.decode)
    for token, shown in zip(
        bytes_of(tokenizer, "a€b😀"), ["a", "a", "a", "a€", *["a€b"] * 4, "a€b😀"], strict=True
    ):
        output.extend([token])
        assert output.text == shown


def test_few_tokens_are_decoded_at_a_time(tokenizer):
    longest = 0

    def decode(tokens):
        nonlocal longest
        longest = max(longest, len(tokens))
        return tokenizer.decode(tokens)

    output = Output(10_000, decode=decode)
    for piece in cut(bytes_of(tokenizer, "aß€😀 " * 200), [4]):
        output.extend(piece)
    assert longest <= TAIL_TOKENS + CONTEXT_TOKENS + 8
    assert output.text == "aß€😀 " * 200


# Where it ends


@pytest.mark.parametrize("sizes", [[1], [3], [100]])
def test_ends_at_the_limit(sizes):
    output = Output(7)
    for piece in cut(list(range(10)), sizes):
        output.extend(piece)
    assert output.tokens == list(range(7))
    assert output.finish_reason == "length" and output.text == ""


@pytest.mark.parametrize("sizes", [[1], [3], [100]])
def test_ends_with_the_first_stop_token(tokenizer, sizes):
    output = Output(100, [70, 80], decode=tokenizer.decode)
    for piece in cut([65, 66, 80, 67, 70], sizes):
        output.extend(piece)
    assert output.tokens == [65, 66, 80]
    assert output.finish_reason == "stop" and output.text == tokenizer.decode([65, 66, 80])


def test_a_stop_token_at_the_limit_is_a_stop():
    output = Output(3, [5])
    output.extend([3, 4, 5, 6])
    assert output.tokens == [3, 4, 5] and output.finish_reason == "stop"


@quick
@given(
    text=TEXTS,
    stops=st.lists(st.text("ab \nß€😀", min_size=1, max_size=4), min_size=1, max_size=3),
    sizes=sizes,
)
def test_ends_at_the_first_stop_string(tokenizer, text, stops, sizes):
    """Whatever tokens and pieces it lies across; what is shown on the way never needs to be taken back."""
    tokens = bytes_of(tokenizer, text)
    output, shown = Output(10**6, stop_strings=stops, decode=tokenizer.decode), ""
    for piece in cut(tokens, sizes):
        output.extend(piece)
        assert output.text.startswith(shown)
        shown = output.text
    # The fewest bytes whose text holds a stop string; the string that begins first cuts.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert output.finish_reason is None and output.tokens == tokens
        held_back = len(text.rstrip("\ufffd")) - len(shown)
        assert text.startswith(shown) and held_back < max(map(len, stops))
        return
    head = text[: min(ends)]
    assert output.finish_reason == "stop"
    assert output.text == head[: min(head.find(stop) for stop in stops if stop in head)]
    assert output.tokens == bytes_of(tokenizer, head)


@pytest.mark.parametrize(
    ("stop", "text", "shown"),
    [("END", "an END here", "an "), ("ENENDA", "ENENENDA!", "EN"), ("😀", "x😀y", "x"), ("a", "a", "")],
)
@pytest.mark.parametrize("before", [0, 60, 64, 200])
def test_a_stop_string_after_many_tokens(tokenizer, stop, text, shown, before):
    output = Output(10**6, stop_strings=[stop], decode=tokenizer.decode)
    for token in bytes_of(tokenizer, "." * before + text):
        output.extend([token])
    assert output.finish_reason == "stop" and output.text == "." * before + shown


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none(tokenizer):
    output = Output(5, stop_strings=["<end>", "dx"], decode=tokenizer.decode)
    for letter, shown in zip("a<ena", ["a", "a", "a", "a", "a<ena"], strict=True):
        output.extend(bytes_of(tokenizer, letter))
        assert output.text == shown
    last = Output(3, stop_strings=["<end>"], decode=tokenizer.decode)
    last.extend(bytes_of(tokenizer, "a<e"))
    assert last.finish_reason == "length" and last.text == "a<e"


def test_a_stop_string_whose_character_had_several_marks_for_its_bytes():
    """Decoders with a fallback to bytes give one mark for each, and then one character."""

    def decode(tokens):
        try:
            return bytes(tokens).decode()
        except UnicodeDecodeError as error:
            return bytes(tokens[: error.start]).decode() + "\ufffd" * (len(tokens) - error.start)

    output = Output(100, stop_strings=["😀"], decode=decode)
    for token in "ab😀".encode():
        output.extend([token])
    assert output.finish_reason == "stop" and output.text == "ab"


def test_a_decoder_that_treats_the_first_token_in_its_own_way():
    """Words with a space between, none before the first."""

    def decode(tokens):
        return " ".join(map(str, tokens))

    output = Output(10**6, decode=decode)
    for token in range(3 * TAIL_TOKENS):
        output.extend([token])
        assert output.text == decode(range(token + 1))


def test_without_a_tokenizer_there_is_no_text():
    output = Output(5, stop_strings=["a"])
    output.extend([1, 2, 3])
    assert output.text == "" and output.finish_reason is None
