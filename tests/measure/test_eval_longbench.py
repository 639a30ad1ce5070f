"""LongBench's files, prompts and F1, on small files of its form."""

import json
from types import SimpleNamespace

import pytest

import losart
from losart.cli import main
from losart.errors import DataError
from losart.eval import EvalConfig
from losart.eval.longbench import best_f1, evaluate_longbench, f1, make_prompt, normalise

PROMPTS = {
    "hotpotqa": "Passages.\n{context}\nQuestion: {input}\nAnswer:",
    "triviaqa": "Examples.\n{context}\n\n{input}",
}


def row(dataset, number, context="", **changes):
    fields = {
        "input": f"Who is number {number}?",
        "context": context or f"Passage {number}: {{braces}} and so on.",
        "answers": [f"The Person {number}", f"P. {number}"],
        "length": 5,
        "dataset": dataset,
        "language": "en",
        "all_classes": None,
        "_id": f"id{number}",
    }
    return fields | changes


@pytest.fixture
def longbench(tmp_path):
    """A directory with two data sets, of 3 and 2 questions."""
    (tmp_path / "data").mkdir()
    (tmp_path / "config").mkdir()
    for dataset, count in (("hotpotqa", 3), ("triviaqa", 2)):
        lines = [json.dumps(row(dataset, number)) for number in range(count)]
        (tmp_path / "data" / f"{dataset}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "config" / "dataset2prompt.json").write_text(json.dumps(PROMPTS))
    (tmp_path / "config" / "dataset2maxlen.json").write_text(json.dumps({"hotpotqa": 4, "triviaqa": 6}))
    return tmp_path


class Fake:
    """Stands for a model that has another one's tokenizer and answers in a certain way."""

    def __init__(self, model, answer):
        self.tokenizer, self.chat_template = model.tokenizer, model.chat_template
        self.config, self.answer = SimpleNamespace(max_positions=4096), answer
        self.asked = []

    def session(self, **options):
        return SimpleNamespace(generate=lambda prompt, **others: self.generate(prompt, **options | others))

    def generate(self, prompt, **options):
        self.asked.append((prompt, options))
        stats = losart.Stats(100, 8, 0, 96, 3, 1, 0.5, 2.0, None, None, 1.0)
        return losart.GenerationResult(self.answer, [], "stop", stats)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return losart.load(tiny_checkpoint, device="cpu")


def test_normalised_answers():
    assert normalise("  The Cat's   whiskers, an\nA-team.") == "cats whiskers ateam"


def test_f1_by_hand():
    assert f1("the cat sat", "A cat sat!") == 1.0
    # Shared: cat, sat, of 3 words and 4 wanted ones.
    assert f1("cat sat down", "big cat sat here") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    # A word counts as often as both have it.
    assert f1("no no no", "no") == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))
    assert f1("", "no") == f1("the", "a") == f1("yes", "no") == 0.0


def test_the_best_answer_counts_and_few_shot_answers_end_with_their_line():
    assert best_f1("hotpotqa", "second", ["first", "second"]) == 1.0
    assert best_f1("triviaqa", "\n\nsecond\nQuestion: what?", ["second"]) == 1.0
    assert best_f1("hotpotqa", "second\nthird", ["second"]) == pytest.approx(2 / 3)


def test_long_prompts_lose_their_middle(model):
    text = "".join(chr(97 + i % 26) for i in range(300))
    plain = make_prompt(model, "triviaqa", text, 101)
    ids = model.tokenizer.encode(text)
    assert len(ids) == 300 and plain == text[:50] + text[-50:]
    assert make_prompt(model, "triviaqa", text, 300) == text
    assert make_prompt(model, "hotpotqa", text, 101) == [{"role": "user", "content": plain}]


def test_scores_and_their_average(model, longbench):
    fake = Fake(model, "Person 1")
    config = EvalConfig(attention=("dense",), seed=3)
    scores = evaluate_longbench(fake, longbench, ["hotpotqa", "triviaqa"], config)
    # Against "person 0": half of the words, so F1 0.5.
    assert [(score.dataset, score.samples, score.f1) for score in scores] == [
        ("hotpotqa", 3, pytest.approx(100 * (0.5 + 1 + 0.5) / 3)),
        ("triviaqa", 2, pytest.approx(75)),
        ("average", 5, pytest.approx((200 / 3 + 75) / 2)),
    ]
    assert scores[-1].density == 1.0 and scores[-1].sparse_density is None
    prompt, options = fake.asked[0]
    content = "Passages.\nPassage 0: {braces} and so on.\nQuestion: Who is number 0?\nAnswer:"
    assert prompt == [{"role": "user", "content": content}]
    assert options == {"attention": "dense", "max_new_tokens": 4, "seed": 3}
    prompt, options = fake.asked[-1]
    assert prompt == "Examples.\nPassage 1: {braces} and so on.\n\nWho is number 1?"
    assert options["max_new_tokens"] == 6


def test_the_configuration_may_lie_beside_the_data(model, longbench):
    for name in ("dataset2prompt.json", "dataset2maxlen.json"):
        (longbench / "config" / name).rename(longbench / name)
    config = EvalConfig(attention=("dense",), options={"max_new_tokens": 9})
    fake = Fake(model, "")
    evaluate_longbench(fake, longbench, ["hotpotqa"], config, samples=2)
    assert [options["max_new_tokens"] for _, options in fake.asked] == [9, 9]


def test_the_command_prints_and_writes_scores(tiny_checkpoint, longbench, capsys):
    file = longbench / "scores.json"
    arguments = [
        "--longbench",
        str(longbench),
        "--attention",
        "dense,losa",
        "--budgets",
        "32",
        "--samples",
        "1",
    ]
    assert main(["eval", str(tiny_checkpoint), "--device", "cpu", *arguments, "--json", str(file)]) == 0
    rows = [line.split()[:4] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [
        [dataset, *setting]
        for dataset in ("hotpotqa", "triviaqa", "average")
        for setting in (["dense", "-", "-"], ["losa", "32", "auto"])
    ]
    cells = json.loads(file.read_text())["cells"]
    assert [cell["samples"] for cell in cells] == [1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("data/hotpotqa.jsonl", "{]", "hotpotqa.jsonl, line 1: not valid JSON"),
        ("data/hotpotqa.jsonl", "[1]", "hotpotqa.jsonl, line 1: not a JSON object"),
        ("data/hotpotqa.jsonl", '\n{"answers": ["a"]}', "line 2: does not fit the prompt of 'hotpotqa'"),
        ("data/hotpotqa.jsonl", json.dumps(row("hotpotqa", 1, answers="x")), "answers must be a list"),
        ("data/hotpotqa.jsonl", "", "hotpotqa.jsonl: no questions"),
        ("config/dataset2maxlen.json", "{}", "no prompt or no number of new tokens for 'hotpotqa'"),
    ],
)
def test_files_of_another_form_are_named(model, longbench, file, text, message):
    (longbench / file).write_text(text)
    with pytest.raises(DataError, match=message):
        evaluate_longbench(model, longbench, ["hotpotqa"], EvalConfig())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tasks", "multifieldqa_zh"], 1, "losart: losart scores the data sets hotpotqa"),
        (["--tasks", "qasper"], 1, "losart: {}: no prompt or no number"),
        (["--lengths", "5000"], 2, "losart: lengths: prompts of LongBench must have 2 to 3964 tokens"),
        (["--lengths", "100,200"], 2, "losart: --longbench takes one of --lengths"),
        (["--style", "english"], 2, "losart: --style is for"),
        (["--longbench", "/nowhere"], 1, "losart: /nowhere: no data/NAME.jsonl of LongBench"),
    ],
)
def test_mistakes_are_one_line(tiny_checkpoint, longbench, capsys, arguments, code, message):
    command = ["eval", str(tiny_checkpoint), "--device", "cpu", "--longbench", str(longbench), *arguments]
    assert main(command) == code
    error = capsys.readouterr().err
    assert error.startswith(message.format(longbench)) and error.count("\n") == 1
