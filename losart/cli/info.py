"""`losart info`: what losart runs on here."""

from __future__ import annotations

import argparse
import json
from typing import Any

from losart.cli.tables import print_rows, size
from losart.measure.environment import environment

HELP = "show versions, processor, GPU, prebuilt and cached kernels"
DESCRIPTION = """Show versions, the processor, the GPU or why there is none, and which kernels are compiled
already."""
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
        ("prebuilt kernels", _prebuilt(facts["prebuilt_kernels"])),
        ("kernel cache", _cache(cache) if cache else "none: there is no home directory"),
    ]
    print_rows(rows)


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
