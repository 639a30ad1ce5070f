"""losart as a model of lm_eval, with tasks of local files."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

import losart

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")

from losart.eval.harness import LosartLM  # noqa: E402

TEXTS = ["a b c d", "e f", "the cat sat"]
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["x", "y y", "z"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "x",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def request(*args):
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return LosartLM(str(tiny_checkpoint), device="cpu", block_length=8, max_gen_toks=5, batch_size=1)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory of tasks, as lm_eval's --include_path takes it."""
    path = tmp_path_factory.mktemp("tasks")
    (path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name, task in TASKS.items():
        files = {"data_files": {"test": str(path / "data.jsonl")}}
        task = {"task": f"losart_{name}", "dataset_path": "json", "dataset_kwargs": files} | task
        task |= {"test_split": "test", "target_delimiter": " ", "metadata": {"version": 1.0}}
        (path / f"{name}.yaml").write_text(json.dumps(task))  # which is YAML too
    return path


def test_requests_are_answered_as_losart_does(model):
    pairs = [("a b", " c d"), ("a b ", "c d"), ("", "a b"), ("the cat", " sat on")]
    found = model.loglikelihood([request(*pair) for pair in pairs])
    end = model.model.config.end_token_ids[0]
    plain = model.model.tokenizer.encode("a b", special=False)
    for (logprob, greedy), prompt, continuation in zip(
        found, ["a b", "a b", [end], "the cat"], [" c d", " c d", plain, " sat on"], strict=True
    ):
        expected = model.model.score(prompt, continuation, block_length=8)
        assert logprob == pytest.approx(expected.logprob, abs=1e-3) and greedy == expected.greedy
    (whole,) = model.loglikelihood_rolling([request("a b")])
    assert whole == pytest.approx(found[2][0], abs=1e-3)
    texts = model.generate_until(
        [request("a b", {"until": []}), request("a b", {"until": "c", "max_gen_toks": 9, "do_sample": False})]
    )
    options = {"block_length": 8, "seed": 0}
    expected = [
        model.model.generate("a b", max_new_tokens=5, **options).text,
        model.model.generate("a b", max_new_tokens=9, stop="c", **options).text,
    ]
    assert texts == expected


def test_long_texts_are_read_in_windows(make_checkpoint):
    path = make_checkpoint(max_positions=32, block_length=4)
    model = LosartLM(str(path), device="cpu")
    text = "a b c d e f g h " * 10
    ids = model.model.tokenizer.encode(text, special=False)
    assert len(ids) > 60
    (whole,) = model.loglikelihood_rolling([request(text)])
    # The model's positions but a block, and of the last window as much context as there is room for.
    total, before, last = 0.0, [model.model.config.end_token_ids[0]], 0
    while last < len(ids):
        first, last = last, min(last + 28, len(ids))
        before = ids[last - 29 : first] if first else before
        total += model.model.score(before, ids[first:last]).logprob
    assert whole == pytest.approx(total, abs=1e-3)
    ((logprob, _),) = model.loglikelihood([request(text[:-1], " a b")])
    encode = model.model.tokenizer.encode
    context, tokens = encode(text[:-1]), encode(text[:-1] + " a b")[len(encode(text[:-1])) :]
    context = context[-(32 - -(-len(tokens) // 4) * 4) :]
    assert logprob == pytest.approx(model.model.score(context, tokens).logprob, abs=1e-3)
    assert len(model.generate_until([request(text, {"max_gen_toks": 8})])) == 1


def test_what_a_task_asks_and_losart_has_not_is_told(model):
    with pytest.warns(UserWarning, match="losart has no num_beams"):
        model.generate_until([request("a b", {"num_beams": 2})])
    with pytest.raises(losart.OptionError, match="unknown option 'temprature'"):
        LosartLM(str(model._name), device="cpu", temprature=1)


def test_tasks_run_by_lm_eval(model, tasks):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = [f"losart_{name}" for name in TASKS]
    args = f"pretrained={model._name},block_length=8,device=cpu"
    assert LosartLM.create_from_arg_string(args, {"device": "cuda:0"}).model.device == "cpu"
    found = lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0)
    scores = [
        [model.model.score(text, f" {choice}", block_length=8).logprob for choice in ("x", "y y", "z")]
        for text in TEXTS
    ]
    expected = sum(one[0] == max(one) for one in scores) / len(TEXTS)
    results = found["results"]
    assert results["losart_choices"]["acc,none"] == pytest.approx(expected)
    assert results["losart_rolling"]["byte_perplexity,none"] > 1
    assert results["losart_answers"]["exact_match,none"] == 0
    logged = [one["filtered_resps"] for one in found["samples"]["losart_choices"]]
    for resps, one in zip(logged, scores, strict=True):
        assert [logprob for logprob, _ in resps] == pytest.approx(one, abs=1e-3)


def test_command(tiny_checkpoint, tasks, tmp_path):
    arguments = ["--model", "losart", "--model_args", f"pretrained={tiny_checkpoint},device=cpu"]
    arguments += ["--tasks", "losart_answers", "--include_path", str(tasks), "--output_path", str(tmp_path)]
    command = [sys.executable, "-m", "losart.eval.harness", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "losart_answers" in result.stdout
