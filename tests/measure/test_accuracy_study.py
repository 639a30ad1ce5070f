"""The accuracy study: its grid, and a file that is resumed."""

import json
from dataclasses import replace

import pytest

import losart
from benchmarks.accuracy import grid as accuracy_grid
from benchmarks.accuracy import study as accuracy_study
from losart.config.model import ModelConfig
from losart.config.options import generation_config
from losart.errors import DataError

SYMBOLS = accuracy_grid.GRIDS["symbols"]


@pytest.fixture(scope="module")
def small() -> ModelConfig:
    return losart.load(device="cpu").config


@pytest.mark.parametrize("name", accuracy_grid.GRIDS)
def test_no_cell_is_measured_twice(small, name):
    """Not even one that says in other words what another says."""
    grid = accuracy_grid.GRIDS[name]
    config, cells = replace(small, block_length=grid.block), accuracy_grid.cells(grid)
    meant = [(cell.task, cell.length, generation_config(config, cell.setting)) for cell in cells]
    assert all(meant.count(cell) == 1 for cell in meant)
    assert {cell.key for cell in cells} == {
        accuracy_grid.cell_key(task, length, setting)
        for length in grid.lengths
        for group in grid.groups.values()
        for setting in group.settings
        for task in group.tasks
    }


def test_a_job_is_of_one_task_and_length_and_block_length():
    wanted = accuracy_grid.cells(SYMBOLS)
    jobs = list(accuracy_study.jobs(wanted))
    assert sorted(asked.key for job in jobs for asked in job) == sorted(asked.key for asked in wanted)
    for job in jobs:
        assert 0 < len(job) <= accuracy_study.TOGETHER
        assert len({(one.task, one.length, one.setting.get("block_length")) for one in job}) == 1


def study(file, samples=2):
    return accuracy_study.Study(file, "symbols", "cpu", 2, samples, seed=3)


def test_a_study_resumes_where_it_was_cut_short(tmp_path, capsys):
    file = tmp_path / "study.json"
    wanted = accuracy_grid.cells(SYMBOLS, ["static-2"], [256], ["keys-4"])
    study(file).run(wanted[:3])
    first = json.loads(file.read_text())
    assert (first["device"], first["samples"], first["seed"]) == ("cpu", 2, 3)
    assert [cell["attention"] for cell in first["cells"]] == ["dense", "losa", "losa"]
    capsys.readouterr()
    study(file).run(wanted[:5])
    assert "5 cells, 2 of them to measure: 4 questions" in capsys.readouterr().out
    cells = json.loads(file.read_text())["cells"]
    assert cells[:3] == first["cells"] and len(cells) == 5
    keys = {accuracy_grid.cell_key(cell["task"], cell["length"], cell["setting"]) for cell in cells}
    assert keys == {asked.key for asked in wanted[:5]}
    assert all(
        (cell["budget"], cell["active"]) == (cell["setting"].get("budget"), cell["setting"].get("active"))
        and cell["passes_per_question"] == 8
        for cell in cells
    )

    before = file.read_text()
    with pytest.raises(DataError, match="has samples 2, not 1: give another --json"):
        study(file, samples=1).run(wanted)
    assert file.read_text() == before
    file.write_text("[]")
    with pytest.raises(DataError, match=r"study\.json is no file of this study"):
        study(file).run(wanted)
    assert file.read_text() == "[]"
