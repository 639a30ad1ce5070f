"""`losart info`: what losart runs on here."""

from __future__ import annotations

import argparse
import json
from typing import Any

from losart.cli.tables import print_rows, size
from losart.measure.environment import environment

HELP = "show versions, processor, GPU, formats, prebuilt and cached kernels"
DESCRIPTION = """Show versions, the processor, the GPU or why there is none, the formats in which each holds
weights, keys and values, and which kernels are compiled already."""
TITLES = {"cpu": "CPU", "cuda": "GPU"}
EXAMPLE = "example: losart info --json"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    command.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Print the facts."""
    facts = environment()
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    cpu, gpu, cache = facts["cpu"], facts["gpu"], facts["kernel_cache"]
    problem = facts["cuda_problem"]
    rows = [
        ("losart", facts["losart"]),
        ("Python", f"{facts['python']} on {facts['system']}"),
        ("CPU", f"{cpu['name']}, {cpu['threads']} thread{'s' * (cpu['threads'] != 1)}, {cpu['vectors']}"),
        ("GPU", _gpu(gpu) if gpu else "none"),
        *([("", f"not used: {problem}")] if problem else []),
        ("CuPy", facts["cupy"] or "none"),
        ("NVRTC", facts["nvrtc"] or "none"),
        *((f"{TITLES[device]} holds", _formats(of)) for device, of in facts["formats"].items()),
        ("prebuilt kernels", _prebuilt(facts["prebuilt_kernels"])),
        ("kernel cache", _cache(cache) if cache else "none: there is no home directory"),
    ]
    print_rows(rows)


def _formats(formats: dict[str, list[str]]) -> str:
    return f"weights in {', '.join(formats['weights'])}; keys and values in {', '.join(formats['kv'])}"


def _gpu(gpu: dict[str, Any]) -> str:
    driver = f"driver {gpu['driver']}" if gpu["driver"] else "driver"
    return (
        f"{gpu['name']}, {size(gpu['memory_bytes'])}, compute capability {gpu['capability']}, "
        f"{driver} for CUDA {gpu['driver_cuda']}"
    )


def _prebuilt(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} for {architecture}" for architecture, count in counts.items()) or "none"


def _cache(cache: dict[str, Any]) -> str:
    return f"{cache['folder']}: {cache['files']} files, {size(cache['bytes'])}"
