"""Answers that follow JSON schemas, regular expressions and grammars, with models of random weights."""

from __future__ import annotations

import builtins
import json
import re
from collections import Counter

import pytest
from families import FAMILIES, SMALL

import losart
from losart.cli import main
from losart.measure.random_checkpoint import write_checkpoint
from losart.structured import grammars

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")
from schemas import check, fault, random_schema

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "maxItems": 3},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
SUM = 'start: term ("+" term)*\nterm: NUM | "(" start ")"\nNUM: /[0-9]{1,3}/'


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("small"), **SMALL | {"tokenizer": True})


@pytest.fixture(scope="module")
def model(path):
    return losart.load(path, "cpu", deterministic=True)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9}])
def test_answers_are_what_schemas_describe(model, options):
    ended = check(model, range(20), max_new_tokens=300, block_length=8, **options)
    assert ended["stop"] >= 12 and ended["refused"] == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_follows_a_schema(name, tmp_path):
    family, options = FAMILIES[name]
    model = losart.load(write_checkpoint(tmp_path, family=family, **SMALL | {"tokenizer": True}), "cpu")
    options = {name: value for name, value in options.items() if name != "editing_threshold"}
    greedy, drawn = {"attention": "losa", "budget": 16}, {"temperature": 0.9, "seed": 1}
    for prompt, more in (([7] * 5, greedy), ([7] * 16, drawn)):
        steps = list(model.stream(prompt, json_schema=SCHEMA, max_new_tokens=450, **options, **more))
        assert steps[-1].result.finish_reason == "stop" and fault(SCHEMA, steps[-1].result) is None
        assert not any(step.edited for step in steps)


def test_together_they_are_what_they_are_alone_and_leave_others_as_they_are(model):
    options = {"max_new_tokens": 60, "block_length": 8}
    asked = [
        options | {"json_schema": SCHEMA},
        options,
        options | {"regex": "[a-f]{3,30}!", "temperature": 1.0, "seed": 3},
        options | {"temperature": 1.0, "seed": 3},
        options | {"grammar": SUM, "remasking": "low_confidence_static", "denoising_steps": 3},
        options | {"json_schema": random_schema(3), "attention": "losa", "budget": 16},
    ]
    prompts = [[5 + number] * (3 + 7 * number) for number in range(len(asked))]
    alone = [model.generate(prompt, **one).token_ids for prompt, one in zip(prompts, asked, strict=True)]
    engine = losart.Engine(model)
    streams = [engine.submit(prompt, **one) for prompt, one in zip(prompts, asked, strict=True)]
    assert [stream.result().token_ids for stream in streams] == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_other_grammars(model, temperature):
    options = {"max_new_tokens": 60, "block_length": 4, "temperature": temperature, "seed": 2}
    for seed in range(5):
        options["seed"] = seed
        result = model.generate([seed + 9] * 6, regex=r"[0-9]{4}-(jan|feb): [^ü]?ü*", **options)
        cut = result.finish_reason == "length"
        assert cut or re.fullmatch(r"[0-9]{4}-(jan|feb): [^ü]?ü*", result.text)
        text = model.generate([seed + 9] * 6, grammar=SUM, **options).text
        assert re.fullmatch(r"[0-9+()]*", text) and not re.search(r"\d{4}|\+\)|\(\+|\)\(|\+\+", text)


def test_what_is_cut_is_said_so(model):
    whole = model.generate([9] * 5, json_schema=SCHEMA, max_new_tokens=200)
    assert whole.finish_reason == "stop" and json.loads(whole.text)
    for new in (1, len(whole.token_ids) - 1, len(whole.token_ids)):
        result = model.generate([9] * 5, json_schema=SCHEMA, max_new_tokens=new)
        assert result.token_ids == whole.token_ids[:new]
        assert result.finish_reason == ("stop" if new == len(whole.token_ids) else "length")


def test_stop_strings_and_end_tokens_end_it_before(model):
    options = {"json_schema": SCHEMA, "max_new_tokens": 200}
    whole = model.generate([9] * 5, **options)
    result = model.generate([9] * 5, stop='"sizes', **options)
    assert result.text == whole.text.partition('"sizes')[0] and result.finish_reason == "stop"
    third = whole.token_ids[2]
    result = model.generate([9] * 5, stop_token_ids=[third], **options)
    assert result.token_ids == whole.token_ids[: whole.token_ids.index(third) + 1]
    # An end that the grammar leaves open is an end token, whatever the options say.
    open_end = {"regex": "a*", "temperature": 1.0, "max_new_tokens": 200}
    result = model.generate([9] * 5, stop_token_ids=[], seed=1, **open_end)
    assert result.token_ids[-1] in model.config.end_token_ids and set(result.text) <= {"a"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_are_those_of_the_tokens_that_are_fixed(model, temperature):
    """Of the model's own distribution, in which a grammar's token may be an unlikely one."""
    options = {"json_schema": SCHEMA, "max_new_tokens": 200, "temperature": temperature, "seed": 4}
    plain, result = (model.generate([9] * 5, **options, **more) for more in ({}, {"logprobs": 3}))
    assert result.token_ids == plain.token_ids == [one.token for one in result.logprobs]
    assert all(one.logprob <= one.top[0][1] <= 0 for one in result.logprobs)
    assert any(one.token != one.top[0][0] for one in result.logprobs)


def test_sessions_and_chats_follow_it_too(model):
    chat = losart.Chat(model, json_schema=SCHEMA, max_new_tokens=100)
    for _ in range(2):
        assert fault(SCHEMA, chat.say("again")) is None
    session = model.session(max_new_tokens=60)
    assert session.generate([5] * 40, regex="(yes|no)").text in ("yes", "no")
    assert session.generate([5] * 40).text not in ("yes", "no")


def test_text_of_a_schema_is_the_schema(model):
    options = {"max_new_tokens": 60}
    for schema in (SCHEMA, {}):
        found = [model.generate([4] * 4, json_schema=one, **options) for one in (schema, json.dumps(schema))]
        assert found[0].token_ids == found[1].token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json_schema": {"type": "thing"}}, "json_schema: Invalid type: thing"),
        ({"json_schema": {"not": {"type": "null"}}}, 'json_schema: Unimplemented keys: ["not"]'),
        ({"json_schema": {"type": "integer", "minimum": 2, "maximum": 1}}, "json_schema: Unsatisfiable"),
        ({"json_schema": {"$ref": "#"}}, "json_schema: no text fits it"),
        ({"json_schema": {"$ref": "file:///etc/hostname"}}, "json_schema: Resource"),
        ({"json_schema": {"const": "\ud800"}}, "json_schema: "),
        ({"regex": "(a"}, "regex: unclosed group"),
        ({"regex": "\ud800"}, "regex: "),
        ({"regex": "((a{100}){100}){100}"}, None),
        ({"grammar": "start: other"}, "grammar: at 1(8): unknown name"),
        ({"grammar": "start: " + "(" * 30000}, "grammar: "),
        ({"grammar": 'start: "a" | start'}, None),
        ({"json_schema": {"enum": [f"value {number}" for number in range(4000)]}}, None),
    ],
)
def test_wrong_and_hostile_grammars_are_refused_at_once(model, options, message):
    if message is None:
        assert model.stream([5, 6], **options)
        return
    with pytest.raises(losart.OptionError) as error:
        model.stream([5, 6], **options)
    assert str(error.value).startswith(message) and len(str(error.value)) < 400


def test_what_cannot_be_compiled_in_time_is_refused(model, monkeypatch):
    """Intersections of many regular expressions take exponential time, and heed no limit."""
    monkeypatch.setattr(grammars, "TRIAL_SECONDS", 1)
    many = [{"type": "string", "pattern": f"a{number}"} for number in range(60)]
    with pytest.raises(losart.OptionError, match="json_schema: it cannot be compiled in 1 seconds"):
        model.stream([5, 6], json_schema={"allOf": many})
    few = {"allOf": many[:1], "maxLength": 9}
    assert fault(few, model.generate([5, 6], json_schema=few, max_new_tokens=60)) is None


def test_a_grammar_that_becomes_too_complex_ends_its_generation_alone(model):
    engine = losart.Engine(model)
    free = engine.submit([5, 6], max_new_tokens=20)
    hard = engine.submit([5, 6], max_new_tokens=200, regex="(.{1,500}){1,100}x")
    with pytest.raises(losart.OptionError, match="regex: lexer error: too many expressions"):
        hard.result()
    assert len(free.result().token_ids) == 20


def test_what_is_needed_and_missing_is_named(model, tmp_path, monkeypatch):
    small = losart.load(device="cpu")
    with pytest.raises(losart.OptionError, match="regex: the checkpoint's tokenizer cannot follow a grammar"):
        small.stream([4, 5], regex="a")
    bare = losart.load(write_checkpoint(tmp_path, **SMALL), "cpu")
    with pytest.raises(losart.OptionError, match="regex: the checkpoint has no tokenizer"):
        bare.stream([4, 5], regex="a")
    imported = builtins.__import__

    def without(name, *arguments, **more):
        if name == "llguidance":
            raise ImportError(name)
        return imported(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        losart.OptionError, match=r"regex needs llguidance: pip install 'losart\[structured\]'"
    ):
        model.stream([4, 5], regex="other")
    assert model.generate([4, 5], max_new_tokens=4)


def test_grammars_are_compiled_once(path, monkeypatch):
    model, compiled = losart.load(path, "cpu"), Counter()
    original = grammars.Grammars._compile

    def compile(self, option, text):
        compiled[text] += 1
        return original(self, option, text)

    monkeypatch.setattr(grammars.Grammars, "_compile", compile)
    for regex in ("ab|cd", "x{3}", "ab|cd"):
        assert len(model.generate([[5], [6]], regex=regex, max_new_tokens=9)) == 2
    assert compiled == {"ab|cd": 1, "x{3}": 1}
    for number in range(grammars.HELD):
        model._grammars.matcher("regex", f"a{number}")
    assert len(model._grammars._compiled) == grammars.HELD


# On the command line.


def test_the_command_takes_schemas_and_grammars(path, tmp_path, capsys):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "sum.lark").write_text(SUM)
    generate = ["generate", str(path), "--prompt", "x", "--device", "cpu", "--max-new-tokens", "200"]
    answers = []
    for schema in (str(tmp_path / "schema.json"), json.dumps(SCHEMA)):
        assert main([*generate, "--json-schema", schema]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1] and answers[0].keys() == {"name", "sizes"}
    assert main([*generate, "--regex", "(yes|no)"]) == 0
    assert capsys.readouterr().out in ("yes\n", "no\n")
    assert main([*generate, "--grammar", str(tmp_path / "sum.lark")]) == 0
    assert re.fullmatch(r"[0-9+()]+\n", capsys.readouterr().out)
    for wrong in (["--json-schema", "none.json"], ["--regex", "a", "--grammar", str(tmp_path / "sum.lark")]):
        with pytest.raises(SystemExit):
            main([*generate, *wrong])


def test_lines_of_a_batch_have_their_own(path, tmp_path):
    lines = [
        {"prompt": "x", "json_schema": SCHEMA},
        {"prompt": "x", "regex": "(yes|no)"},
        {"prompt": "x", "json_schema": json.dumps(SCHEMA)},
        {"prompt": "x", "regex": "(", "id": "wrong"},
    ]
    source, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    command = ["batch", str(source), str(answers), "--model", str(path), "--device", "cpu"]
    assert main([*command, "--max-new-tokens", "200"]) == 1
    texts = [json.loads(line)["text"] for line in answers.read_text().splitlines()]
    assert json.loads(texts[0]).keys() == {"name", "sizes"} and texts[2] == texts[0]
    assert texts[1] in ("yes", "no") and len(texts) == 3
