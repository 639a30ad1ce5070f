from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from losart.errors import CheckpointError, PromptError
from losart.loaders.tokenizer import read_tokenizer

TEXTS = [
    "",
    "hello world",
    "  two  spaces\n\n\ttab\r\n",
    "ünïcödé, 漢字, 🙂👩‍👩‍👧 and e\u0301",
    "<|im_start|>user\nhi<|im_end|>\n<|MASK|><|MASK|>",
    "<|im_start|",
    "12345 don't I'LL",
    "\0\x01",
]
valid_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return read_tokenizer(tiny_checkpoint)


@pytest.fixture
def edited(make_checkpoint):
    """Read a checkpoint's tokenizer after an edit of its two files."""

    def edited(edit):
        directory = make_checkpoint()
        files = [directory / "tokenizer.json", directory / "tokenizer_config.json"]
        contents = [json.loads(file.read_text()) for file in files]
        edit(*contents)
        for file, content in zip(files, contents, strict=True):
            file.write_text(json.dumps(content))
        return read_tokenizer(directory)

    return edited


def undeclare(backend, config, *, content="<|MASK|>"):
    """Take a special token out of both files."""
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] != content]
    decoder = config["added_tokens_decoder"]
    config["added_tokens_decoder"] = {i: token for i, token in decoder.items() if token["content"] != content}
    config.pop("mask_token")


@given(valid_text)
def test_decoding_gives_the_text_back(tokenizer, text):
    import unicodedata

    normal = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == normal


def test_special_tokens(tokenizer):
    assert tokenizer.special_tokens == {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|MASK|>",
    }
    assert tokenizer.mask_token_id == tokenizer.token_to_id("<|MASK|>") == 315
    assert tokenizer.eos_token_id == tokenizer.token_to_id("<|im_end|>") == 314
    assert tokenizer.token_to_id("<|no such token|>") is None


def test_special_tokens_in_text_become_one_id_and_can_be_skipped(tokenizer):
    ids = tokenizer.encode("a<|MASK|>b")
    assert ids == [tokenizer.token_to_id("a"), 315, tokenizer.token_to_id("b")]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special=False) == "a<|MASK|>b"


def test_ids_without_a_token_decode_to_nothing(tokenizer):
    a = tokenizer.token_to_id("a")
    assert tokenizer.decode([a, 318, 319, a]) == "aa"


@given(valid_text)
def test_bytes_of_tokens_make_up_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == tokenizer.decode(ids, skip_special=False)


def test_bytes_of_each_token_are_what_it_decodes_to(tokenizer):
    size = tokenizer.backend.get_vocab_size()
    assert {tokenizer.token_bytes(i) for i in range(256)} == {bytes([byte]) for byte in range(256)}
    for token in range(size + 2):
        found = tokenizer.token_bytes(token)
        assert found.decode(errors="replace") == tokenizer.decode([token], skip_special=False)


def test_bytes_of_an_added_token_of_letters_that_are_no_bytes(edited):
    def add(backend, config):
        last = max(backend["added_tokens"], key=lambda token: token["id"])
        backend["added_tokens"].append(last | {"id": last["id"] + 1, "content": "漢", "special": False})

    tokenizer = edited(add)
    token = tokenizer.token_to_id("漢")
    assert tokenizer.token_bytes(token) == "漢".encode()
    assert tokenizer.decode([token]) == "漢"


def test_tokenizers_of_other_kinds_tell_no_bytes(edited):
    tokenizer = edited(lambda backend, config: backend.update(decoder={"type": "Fuse"}))
    assert tokenizer.token_bytes(5) is None


def test_special_asks_for_the_tokens_around_a_text(edited):
    def add_template(backend, config):
        backend["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                "<|endoftext|>": {"id": "<|endoftext|>", "ids": [312], "tokens": ["<|endoftext|>"]}
            },
        }

    tokenizer = edited(add_template)
    plain = tokenizer.encode("abc", special=False)
    assert tokenizer.encode("abc") == [312, *plain]
    assert len(plain) == 3


@pytest.mark.parametrize("text", [None, b"bytes", 3, ["a"], "\ud800"])
def test_what_cannot_be_tokenized(tokenizer, text):
    with pytest.raises(PromptError, match="cannot tokenize"):
        tokenizer.encode(text)


def test_text_that_the_tokenizer_has_no_token_for(edited):
    def know_one_word(backend, config):
        backend["model"] = {"type": "WordLevel", "vocab": {"hello": 0}, "unk_token": "<unk>"}
        backend |= {"pre_tokenizer": {"type": "Whitespace"}, "decoder": None, "post_processor": None}
        for i, token in enumerate(backend["added_tokens"], 1):
            token["id"] = i
        config.pop("added_tokens_decoder")

    tokenizer = edited(know_one_word)
    assert tokenizer.encode("hello hello") == [0, 0]
    with pytest.raises(PromptError, match="cannot tokenize the text: "):
        tokenizer.encode("hello world")


def test_saved_truncation_does_not_cut_prompts(edited):
    def truncate(backend, config):
        backend["truncation"] = {
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        backend["padding"] = {
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 312,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        }

    tokenizer = edited(truncate)
    assert len(tokenizer.encode("abcdefghij")) == 10
    assert len(tokenizer.encode("a")) == 1


def test_numbered_token_that_only_the_config_has(edited):
    def move_mask(backend, config):
        entry = {"content": "<|MASK|>", "special": True, "lstrip": False, "rstrip": True}
        undeclare(backend, config)
        config["added_tokens_decoder"]["315"] = entry

    tokenizer = edited(move_mask)
    assert tokenizer.encode("<|MASK|>") == [315]
    assert tokenizer.mask_token_id == 315, "known by its content, though not declared"
    assert tokenizer.decode([315]) == ""
    assert tokenizer.encode("<|MASK|>  a") == [315, tokenizer.token_to_id("a")], "rstrip was kept"


@pytest.mark.parametrize("number", ["314", "316", "400"])
def test_numbered_token_that_cannot_get_its_id(edited, number):
    def renumber(backend, config):
        undeclare(backend, config)
        config["added_tokens_decoder"][number] = {"content": "<|MASK|>", "special": True}

    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: added token .* the id {number}"):
        edited(renumber)


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
@pytest.mark.parametrize("entry", ["<|MASK|>", {"content": "<|MASK|>", "special": True}])
def test_mask_token_that_is_only_an_additional_special_token(edited, key, entry):
    def move_mask(backend, config):
        undeclare(backend, config)
        config[key] = [entry]

    tokenizer = edited(move_mask)
    assert tokenizer.encode("<|MASK|>") == [315]
    assert tokenizer.mask_token_id == 315


def test_declared_token_that_no_list_holds_is_added(edited):
    def declare(backend, config):
        config["bos_token"] = {"content": "<|new|>", "__type": "AddedToken"}

    tokenizer = edited(declare)
    assert tokenizer.special_tokens["bos_token"] == "<|new|>"
    assert tokenizer.encode("<|new|>") == [316]


def test_no_mask_token(edited):
    tokenizer = edited(undeclare)
    assert tokenizer.mask_token_id is None
    assert "mask_token" not in tokenizer.special_tokens


def test_special_tokens_map_fills_what_the_config_leaves_open(make_checkpoint):
    directory = make_checkpoint()
    extra = {"bos_token": "<|im_start|>", "eos_token": "<|im_start|>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(extra))
    tokenizer = read_tokenizer(directory)
    assert tokenizer.special_tokens["bos_token"] == "<|im_start|>"
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"


def test_tokenizer_json_alone_is_enough(make_checkpoint):
    directory = make_checkpoint()
    (directory / "tokenizer_config.json").unlink()
    tokenizer = read_tokenizer(directory)
    assert tokenizer.mask_token_id == 315
    assert tokenizer.eos_token_id is None


def test_no_tokenizer(make_checkpoint):
    assert read_tokenizer(make_checkpoint(tokenizer=False)) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"model": {"type": "BPE"}}', b"\xff", b"\0" * 50])
def test_corrupt_tokenizer(make_checkpoint, content):
    directory = make_checkpoint()
    (directory / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not"):
        read_tokenizer(directory)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token", 3),
        ("eos_token", {"content": None}),
        ("eos_token", ""),
        ("added_tokens_decoder", [1]),
        ("added_tokens_decoder", {"x": "<|a|>"}),
        ("added_tokens_decoder", {"-1": "<|a|>"}),
        ("added_tokens_decoder", {"315": {}}),
        ("additional_special_tokens", "<|a|>"),
        ("additional_special_tokens", [None]),
    ],
)
def test_malformed_special_tokens(edited, key, value):
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {key}"):
        edited(lambda backend, config: config.update({key: value}))


@pytest.fixture(scope="module")
def theirs(tiny_checkpoint):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)


@pytest.mark.parity
@pytest.mark.parametrize("text", TEXTS)
def test_equals_transformers(tokenizer, theirs, text):
    ids = tokenizer.encode(text)
    assert ids == theirs.encode(text)
    assert tokenizer.encode(text, special=False) == theirs.encode(text, add_special_tokens=False)
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special=skip) == theirs.decode(
            ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )


@pytest.mark.parity
@given(valid_text)
def test_equals_transformers_on_any_text(tokenizer, theirs, text):
    assert tokenizer.encode(text) == theirs.encode(text)


@pytest.mark.parity
def test_special_tokens_equal_those_of_transformers(tokenizer, theirs):
    assert tokenizer.special_tokens == theirs.special_tokens_map
    assert tokenizer.mask_token_id == theirs.mask_token_id
    assert tokenizer.eos_token_id == theirs.eos_token_id
