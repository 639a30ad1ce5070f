"""The data of an adaptation: dialogues as the sampler draws them, and texts to recall from."""

import json

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="training needs torch")

import small_base as small  # noqa: E402
from adapt import recall_texts  # noqa: E402
from adapt.base_model import read_base  # noqa: E402
from adapt.chat_format import chat_format  # noqa: E402
from adapt.next_tokens import answer, nll  # noqa: E402
from adapt.sampler import Sampler, Sampling, dialogues  # noqa: E402
from adapt.step_texts import draw_texts, stages  # noqa: E402
from adapt.stream import slots  # noqa: E402
from adapt.texts import collect, load_texts, read_jsonl  # noqa: E402

from losart.errors import CheckpointError, DataError  # noqa: E402
from losart.eval.english import EVALUATION_WORDS  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small.small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def chat(base):
    return chat_format(base)


def test_a_conversation_is_what_the_template_renders(base, chat):
    turns = [("Hi there", "Hello."), ("2+2?", "4")]
    ids, answers = chat.conversation([tuple(base.tokenizer.encode(one) for one in turn) for turn in turns])
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    rendered = base.chat_template.render(messages[:3])
    assert ids == base.tokenizer.encode(rendered + "4<|im_end|>", special=False)
    said = [token for token, is_answer in zip(ids, answers, strict=True) if is_answer]
    assert base.tokenizer.decode(said, skip_special=False) == "Hello.<|im_end|>4<|im_end|>"


def test_sampling_yields_whole_dialogues(base, chat):
    options = Sampling(rows=8, length=96, longest_question=30, most_repeated=1.0, another_turn=0.5)
    sampler = Sampler(base, base.weights(), chat, options, seed=3, steps=400)
    # A random model hardly ever ends a turn: here it does so after some tokens.
    draw, rng = sampler.model.__call__, np.random.default_rng(0)

    def ends_often(tokens, positions, temperatures):
        ends = torch.from_numpy(rng.random(options.rows) < 0.1)
        return torch.where(ends, chat.end_id, draw(tokens, positions, temperatures))

    sampler.model = ends_often
    texts, counts = dialogues(sampler.run(60.0), chat, options.most_repeated)
    assert len(texts) == counts["whole"] + counts["cut"] > 20 and counts["question too long"]
    several = 0
    for ids, answers in (texts[number] for number in range(len(texts))):
        assert ids[: len(chat.before)].tolist() == chat.before and len(ids) <= options.length
        starts = np.flatnonzero(answers & ~np.roll(answers, 1))
        several += len(starts) > 1
        for start in starts:  # each answer follows the template's text, and ends with the end token
            assert ids[start - len(chat.to_answer) : start].tolist() == chat.to_answer
            last = start + int(np.argmin(np.append(answers[start:], False))) - 1
            assert ids[last] == chat.end_id or last == len(ids) - 1
        special = [one for one in ids[len(chat.before) :] if one >= 312]
        assert set(special) <= {*chat.to_answer, *chat.to_question, chat.end_id}
    assert several


def test_positions_and_cache_of_the_sampler_are_those_of_a_plain_pass(base, chat):
    options = Sampling(rows=3, length=64, min_p=0.999)  # greedy
    sampler = Sampler(base, base.weights(), chat, options, seed=1, steps=30)
    drawn = sampler.run(60.0)
    tokens, flags = drawn & (1 << 20) - 1, drawn >> 22
    for column in range(options.rows):
        assert not flags[:, column].any()
        given = (drawn[:, column] >> 21) & 1
        ids = [*chat.before, *tokens[:, column].tolist()]
        for step in np.flatnonzero(given == 0)[-2:].tolist():
            prompt = ids[: len(chat.before) + step]
            (expected,) = answer(base.shape, base.weights(), [prompt], 1, -1)
            assert expected == [tokens[step, column]] or expected[0] >= 312  # which it never draws


def test_nll_is_that_of_the_tokens(base):
    weights = base.weights()
    prompts, answers = [[11, 12], [13]], [[14], [15, 16, 17]]
    both, count = nll(base.shape, weights, prompts, answers, small.END_ID)
    alone = [
        nll(base.shape, weights, [p], [a], small.END_ID)[0] for p, a in zip(prompts, answers, strict=True)
    ]
    assert count == 4 and both == pytest.approx(sum(alone), rel=1e-4)


@pytest.mark.parametrize("length", [3000, 20000])
def test_facts_are_the_tokens_of_their_text(base, chat, length):
    writer = recall_texts.RecallTexts(base.tokenizer, chat)
    ids, answers = writer.facts(np.random.default_rng(length), length)
    assert len(ids) == len(answers) <= length < len(ids) + 100
    text = base.tokenizer.decode(ids, skip_special=False)
    assert base.tokenizer.encode(text, special=False) == ids
    said = base.tokenizer.decode([t for t, a in zip(ids, answers, strict=True) if a], skip_special=False)
    document = text[: text.index("\n\n")]
    codes = [code for one in said.split("<|im_end|>") for code in one.strip(".").split(" ") if code.isdigit()]
    assert codes and all(code in document for code in codes)


def test_words_of_training_are_none_of_evaluations():
    def words(of):
        phrases = (*of.subjects, *of.verbs, *of.times)
        return {*of.adjectives.split(), *of.nouns.split(), *of.places.split(), *phrases}

    for of in recall_texts.WORDS:
        assert not words(of) & words(EVALUATION_WORDS)


def test_what_was_said_is_repeated(base, chat):
    writer = recall_texts.RecallTexts(base.tokenizer, chat)
    encode = base.tokenizer.encode
    turns = [(encode(f"Question {i}?"), encode(f"Answer number {i} " * 9)) for i in range(12)]
    ids, answers = writer.repeats(np.random.default_rng(1), 4000, turns)
    assert len(ids) <= 4000 and any(answers)
    text = base.tokenizer.decode(ids)
    assert "Repeat your answer to" in text or "Quote what follows" in text


def test_own_texts_are_read(base, chat, tmp_path):
    file = tmp_path / "own.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]},
        {"text": "Plain."},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    texts = read_jsonl(file, base, chat, 100)
    texts.save(tmp_path / "own.npz")
    again = load_texts(tmp_path / "own.npz")
    for number, plain in enumerate((False, True)):
        ids, answers = again[number]
        assert ids[-1] == chat.end_id and answers[-1] and answers.all() == plain
        assert (ids == texts[number][0]).all() and (answers == texts[number][1]).all()
    file.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    with pytest.raises(DataError, match="line 1"):
        read_jsonl(file, base, chat, 100)


def test_texts_of_a_step_fill_it_and_have_their_shares():
    short = collect(([7] * 30 + [2], [False] * 5 + [True] * 26) for _ in range(50))
    long = collect(([8] * 200 + [2], [False] * 100 + [True] * 101) for _ in range(50))
    texts = {"dialogues": short, "recall-200": long}
    (stage,) = stages(list(texts), 0.5, 0.3)
    assert stage.tokens == {"dialogues": 0.5, "recall-200": 0.5}
    drawn = draw_texts(np.random.default_rng(0), texts, stage, 20_000, 2)
    used = sum(slots(len(ids)) for ids, _ in drawn)
    assert 19_000 < used <= 20_000
    assert 0.35 < sum(len(ids) for ids, _ in drawn if ids[0] == 8) / used < 0.65


def test_longer_texts_come_in_later():
    names = ["dialogues", "recall-512", "recall-1024", "recall-4096"]
    found = stages(names, 0.4, 0.3)
    assert [stage.until for stage in found] == pytest.approx([0.3, 0.6, 1.0])
    assert found[0].tokens == {"dialogues": 0.6, "recall-512": 0.4}
    assert all(sum(stage.tokens.values()) == pytest.approx(1) for stage in found)


@pytest.mark.gpu
def test_triton_draws_what_torch_does(base, chat):
    pytest.importorskip("triton")
    from adapt.sampler_step import TorchStep, TritonStep

    banned = torch.zeros(small.VOCAB, dtype=torch.bool, device="cuda")
    banned[:20] = True
    weights = base.weights("cuda")
    steps = [kind(base.shape, weights, 3, 32, banned, 0.999, 1) for kind in (TorchStep, TritonStep)]
    for step in steps:  # greedy, with such a min_p
        step.begin(chat.before)
    tokens, positions = (torch.tensor(ids, device="cuda") for ids in ([50, 60, 70], [5, 5, 9]))
    for _ in range(3):
        expected, found = (step(tokens, positions, torch.ones(3, device="cuda")).clone() for step in steps)
        assert expected.tolist() == found.tolist()
        tokens, positions = expected, positions + 1
    torch.testing.assert_close(steps[0].cache.k, steps[1].cache.k, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(steps[0].cache.v, steps[1].cache.v, atol=1e-3, rtol=1e-3)


def test_a_gguf_becomes_the_directory_it_was_made_from(tmp_path):
    gguf = pytest.importorskip("gguf")
    from adapt.gguf_directory import convert

    names = ["<|im_end|>", "<|im_start|>", *map(chr, range(97, 123)), "ab"]
    rng, hidden, heads, kv, size, layers = np.random.default_rng(0), 64, 4, 2, 16, 2
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for add, value in (
        (writer.add_block_count, layers),
        (writer.add_context_length, 128),
        (writer.add_embedding_length, hidden),
        (writer.add_feed_forward_length, 96),
        (writer.add_head_count, heads),
        (writer.add_head_count_kv, kv),
        (writer.add_rope_freq_base, 1e4),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_vocab_size, len(names)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, names),
        (writer.add_token_types, [3, 3, *[1] * 27]),
        (writer.add_token_merges, ["a b"]),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 0),
        (writer.add_pad_token_id, 0),
        (writer.add_chat_template, "{{ messages[0]['content'] }}"),
    ):
        add(value)
    matrices: dict[str, np.ndarray] = {}

    def matrix(name, *sizes):
        matrices[name] = rng.standard_normal(sizes).astype(np.float32)
        return matrices[name]

    def permuted(value, count):  # as llama.cpp's conversion does it
        return value.reshape(count, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)

    writer.add_tensor("token_embd.weight", matrix("embed", len(names), hidden))
    writer.add_tensor("output_norm.weight", matrix("norm", hidden))
    for i in range(layers):
        q, k = matrix(f"q{i}", heads * size, hidden), matrix(f"k{i}", kv * size, hidden)
        writer.add_tensor(f"blk.{i}.attn_q.weight", permuted(q, heads))
        writer.add_tensor(f"blk.{i}.attn_k.weight", permuted(k, kv))
        writer.add_tensor(f"blk.{i}.attn_v.weight", matrix(f"v{i}", kv * size, hidden))
        writer.add_tensor(f"blk.{i}.attn_output.weight", matrix(f"o{i}", hidden, heads * size))
        for name, sizes in (("gate", (96, hidden)), ("up", (96, hidden)), ("down", (hidden, 96))):
            writer.add_tensor(f"blk.{i}.ffn_{name}.weight", matrix(f"{name}{i}", *sizes))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", matrix(f"{name}{i}", hidden))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(CheckpointError, match="its SHA-256 is"):
        convert(tmp_path / "x.gguf", tmp_path / "out")
    convert(tmp_path / "x.gguf", tmp_path / "out", None)
    base = read_base(tmp_path / "out")
    weights = base.weights()
    assert (base.shape.heads, base.shape.kv_heads, base.shape.tied, base.end_id) == (heads, kv, True, 0)
    for kind in "qkvo":
        for i, value in enumerate(weights[kind]):
            np.testing.assert_array_equal(value.numpy(), matrices[f"{kind}{i}"])
    np.testing.assert_array_equal(weights["post_norm"][1].numpy(), matrices["ffn_norm1"])
    assert base.tokenizer.encode("abc<|im_end|>") != [] and base.tokenizer.encode("<|im_end|>") == [0]
