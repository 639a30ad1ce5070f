"""Time from starting a process to the first token of a checkpoint: losart and transformers.

    python -m benchmarks.cuda.first_token --size 0.6B --device cpu

A prompt of 512 ids, random bfloat16 weights, files that the system has in memory. losart is measured
with kernels that an earlier run has compiled, and with an empty kernel cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.support.attempts import attempt, ratio
from losart.measure.footprint.processes import Interpreter, Request, for_transformers, probe
from losart.measure.random_checkpoint import SIZES, write_size

LOSART, TRANSFORMERS = "probe_losart", "probe_transformers"
PROMPT_TOKENS = 512


def rows(
    quick: bool = False, checkpoint: Path | None = None, size: str = "1.7B", device: str = "cuda"
) -> Iterator[dict[str, Any]]:
    """One row a runtime, in seconds: the fastest and the median run, and the stages of the latter.

    Parameters
    ----------
    quick : bool
        One run of each, not three.
    checkpoint : path, optional
        Where the checkpoint is, or is to be kept. Default: it is not kept.
    size : str
        Of `random_checkpoint.SIZES`.
    device : {"cuda", "cpu"}
    """
    with tempfile.TemporaryDirectory() as name:
        folder, runs = Path(name), 1 if quick else 3
        checkpoint = written(checkpoint or folder / "checkpoint", size)

        warm = kernel_cache(folder / "kernels")
        attempt(first_token, LOSART, checkpoint, device, warm)  # compiles the kernels
        ours = attempt(repeated, LOSART, checkpoint, device, [warm] * runs)
        memory = attempt(first_token, LOSART, checkpoint, device, warm, True)
        yield row("losart", ours, memory, ours)

        empty = [kernel_cache(folder / f"kernels{i}") for i in range(runs)]
        compiling = attempt(repeated, LOSART, checkpoint, device, empty)
        yield row("losart, empty kernel cache", compiling, None, ours)

        qwen3 = for_transformers(checkpoint, folder / "qwen3")
        memory = attempt(first_token, TRANSFORMERS, qwen3, device, {}, True)
        failed = isinstance(memory, str)
        theirs = memory if failed else attempt(repeated, TRANSFORMERS, qwen3, device, [{}] * runs)
        yield row("transformers", theirs, memory, ours)


def written(checkpoint: Path, size: str) -> Path:
    """The checkpoint, made if it is not there."""
    if not (checkpoint / "config.json").exists():
        began = time.perf_counter()
        part = checkpoint.with_name(checkpoint.name + ".part")
        write_size(part, size, dtype="bfloat16")
        part.rename(checkpoint)
        print(f"wrote {size} in {time.perf_counter() - began:.1f} s", flush=True)
    return checkpoint


def kernel_cache(folder: Path) -> dict[str, str]:
    """Environment variables that keep compiled kernels in a folder."""
    return {"LOSART_CACHE_DIR": str(folder / "losart"), "CUPY_CACHE_DIR": str(folder / "cupy")}


def repeated(
    script: str, checkpoint: Path, device: str, environments: list[dict[str, str]]
) -> list[dict[str, Any]]:
    """What runs report, the fastest first."""
    runs = [first_token(script, checkpoint, device, environment) for environment in environments]
    return sorted(runs, key=lambda run: run["seconds"])


def first_token(
    name: str, checkpoint: Path, device: str, environment: dict[str, str], watch: bool = False
) -> dict[str, Any]:
    """What one process reports, see `probe`, and the seconds to its first token."""
    keys = json.loads((checkpoint / "config.json").read_text())
    request = Request(device, PROMPT_TOKENS, 1, keys["block_size"], keys["mask_token_id"])
    python = Interpreter(Path(sys.executable), isolated=False)
    report = probe(python, name, checkpoint, request, environment, watch)
    report["stages"] = {stage: s for stage, s in report["seconds"].items() if stage != "generate"}
    report["seconds"] = sum(report["stages"].values())
    print(name, {"seconds": report["seconds"]} | report["stages"], flush=True)
    return report


def row(name: str, runs: Any, memory: Any, ours: Any) -> dict[str, Any]:
    """A row of what runs, the fastest first, and one more whose memory was sampled have reported."""
    if isinstance(runs, str):
        return {"runtime": name, "best": runs}
    median = runs[len(runs) // 2]
    baseline = None if isinstance(ours, str) else ours[len(ours) // 2]["seconds"]
    figures = {"runtime": name, "best": runs[0]["seconds"], "median": median["seconds"], **median["stages"]}
    figures["median/losart"] = ratio(median["seconds"], baseline)
    if isinstance(memory, dict):
        before, loaded = (memory["bytes"][stage] for stage in ("context", "load"))
        figures["peak MiB"] = loaded["VmHWM"] / 2**20
        figures["peak MiB without files"] = loaded["peak RssAnon"] / 2**20
        figures["before loading"] = before["peak RssAnon"] / 2**20
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="where it is, or is to be kept")
    parser.add_argument("--size", choices=SIZES, default="1.7B")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="one run of each")
    args = parser.parse_args()
    for figures in rows(args.quick, args.checkpoint, args.size, args.device):
        print(json.dumps(figures, indent=2), flush=True)


if __name__ == "__main__":
    main()
