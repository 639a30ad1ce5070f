"""All figures of the CUDA backend, beside torch and transformers where they are installed.

    python -m benchmarks.cuda.bench --json FILE --table FILE

"Floor" is the bytes that must be read over the copy bandwidth measured in the same run (bytes read
plus bytes written). Random weights of SDAR's sizes, bfloat16, batch 1; keys and values are noise:
dense attention's time does not depend on them. A measurement that fails says why in its place, and
files are rewritten after every row, so that a run that is cut short leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cuda import (
    batches,
    dense_pass,
    end_to_end,
    experts,
    families,
    first_token,
    later_pass,
    matmuls,
    planner,
    prefill,
    prefix,
    quantized,
    riding,
    sparse,
)
from benchmarks.cuda.bandwidth import copy_bandwidth
from benchmarks.support.attempts import attempt, reason
from benchmarks.support.environment import command, commit, versions
from benchmarks.support.markdown_table import markdown_table
from losart.measure.environment import environment


@dataclass(frozen=True)
class Section:
    """A table: its title, what its columns mean, and (bandwidth, quick, checkpoint) to its rows."""

    title: str
    note: str
    rows: Callable[[float, bool, Path | None], Iterator[dict[str, Any]]]


SECTIONS = {
    "prefix": Section(
        "Dense prefix attention, microseconds",
        "SDAR-8B's heads, one layer, keys and values in bfloat16 (auto) and int8; losart with the merge of "
        "its parts; torch's flash attention with the query heads of a kv head as rows. Medians of graph "
        "replays, keys and values not in the L2 cache.",
        lambda bandwidth, quick, _: prefix.rows(bandwidth, quick),
    ),
    "sparse": Section(
        "Prefix attention of later passes, microseconds",
        "SDAR-8B's heads, block 16, one layer; sparse methods with all that they do: change of queries, "
        "ranking and selection of pages, attention over them, merge. losa 5 and 8: active tokens; anchor: "
        "losa with the selector anchor. read: the share of the prefix that is read, beside bounds. Keys and "
        "queries with topics (`topics.py`); medians of graph replays, nothing in the L2 cache.",
        lambda _, quick, __: sparse.rows(quick),
    ),
    "active": Section(
        "Prefix attention of later passes by the number of active tokens, microseconds",
        "As above, LoSA by its defaults with a budget of 128: tokens whose queries have changed are active.",
        lambda _, quick, __: sparse.active_rows(quick),
    ),
    "pass": Section(
        "Whole denoising pass, milliseconds",
        "Block 16, host included; losart with sampling, transformers eager and without: a Qwen3 of the same "
        "sizes, SDPA with neither mask nor is_causal, on a DynamicCache.",
        lambda bandwidth, quick, _: dense_pass.rows(bandwidth, quick),
    ),
    "later-pass": Section(
        "Whole later pass against its floor, milliseconds",
        "Block 16, host and sampling included, budget 512, active 5; anchor: the selector. Keys answer the "
        "queries of random weights (`planted.py`). density: the share of the prefix that is read. "
        "Floor: weights, keys and values at that density, and what pages are selected by: bounds of all of "
        "them, or pages kept from the first pass.",
        lambda bandwidth, quick, _: later_pass.rows(bandwidth, quick),
    ),
    "experts": Section(
        "Mixtures of experts: whole denoising pass, milliseconds",
        "Dense attention, host and sampling included; ids and weights are noise, so that routing is nearly "
        "random. used: experts that a layer's tokens go to, of so many. Floor: their weights and all others, "
        "keys and values over the copy bandwidth. transformers: its Qwen3-MoE, without sampling, SDPA with "
        "neither mask nor is_causal, its default way through the experts.",
        lambda bandwidth, quick, _: experts.pass_rows(bandwidth, quick),
    ),
    "experts-layer": Section(
        "Mixtures of experts: the experts of one layer, microseconds",
        "From random router logits to each token's sum; int4 in groups of 64, int8 with a scale per row. "
        "used: experts that tokens go to, shared ones aside. Floor: codes and scales of these and of shared "
        "ones over the copy bandwidth. Medians of graph replays, weights not in the L2 cache.",
        lambda bandwidth, quick, _: experts.layer_rows(bandwidth, quick),
    ),
    "families": Section(
        "Dense families: whole denoising pass, milliseconds",
        "Block 16, dense attention, host and sampling included; keys and values are noise. Floor: bytes of "
        "weights, keys and values over the copy bandwidth plus the matmuls' operations over cuBLAS's rate of "
        "8,192 rows; by SDAR's: losart/floor over that of SDAR-8B.",
        lambda bandwidth, quick, _: families.rows(bandwidth, quick),
    ),
    "experts-prefill": Section(
        "Mixtures of experts: prefill",
        "A prompt in pieces, nothing before it. active: parameters that a token is multiplied by, head and "
        "embedding aside; rate: tokens a second times twice those, in TFLOP/s.",
        lambda _, quick, __: experts.prefill_rows(quick),
    ),
    "experts-used": Section(
        "Experts that a layer uses in a pass",
        "By block length and sequences, as above after a short prefix; random: if each token went to any.",
        lambda _, quick, __: experts.used_rows(quick),
    ),
    "planner": Section(
        "Selection in kernels and on the host: whole later pass, milliseconds",
        "LoSA, block 16, budget 512, active 5; keys planted (`planted.py`). With the host's the pass is "
        "launched kernel by kernel, and each layer waits for a transfer each way: launches is what a layer "
        "takes more without a graph, transfers what it takes more on the host than that, selection "
        'included. auto: what planner="auto" takes.',
        lambda _, quick, __: planner.rows(quick),
    ),
    "end-to-end": Section(
        "A generation after a long prompt",
        "256 new tokens in blocks of 16 (64 where the prompt has 16K), 16 denoising steps, "
        "low_confidence_static; budget 128. losa 5: five active tokens, as in the paper; losa: by its "
        "default; losa as trained: with the threshold above which as many tokens change as with the shipped "
        "checkpoint, which are fewer than with random weights. Prefill apart; dense first passes and commits "
        "included. Of each kind of pass, and of commits with the next first pass, the number, the mean and "
        "the sum of its times. active: tokens per layer of sparse passes. With random weights queries are "
        "not concentrated: density, the share of the prefix that sparse passes read, is above that of "
        "trained models.",
        lambda _, quick, __: end_to_end.rows(quick),
    ),
    "batches": Section(
        "Many sequences at once",
        "256 new tokens of each in blocks, low_confidence_static, budget 128; the prompts' keys and values "
        "are noise, prefill apart. A mean pass over blocks: milliseconds, what the host takes between "
        "passes, rows, the share of the prefixes that is read, and its floor: bytes of weights, keys and "
        "values over the copy bandwidth plus the products' operations over cuBLAS's rate for 8,192 rows. "
        "With weights in fp8 activations of more than 64 rows are rounded to fp8, too; no floor is measured.",
        lambda bandwidth, quick, _: batches.rows(bandwidth, quick),
    ),
    "riding": Section(
        "Commits that ride with the next first pass, milliseconds per denoising pass",
        "256 new tokens in blocks of 16, four passes per block, low_confidence_static; commits included, "
        "with a pass for each and with one for both; losa by its defaults with a budget of 128. Medians of 4 "
        "rounds in which both took turns; least and most: ratios of single rounds.",
        lambda _, quick, __: riding.rows(quick),
    ),
    "matmuls": Section(
        "Matmuls of a pass, microseconds",
        "Block 16; medians of graph replays, weights not in the L2 cache.",
        lambda bandwidth, quick, _: matmuls.rows(bandwidth, quick),
    ),
    "prefill-matmuls": Section(
        "Matmuls of prefill, TFLOP/s",
        "Pieces of a prompt; medians of queued launches, weights not in the L2 cache. cuBLAS, where it is "
        "installed: gemmEx with float32 sums and results.",
        lambda _, quick, __: matmuls.prefill_rows(quick),
    ),
    "quantized-matmuls": Section(
        "Matmuls by quantized weights, microseconds",
        "SDAR-8B's matrices; int4 in groups of 64 columns, int8 and fp8 with a scale per row, scales of 16 "
        "bits; medians of graph replays, weights not in the L2 cache. torch: `_weight_int4pack_mm`.",
        lambda bandwidth, quick, _: quantized.matmul_rows(bandwidth, quick),
    ),
    "float8-matmuls": Section(
        "Matmuls of many tokens by fp8 weights, microseconds",
        "SDAR-8B's matrices in pieces of a prompt, gate and up with silu(gate) * up; bfloat16 weights, fp8 "
        "ones that are widened to bfloat16, and both operands in fp8, activations rounded with a scale per "
        "token: of it rounding, whose floor is 3 bytes a number. error: the norm of what that changes over "
        "that of the sums, of noise. Medians of queued launches, weights not in the L2 cache.",
        lambda bandwidth, quick, _: quantized.float8_rows(bandwidth, quick),
    ),
    "quantized": Section(
        "Passes with quantized weights",
        "8B, block 16, dense attention, host and sampling included, the head int8 where weights are not "
        "bfloat16; one sequence: 2,048 tokens prefilled, and 512 decoded after them in four passes a block. "
        "weights GB: what a pass reads of them.",
        lambda bandwidth, quick, _: quantized.pass_rows(bandwidth, quick),
    ),
    "prefill": Section(
        "Prefill attention, TFLOP/s",
        "SDAR-8B's heads, one layer; losart block-causal (block 16) in the pieces of a prompt, torch causal "
        "over the whole prompt; each by the query-key pairs that it must see.",
        lambda _, quick, __: prefill.rows(quick),
    ),
    "first-token": Section(
        "New process to first token, seconds",
        "1.7B, 512 prompt tokens, files in the page cache; stages of the median run; the host's peak memory "
        "up to the end of loading, and of it what is not pages of files.",
        lambda _, quick, checkpoint: first_token.rows(quick, checkpoint),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write them as Markdown here")
    parser.add_argument("--quick", action="store_true", help="fewer lengths, sizes and runs")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="NAME")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="keep first-token's checkpoint here")
    args = parser.parse_args()
    bandwidth = attempt(copy_bandwidth)
    if isinstance(bandwidth, str):
        sys.exit(f"no CUDA device can be measured here: {bandwidth}")
    figures: dict[str, Any] = {
        "device": environment()["gpu"]["name"],
        "commit": commit(),
        "command": command(__file__),
        "versions": versions("losart", "cupy-cuda12x", "cupy-cuda13x", "torch", "transformers"),
        "copy bytes per second": bandwidth,
    }
    print({key: value for key, value in figures.items() if key != "command"}, flush=True)
    for name in args.only:
        began = time.perf_counter()
        rows = figures[SECTIONS[name].title] = []
        for row in guarded(SECTIONS[name].rows(bandwidth, args.quick, args.checkpoint)):
            rows.append(row)
            print(name, {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            write(figures, args.json, args.table)
        print(f"{name} took {time.perf_counter() - began:.0f} s", flush=True)
    print(f"\n{markdown(figures)}")


def guarded(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows, up to an error that no row handled."""
    try:
        yield from rows
    except Exception as error:
        yield {"failed": reason(error)}


def write(figures: dict[str, Any], json_file: Path | None, table_file: Path | None) -> None:
    """Write the figures so far."""
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
    if table_file:
        table_file.write_text(markdown(figures))


def markdown(figures: dict[str, Any]) -> str:
    """All tables."""
    speed = figures["copy bytes per second"] / 1e12
    installed = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    parts = [
        f"{figures['device']}, copy bandwidth {speed:.2f} TB/s, commit {figures['commit']}, {installed}\n"
    ]
    for section in SECTIONS.values():
        if rows := figures.get(section.title):
            parts.append(f"## {section.title}\n\n{section.note}\n\n{markdown_table(rows)}")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
