"""The accuracy study's tables and pictures."""

import json
import sys

import pytest

from benchmarks.accuracy import report as accuracy_report
from benchmarks.accuracy.grid import DENSE, QUEST, SPARSED, label, paper, static

PAPER, TWO = paper(16), static(2, 16)


def cell(setting, task, accuracy, sparse):
    figures = {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1}
    density = {"sparse_density": sparse, "density": 0.5}
    names = {"task": task, "length": 8192, "commit": "abc", "setting": setting}
    return names | figures | density | {name: setting.get(name) for name in ("attention", "budget")}


@pytest.fixture
def study(tmp_path):
    cells = [
        cell(DENSE, "values", 0.9, None),
        cell(PAPER | {"budget": 256}, "values", 0.5, 0.02),
        cell(PAPER | {"budget": 256}, "keys-4", 0.25, 0.04),
        cell(QUEST | TWO | {"budget": 64}, "values", 0.125, 0.05),
    ]
    facts = {"samples": 400, "device_name": "a card", "dtype": "bfloat16", "command": "python x"}
    file = tmp_path / "study.json"
    file.write_text(json.dumps(facts | {"cells": cells}))
    return file


def report(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["accuracy_report.py", *map(str, arguments)])
    return accuracy_report.main()


def test_tables_say_what_was_measured_and_leave_open_what_was_not(study):
    text = accuracy_report.markdown(json.loads(study.read_text()))
    assert "a card, bfloat16, commit abc: `python x`" in text
    budgets, static = (
        next(part for part in text.split("## ") if part.startswith(title)) for title in ("Budgets,", "Static")
    )
    lines = [line for line in budgets.splitlines() if line.startswith("|")]
    assert lines[0] == "| setting | `keys-4` | `chain-2` | `values` | `chains-2` | sparse | density |"
    assert lines[2:] == [
        "| dense |  |  | 90.0 (80.0 - 100.0) |  | - | 50.0% |",
        "| losa, active 5, budget 256 | 25.0 (15.0 - 35.0) |  | 50.0 (40.0 - 60.0) |  | 3.0% | 50.0% |",
    ]
    assert "| quest, static, 2 a pass, budget 64 |" in static
    assert label(SPARSED, 16) not in text


def test_pictures_stand_beside_the_figures(study, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    kinds = {"unmasked": 0.5, "neighbours": 0.3, "others": 0.2}
    layers = [
        {"layer": layer, "top": {"1": 0.4, "3": 0.7, "5": 0.9, "8": 1.0}, "change": kinds}
        for layer in (0, 1, None)
    ]
    locality = tmp_path / "changes.json"
    facts = {"model": "some", "samples": 8, "dtype": "bfloat16", "options": {}, "text": "some.txt"}
    locality.write_text(json.dumps(facts | {"layers": layers}))
    assert report(monkeypatch, study, "--locality", locality) == 0
    for picture in ("study_8192.png", "changes.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "(study_8192.png)" in (tmp_path / "study.md").read_text()
    table = (tmp_path / "changes.md").read_text()
    assert (
        "losart eval some --locality`, 8 pieces of some.txt per length" in table and "(changes.png)" in table
    )
    assert "| all | 40.0% | 70.0% | 90.0% | 100.0% | 50.0% |" in table


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    assert report(monkeypatch, tmp_path / "none.json") == 1
    (tmp_path / "other.json").write_text("[1]")
    assert report(monkeypatch, tmp_path / "other.json") == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "none.json" in errors[0] and errors[1].endswith("other.json has no cells")
