"""Symbolic tasks: their answers follow from the text, and the text has the ids that training sees."""

from zlib import crc32

import numpy as np
import pytest
from symbol_solver import solve

from losart.errors import OptionError
from losart.eval.symbol_facts import is_evaluation_key
from losart.eval.symbol_text import answer_text, document_text, prompt_text, question_text
from losart.eval.symbols import BLOCK, FACT, fact_count, make_batch
from losart.eval.tasks import TASKS
from losart.eval.vocabulary import END, FIRST_SYMBOL, MASK, PAD, VOCABULARY_SIZE, vocabulary, write_tokenizer
from losart.loaders.tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("symbols")
    write_tokenizer(directory)
    return read_tokenizer(directory)


def asked_keys(questions):
    """Pairs of symbols that stand side by side in questions."""
    symbols = questions.reshape(-1, BLOCK // 2, 2)
    return symbols[(symbols >= FIRST_SYMBOL).all(axis=-1)] - FIRST_SYMBOL


@pytest.mark.parametrize("length", [128, 256, 1024])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_reader_finds_the_answer(task, length, split):
    batch = make_batch(np.random.default_rng(1), 3, length, {task: 1.0}, questions=4, split=split)
    assert batch.documents.shape == (3, length - BLOCK)
    assert (batch.tasks == list(TASKS).index(task)).all()
    for document, questions, answers in zip(batch.documents, batch.questions, batch.answers, strict=True):
        for question, answer in zip(questions, answers, strict=True):
            assert solve(prompt_text(document, question)) == answer_text(answer)
            assert len(answer_text(answer).split()) == 2 * TASKS[task].pairs


def test_text_has_the_ids_of_training(tokenizer):
    batch = make_batch(np.random.default_rng(2), 6, 512, questions=8)
    for document, questions in zip(batch.documents, batch.questions, strict=True):
        for question in questions:
            ids = tokenizer.encode(prompt_text(document, question))
            assert ids == [*document.tolist(), *question.tolist()]
            assert len(ids) % BLOCK == 0


def test_answers_end_and_decode_to_their_words(tokenizer):
    batch = make_batch(np.random.default_rng(3), 4, 256, questions=8)
    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    for answer in batch.answers.reshape(-1, BLOCK):
        length = answer.tolist().index(end)
        assert (answer[length + 1 :] == pad).all() and (answer[:length] >= FIRST_SYMBOL).all()
        assert tokenizer.decode(answer.tolist()) == answer_text(answer)


def test_the_text_is_readable():
    names = {word: token for token, word in enumerate(vocabulary())}
    ids = [names[word] for word in ["the", "old", "river", "babi", "zozu", "fafi", "podi", "and", "moon"]]
    assert document_text(ids) == "the old river Babi-zozu: fafi-podi. and moon"
    question = [names[word] for word in ["babi", "zozu", ">", ">", *["?"] * 12]]
    assert question_text(question) == "Babi-zozu >> ????????????"


def test_the_tokenizer_declares_its_special_tokens(tokenizer):
    assert tokenizer.mask_token_id == tokenizer.token_to_id(MASK)
    assert tokenizer.eos_token_id == tokenizer.token_to_id(END)
    words = vocabulary()
    assert len(words) == len(set(words)) == VOCABULARY_SIZE
    assert [tokenizer.token_to_id(word) for word in words] == list(range(VOCABULARY_SIZE))


def test_every_word_is_a_token_of_its_own(tokenizer):
    words = vocabulary()[4:]
    assert tokenizer.encode(" ".join(words)) == list(range(4, VOCABULARY_SIZE))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_keys_of_training_and_evaluation_are_disjoint(split):
    batch = make_batch(np.random.default_rng(4), 64, 1024, questions=16, split=split)
    keys = asked_keys(batch.questions)
    assert len(keys) > 64 * 16 and (is_evaluation_key(keys[:, 0], keys[:, 1]) == (split == "eval")).all()
    for document in batch.documents[:8]:
        facts = document[document >= FIRST_SYMBOL].reshape(-1, FACT) - FIRST_SYMBOL
        assert len(facts) == fact_count(len(document))
        assert (is_evaluation_key(facts[:, 0], facts[:, 1]) == (split == "eval")).all()


def test_keys_are_alike_but_set_as_often_as_they_should_be():
    batch = make_batch(np.random.default_rng(5), 16, 1024)
    for document in batch.documents:
        facts = document[document >= FIRST_SYMBOL].reshape(-1, FACT)
        keys, counts = np.unique(facts[:, :2], axis=0, return_counts=True)
        assert set(counts.tolist()) == {1, 3}
        assert len(np.unique(keys[:, 0])) < len(keys) - 2  # keys that differ in their second symbol alone


def test_equal_seeds_give_equal_batches():
    one, same, other = (make_batch(np.random.default_rng(seed), 2, 256, questions=3) for seed in (6, 6, 7))
    for name in ("documents", "questions", "answers", "tasks"):
        assert np.array_equal(getattr(one, name), getattr(same, name))
    assert not np.array_equal(one.documents, other.documents)


def test_the_questions_of_a_seed_stay_the_same():
    """So that scores of different versions are of the same questions."""
    batch = make_batch(np.random.default_rng(6), 2, 256, questions=3, split="eval")
    parts = (batch.documents, batch.questions, batch.answers, batch.tasks)
    sums = [crc32(part.astype("<i4").tobytes()) for part in parts]
    assert sums == [1471667754, 1762542235, 896453637, 1179128505]


def test_sources_are_where_the_answers_stand():
    batch = make_batch(np.random.default_rng(10), 4, 512, questions=64)
    symbols = batch.answers >= FIRST_SYMBOL
    assert ((batch.sources >= 0) == symbols).all() and batch.sources.dtype == np.int32
    row, question, index = np.nonzero(symbols)
    source = batch.sources[symbols]
    assert (batch.documents[row, source] == batch.answers[symbols]).all()
    # Of a question's first pair the key stands right before it; values of one key go back in the document.
    first = index == 0
    for back, part in ((2, 0), (1, 1)):
        told = batch.documents[row[first], source[first] - back]
        assert (told == batch.questions[row[first], question[first], part]).all()
    values = batch.sources[batch.tasks == list(TASKS).index("values")]
    assert len(values) and (values[:, 0] > values[:, 2]).all() and (values[:, 2] > values[:, 4]).all()


def test_tasks_are_drawn_by_their_weights():
    tasks = make_batch(
        np.random.default_rng(8), 50, 256, {"key": 3.0, "chain-2": 1.0}, questions=40
    ).tasks.ravel()
    names = np.array(list(TASKS))[tasks]
    assert set(names.tolist()) == {"key", "chain-2"}
    assert 0.7 < (names == "key").mean() < 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 100}, "multiples of 16"),
        ({"length": 64}, "128 or more"),
        ({"length": 256, "facts": 61}, "facts must be an integer from 12 to 60"),
        ({"length": 256, "tasks": {"riddle": 1.0}}, "tasks must be among key, "),
        ({"length": 256, "split": "test"}, "split must be train or eval"),
    ],
)
def test_says_what_does_not_fit(options, message):
    with pytest.raises(OptionError, match=message):
        make_batch(np.random.default_rng(0), 1, **options)
