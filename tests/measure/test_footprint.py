"""`losart footprint`: processes that report, clean environments, and the table."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import losart
from losart.cli import main
from losart.errors import LosartError
from losart.loaders import open_checkpoint
from losart.measure.footprint.comparison import generation_of
from losart.measure.footprint.processes import Interpreter, Request, for_transformers, probe, run
from losart.measure.footprint.sides import Side
from losart.measure.footprint.table import markdown

BLOCK, NEW = 4, 10
PYTHON = Interpreter(Path(sys.executable))


def request_of(checkpoint: Path, prompt_tokens: int) -> Request:
    keys = json.loads((checkpoint / "config.json").read_text())
    return Request("cpu", prompt_tokens, NEW, BLOCK, keys["mask_token_id"])


@pytest.mark.parametrize("prompt_tokens", [3, 18])
def test_probe_reports_the_generation_and_what_it_took(tiny_checkpoint, prompt_tokens):
    report = probe(PYTHON, "probe_losart", tiny_checkpoint, request_of(tiny_checkpoint, prompt_tokens))
    prompt = [(97 * i) % 251 for i in range(prompt_tokens)]
    expected = losart.generate(tiny_checkpoint, prompt, max_new_tokens=NEW, stop_token_ids=[], device="cpu")
    assert report["tokens"] == expected.token_ids
    assert report["weights"] == losart.load(tiny_checkpoint, "cpu").matrix_bytes
    assert report["kv"] == {"float32": expected.stats.kv_bytes}
    stages = ["python", "import", "context", "load", "first token", "generate"]
    assert list(report["seconds"]) == stages
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    memory = [report["bytes"][stage] for stage in stages]
    assert all(m["VmRSS"] <= m["VmHWM"] and 0 < m["RssAnon"] < m["VmRSS"] for m in memory)
    assert memory[0]["VmRSS"] < memory[1]["VmRSS"]  # the import takes memory


@pytest.mark.parity
@pytest.mark.parametrize("prompt_tokens", [3, 18])
def test_both_sides_generate_the_same(tiny_checkpoint, tmp_path, prompt_tokens):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    request = request_of(tiny_checkpoint, prompt_tokens)
    ours = probe(PYTHON, "probe_losart", tiny_checkpoint, request)
    qwen3 = for_transformers(tiny_checkpoint, tmp_path / "qwen3")
    theirs = probe(PYTHON, "probe_transformers", qwen3, request)
    assert ours["tokens"] == theirs["tokens"]
    assert ours["weights"] == theirs["weights"]
    assert theirs["kv"].keys() == {"float32"} and 0 < theirs["kv"]["float32"] <= ours["kv"]["float32"]


@pytest.mark.parity
@pytest.mark.parametrize("prompt_tokens", [5, 16, 18])
def test_both_sides_generate_the_same_with_rows_that_predict_the_next_token(make_checkpoint, prompt_tokens):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    path = make_checkpoint(family="stable_diffcoder", tied=True)
    keys = json.loads((path / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (path / "config.json").write_text(json.dumps(keys))
    conversion = {"family": "Fast_dLLM_Qwen", "block_length": 8, "mask_token_id": 315}
    (path / "losart.json").write_text(json.dumps(conversion | {"options": {"confidence_threshold": 0.1}}))
    request = generation_of(open_checkpoint(path), "cpu", prompt_tokens, NEW).request
    assert (request.shifted, request.confidence_threshold) == (True, 0.1)
    folder = path.parent / "unused"
    ours, theirs = (
        probe(PYTHON, name, for_transformers(path, folder), request)
        for name in ("probe_losart", "probe_transformers")
    )
    assert ours["tokens"] == theirs["tokens"] and ours["weights"] == theirs["weights"]


def test_a_process_that_fails_says_why():
    with pytest.raises(LosartError, match="side: ValueError: no luck"):
        run([sys.executable, "-c", "raise ValueError('no luck')"], {}, "side")


def test_an_interrupt_ends_what_a_process_has_started(tmp_path):
    # The grandchild holds its end of the pipe open: reading to its end waits until it is gone.
    code = """
        import signal, sys
        from losart.measure.footprint.processes import run
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        sleep = "[sys.executable, '-c', 'import time; time.sleep(600)']"
        child = f"import subprocess, sys; subprocess.run({sleep})"
        signal.alarm(1)
        try:
            run([sys.executable, "-c", child], {}, "side")
        except KeyboardInterrupt:
            print("interrupted")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == "interrupted\n", result.stderr


def side(scale: float) -> dict:
    return {
        "installed_bytes": scale * 100 * 2**20,
        "package_count": 3,
        "import_seconds": scale * 0.1,
        "imported_bytes": scale * 2**20,
        "weights": {"bfloat16": scale * 2**20, "int4": scale * 2**21},
        "generated_bytes": scale * 2**20,
        "first_token_seconds": scale,
        "torch_cuda": None,
    }


def made_figures(scale: float, **changes: object) -> dict:
    facts = {
        "cpu": "A CPU",
        "threads": 2,
        "gpu": None,
        "device": "cpu",
        "checkpoint": "tiny",
        "dtype_on_disk": ["bfloat16", "int4"],
        "bytes_on_disk": 2**20,
        "prompt_tokens": 8,
        "new_tokens": 4,
        "versions": {"losart": "1", "torch": "2", "transformers": "3"},
    }
    return facts | {"losart": side(1), "transformers": side(scale) | changes}


def test_the_table_says_what_is_met_and_what_is_missed():
    table = markdown(made_figures(8))
    assert "A CPU, 2 threads; tiny in bfloat16, int4 (1 MiB), 8 prompt and 4 new tokens; " in table
    assert "; losart 1, torch 2 (CPU build)" in table
    assert "| installed | 100 MiB | 800 MiB | 8.0x | 6x, met |" in table
    assert "| import | 0.10 s | 0.80 s | 8.0x | 10x, missed |" in table
    assert (
        "| weights | 1 MiB in bfloat16, 2 MiB in int4 | 8 MiB in bfloat16, 16 MiB in int4 | 8.0x |  |"
        in table
    )
    assert "| process start to first token | 1.00 s | 8.00 s | 8.0x |  |" in table
    assert "device memory" not in table
    assert table.endswith("\nTargets missed: import.\n")
    assert "missed" not in markdown(made_figures(10))


def test_cuda_has_targets_of_its_own():
    figures = made_figures(8, torch_cuda="12.8") | {"device": "cuda", "gpu": "A GPU"}
    figures["losart"]["device_bytes"] = 2**20
    figures["transformers"]["device_bytes"] = 2**22
    table = markdown(figures)
    assert "A CPU, 2 threads, A GPU; " in table
    assert "| installed | 100 MiB | 800 MiB | 8.0x | 10x, missed |" in table
    assert "| import | 0.10 s | 0.80 s | 8.0x |  |" in table
    assert "| device memory beyond weights and KV | 1 MiB | 4 MiB | 4.0x | 4x, met |" in table
    assert table.endswith("\nTargets missed: installed.\n")


def test_the_size_of_a_cuda_build_is_no_rival_of_a_cpu():
    table = markdown(made_figures(10, torch_cuda="12.8"))
    assert "torch 2 (CUDA 12.8 build)" in table
    assert "| installed | 100 MiB | 1,000 MiB | 10.0x |  |" in table
    assert "torch's CPU build was not found" in table


@pytest.fixture
def without_rival(monkeypatch):
    """The rival's processes are losart's too, and say that they are torch's."""
    from losart.cli import footprint
    from losart.measure.footprint import comparison

    rival = {"torch": "2.13.0+cpu", "transformers": "5.0"}
    sides = {
        name: Side(PYTHON, {"installed_bytes": 2**20, "packages": packages, "torch_cuda": None})
        for name, packages in (("losart", {"losart": losart.__version__}), ("transformers", rival))
    }
    monkeypatch.setattr(footprint, "installed_sides", lambda device, python: sides)
    monkeypatch.setattr(comparison, "PROBES", dict.fromkeys(sides, "probe_losart"))
    monkeypatch.setattr(comparison, "for_transformers", lambda checkpoint, folder: checkpoint)


def test_the_command_prints_table_and_json(without_rival, tmp_path, capsys):
    files = {"--json": tmp_path / "f.json", "--table": tmp_path / "f.md"}
    arguments = "--installed --size tiny --repeats 2 --prompt-tokens 9 --new-tokens 5"
    assert main(["footprint", *arguments.split(), *(str(x) for pair in files.items() for x in pair)]) == 0
    printed = capsys.readouterr()
    assert printed.out == files["--table"].read_text() == markdown(json.loads(files["--json"].read_text()))
    figures = json.loads(files["--json"].read_text())
    assert len(figures["losart"]["runs"]) == 2 and len(figures["losart"]["tokens"]) == 5
    assert figures["losart"]["tokens"] == figures["transformers"]["tokens"]
    assert figures["losart"]["weights"].keys() == figures["losart"]["kv"].keys() == {"float32"}
    assert "| import |" in printed.out and "| packages | 1 | 2 | 2.0x |" in printed.out
    lines = printed.err.splitlines()
    assert [line.split(": ")[1].split(",")[0] for line in lines] == [f"{i} of 6 steps" for i in range(6)]
    assert lines[-1].startswith("running transformers, 2 of 2: 5 of 6 steps, ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no/such/directory"], 1, "no/such/directory"),
        (["CHECKPOINT", "--prompt-tokens", "5000"], 2, "4096 positions"),
        (["CHECKPOINT", "--keep", "CHECKPOINT"], 1, "exists"),
        (["CHECKPOINT", "--sizes-only"], 2, "runs no MODEL"),
        (["--losart", "x"], 2, "installs nothing"),
        (["--rival", "x"], 2, "installs nothing"),
        (["--rival-python", "no/such/python", "--size", "tiny"], 1, "no/such/python"),
    ],
)
def test_mistakes_give_one_line_and_a_code(tiny_checkpoint, capsys, arguments, code, message):
    arguments = [str(tiny_checkpoint) if argument == "CHECKPOINT" else argument for argument in arguments]
    assert main(["footprint", "--installed", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error and error.startswith("losart: ") and error.count("\n") == 1


@pytest.mark.parametrize("option", ["--repeats", "--new-tokens"])
@pytest.mark.parametrize("value", ["0", "-1", "some"])
def test_counts_are_whole_numbers_from_1(capsys, option, value):
    with pytest.raises(SystemExit) as exit_:
        main(["footprint", f"{option}={value}"])
    assert exit_.value.code == 2
    assert "must be a whole number from 1" in capsys.readouterr().err


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    code = """
        import signal, sys
        from losart.cli import main
        from losart.measure.footprint import sides

        def interrupted(folder):
            folder.mkdir()
            signal.raise_signal(signal.SIGINT)

        sides.Environment = interrupted
        sys.exit(main(["footprint", "--size", "tiny", "--losart", "x"]))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 130
    assert result.stderr.endswith("losart: interrupted\n")
    assert list(tmp_path.iterdir()) == []
