"""Evaluation: English questions, the grid, the figures of a cell, models that know the answers."""

import itertools
import math
import re
from types import SimpleNamespace
from typing import Any

import english_solver
import numpy as np
import pytest
import symbol_solver

import losart
from losart.errors import OptionError
from losart.eval import TASKS, EvalConfig, evaluate
from losart.eval.english import Facts, make_text, numbers
from losart.eval.evaluation import measure, wilson_interval
from losart.eval.questions import find_style, make_questions
from losart.eval.vocabulary import write_tokenizer
from losart.loaders.tokenizer import read_tokenizer


class Oracle:
    """Stands for a model that answers as `solve` says."""

    def __init__(self, tokenizer, solve, chat_template=None):
        self.tokenizer, self.chat_template, self.solve = tokenizer, chat_template, solve
        self.config = SimpleNamespace(max_positions=8192)
        self.asked = []

    def session(self, **options):
        return SimpleNamespace(generate=lambda prompt, **others: self.answer(prompt, options | others))

    def answer(self, prompt, options):
        self.asked.append((prompt, options))
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        stats = losart.Stats(100, 8, 0, 96, 3, 1, 0.5, 2.0, 0.25, 0.5, 0.75)
        return losart.GenerationResult(self.solve(text), [], "stop", stats)


@pytest.fixture(scope="module")
def symbol_tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("symbols")
    write_tokenizer(directory)
    return read_tokenizer(directory)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return losart.load(tiny_checkpoint, device="cpu")


@pytest.mark.parametrize("task", TASKS)
def test_a_reader_of_english_finds_the_answer(task):
    for seed in range(5):
        text, answer = make_text(
            np.random.default_rng(seed), TASKS[task], 1500, lambda text: len(text.split())
        )
        assert english_solver.solve(text) == answer
        assert len(answer.split(", ")) == TASKS[task].keys * TASKS[task].values


def test_facts_say_what_tells_an_answer():
    rng = np.random.default_rng(0)
    facts = Facts(rng, 20)
    for task in TASKS.values():
        question, answer, told = facts.ask(rng, task)
        assert question.startswith("What") and numbers(" ".join(told)) == numbers(answer)
        assert set(told) <= set(facts.sentences)


@pytest.mark.parametrize("length", [2048, 3500])
def test_english_prompts_are_as_long_as_asked(model, length):
    for question in make_questions(model, TASKS["keys-2"], length, 2, 0, "english"):
        ids = model.tokenizer.encode(model.chat_template.render(question.prompt), special=False)
        assert 0.95 * length < len(ids) <= length


def test_normalised_answers_are_their_numbers():
    assert numbers("The codes are 12345, and\n678.") == "12345 678"


@pytest.mark.parametrize(
    ("task", "length", "limit"),
    [("key", 1024, 8), ("keys-2", 256, 4), ("last", 1024, 3), ("chains-2", 1024, 2)],
)
def test_questions_about_one_document_are_asked_in_turn_and_share_no_fact(task, length, limit):
    prompts = [one.prompt for one in make_questions(None, TASKS[task], length, 40, 5, "symbols")]
    assert len(set(prompts)) == len(prompts) == 40
    in_turn = itertools.groupby(prompts, lambda prompt: prompt.rsplit("\n", 2)[0])
    documents = {document: list(asked) for document, asked in in_turn}
    assert sum(map(len, documents.values())) == 40
    assert 1 < max(map(len, documents.values())) <= limit
    for asked in documents.values():
        names = []
        for prompt in asked:
            keys = re.findall(r"\w+-\w+", prompt.splitlines()[-1].lower())
            names.append({key.replace("-", " ") for key in keys})
            names[-1] |= set(re.findall(r"\w+ \w+", symbol_solver.solve(prompt)))
        assert len(set.union(*names)) == sum(map(len, names))
    fewer = make_questions(None, TASKS[task], length, 7, 5, "symbols")
    assert [one.prompt for one in fewer] == prompts[:7]


def test_style_follows_the_chat_template(model, symbol_tokenizer):
    assert find_style(model) == "english"
    assert find_style(Oracle(symbol_tokenizer, None)) == "symbols"
    assert find_style(Oracle(symbol_tokenizer, None, model.chat_template)) == "english"
    assert find_style(Oracle(model.tokenizer, None)) == "english"
    with pytest.raises(OptionError, match="needs a checkpoint with the vocabulary"):
        find_style(model, "symbols")


def test_an_oracle_answers_all_in_symbols(symbol_tokenizer):
    oracle = Oracle(symbol_tokenizer, symbol_solver.solve)
    cells = evaluate(oracle, EvalConfig(lengths=(256,), attention=("dense",), samples=3))
    assert [(cell.task, cell.accuracy, cell.right) for cell in cells] == [(task, 1.0, 3) for task in TASKS]
    assert {len(symbol_tokenizer.encode(prompt)) for prompt, _ in oracle.asked} == {256}


def test_an_oracle_answers_all_in_english(model):
    oracle = Oracle(model.tokenizer, english_solver.solve, model.chat_template)
    cells = evaluate(oracle, EvalConfig(lengths=(3000,), attention=("dense",), samples=1))
    assert all(cell.accuracy == 1.0 for cell in cells)


def test_figures_of_a_cell(symbol_tokenizer):
    oracle = Oracle(symbol_tokenizer, lambda text: symbol_solver.solve(text) if len(oracle.asked) % 2 else "")
    config = EvalConfig(("key",), (256,), ("losa",), (64,), (3,), samples=4, options={"commit": "sparse"})
    (cell,) = evaluate(oracle, config)
    assert (cell.attention, cell.budget, cell.active) == ("losa", 64, 3)
    assert (cell.samples, cell.right, cell.accuracy) == (4, 2, 0.5)
    assert (cell.low, cell.high) == wilson_interval(2, 4)
    assert (cell.sparse_density, cell.density, cell.active_fraction) == (0.5, 0.75, 0.25)
    assert (cell.tokens_per_second, cell.passes_per_question) == (4.0, 4.0)
    assert cell.prefilled_tokens == 4 * 96
    options = {"attention": "losa", "budget": 64, "active": 3, "commit": "sparse", "max_new_tokens": 16}
    assert all(passed == {**options, "seed": 0} for _, passed in oracle.asked)


def test_every_setting_gets_the_same_questions(symbol_tokenizer):
    oracle = Oracle(symbol_tokenizer, symbol_solver.solve)
    progress = []
    config = EvalConfig(("key",), (256,), ("dense", "quest"), samples=3)
    evaluate(oracle, config, progress=lambda *counts: progress.append(counts))
    prompts = [prompt for prompt, _ in oracle.asked]
    assert prompts[::2] == prompts[1::2] and len(set(prompts)) == 3
    assert [options["attention"] for _, options in oracle.asked] == ["dense", "quest"] * 3
    assert progress == [(done, 6) for done in range(1, 7)]
    evaluate(oracle, EvalConfig(("key",), (256,), ("dense",), samples=2))
    assert [prompt for prompt, _ in oracle.asked][6:] == prompts[:3:2]


def test_a_random_model_answers_nothing_and_the_same_again(model):
    config = EvalConfig(("key",), (1500,), ("dense", "losa"), (64,), samples=1, options={"max_new_tokens": 8})
    one, two = evaluate(model, config), evaluate(model, config)
    assert [cell.right for cell in one] == [0, 0]
    assert one[0].density == 1.0 and one[0].sparse_density is None and one[1].sparse_density < 1.0
    for cell, same in zip(one, two, strict=True):
        assert cell.sparse_density == same.sparse_density and cell.right == same.right


def test_settings_that_share_a_session_do_not_share_options(model):
    """What a setting leaves out has the default, not what the first one says."""
    config = EvalConfig(("key",), (1500,), samples=1, options={"max_new_tokens": 24})
    settings: list[dict[str, Any]] = [
        {
            "attention": "losa",
            "active": 2,
            "budget": 32,
            "denoising_steps": 2,
            "block_length": 8,
        },
        {"attention": "losa", "block_length": 8},
        {"attention": "dense", "block_length": 8},
    ]
    together = measure(model, "key", 1500, settings, config, "english")
    alone = [measure(model, "key", 1500, [setting], config, "english")[0] for setting in settings]
    for one, other in zip(together, alone, strict=True):
        for name in ("sparse_density", "density", "active_fraction", "passes_per_question", "right"):
            assert getattr(one, name) == getattr(other, name)
    assert together[0].passes_per_question < together[1].passes_per_question
    assert together[0].sparse_density != together[1].sparse_density is not None


def test_the_grid_leaves_out_what_a_method_has_not():
    assert EvalConfig(attention=("dense", "quest", "losa"), budgets=(64, 128), active=(3, 0.5)).settings == [
        {"attention": "dense"},
        {"attention": "quest", "budget": 64},
        {"attention": "quest", "budget": 128},
        {"attention": "losa", "budget": 64, "active": 3},
        {"attention": "losa", "budget": 64, "active": 0.5},
        {"attention": "losa", "budget": 128, "active": 3},
        {"attention": "losa", "budget": 128, "active": 0.5},
    ]


@pytest.mark.parametrize(("right", "samples"), [(0, 10), (8, 10), (50, 50), (1, 1)])
def test_wilson_interval_solves_its_equation(right, samples):
    # Its ends are where the share lies 1.96 standard errors of the end itself away.
    z, share = 1.959963984540054, right / samples
    low, high = wilson_interval(right, samples)
    assert low <= share <= high
    for end in (low, high):
        if 0.0 < end < 1.0:
            assert abs(share - end) == pytest.approx(z * math.sqrt(end * (1 - end) / samples))


def test_wilson_interval_of_known_values():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("riddle",)}, "tasks must be among"),
        ({"tasks": ()}, "tasks must not be empty"),
        ({"samples": 0}, "samples must be an integer, 1 or more"),
        ({"style": "prose"}, "style must be auto, symbols, english"),
        ({"lengths": (-1,)}, "lengths must be positive"),
        ({"lengths": (4096,)}, "do not fit the model's 4096 positions"),
        ({"lengths": (100,)}, "no room for"),
        ({"budgets": (0,)}, "budget must be"),
        ({"active": (2.0,)}, "active must be"),
        ({"options": {"selektor": "quest"}}, "did you mean 'selector'"),
    ],
)
def test_says_what_is_wrong_before_any_question(model, options, message):
    with pytest.raises(OptionError, match=message):
        evaluate(model, EvalConfig(**{"lengths": (1500,)} | options))
