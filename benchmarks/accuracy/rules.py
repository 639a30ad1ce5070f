"""Rules for LoSA's active set and rankers of pages, tried on the CPU before any of them is built.

    OMP_NUM_THREADS=1 python -m benchmarks.accuracy.rules --json FILE --jobs 2 --rules prev>0.1 stored>0.1
    python -m benchmarks.accuracy.rules --json FILE --text TEXT --samples 5 --rules stored>0.1 both8+8

The shipped checkpoint answers the study's questions by each rule and ranker; with a text, how far each leads
SmolLM2 from dense attention after pieces of it is measured. The file is rewritten after each task and kind of
remasking, or each length. docs/lab-notes/accuracy.md says what was learned.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import losart
from benchmarks.accuracy.grid import GRIDS, remaskings
from benchmarks.support.environment import command, commit
from losart.attention import POLICIES
from losart.attention.losa import LosaPolicy
from losart.backends.base import ActiveTokens, Selection
from losart.backends.cpu.attention_kernels import bound_scores
from losart.backends.cpu.convert import narrow, widen
from losart.backends.cpu.selector import PageList
from losart.cli.arguments import listed, positive
from losart.cli.eval_report import JsonReport
from losart.cli.tables import share
from losart.engine.batch import PassBatch, PassKind, SequencePass
from losart.eval import Cell, EvalConfig
from losart.eval.divergence import Divergence, measure_divergence
from losart.eval.evaluation import measure
from losart.measure.environment import environment

GRID = GRIDS["symbols"]
REMASKING = remaskings(GRID.block)


@dataclass(frozen=True)
class TokenRule:
    """Which tokens are active in a layer.

    Attributes
    ----------
    threshold : float
        Of a token's change over its stored query's square.
    follow : bool
        Change since the previous pass, not since the stored result was computed.
    heads : {"sum", "mass", "max"}
        How query heads count: all alike; by the share of their attention that lies in the prefix; the one
        that changed most, by its own square.
    layers : bool
        A token that is active in a layer is so in all later ones.
    most : int or None
        Of more tokens, those that changed most.
    """

    threshold: float
    follow: bool = False
    heads: str = "sum"
    layers: bool = False
    most: int | None = None

    def change(self, q: np.ndarray, stored: np.ndarray, mass: np.ndarray | None) -> np.ndarray:
        """Change of each token [tokens] from queries [tokens, heads, head_dim]."""
        difference, size = (np.square(x.astype(np.float64)).mean(-1) for x in (q - stored, stored))
        if self.heads == "sum":
            return difference.mean(-1) / size.mean(-1)
        ratio = difference / size
        return ratio.max(-1) if self.heads == "max" else (ratio * mass).mean(-1)


@dataclass(frozen=True)
class PageRule:
    """Which pages an active query reads.

    Attributes
    ----------
    pages : int
    candidates : int or None
        Only of so many with the highest bounds. None: of all.
    exact : bool
        By the largest exact score in a page, instead of by QUEST's bound.
    layers : int
        That read the pages which the first of them has selected for its own active tokens.
    stored : int
        Pages beside those, by their mass for the query in the block's dense first pass; some may be the same.
    """

    pages: int
    candidates: int | None = None
    exact: bool = False
    layers: int = 1
    stored: int = 0


DEFAULT, STRICT = TokenRule(0.15), TokenRule(0.05)
STORED_AND_RANKED = ((1, 3), (2, 2), (4, 4), (4, 12), (8, 8), (12, 4), (16, 0))  # pages
RULES: dict[str, tuple[TokenRule, PageRule | None]] = {
    **{f"prev>{x}": (TokenRule(x, follow=True), None) for x in (0.03, 0.1, 0.15, 0.2, 0.3)},
    **{f"stored>{x}": (TokenRule(x), None) for x in (0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3)},
    **{f"mass>{x}": (TokenRule(x, heads="mass"), None) for x in (0.01, 0.03, 0.1)},
    **{f"max>{x}": (TokenRule(x, heads="max"), None) for x in (0.2, 0.5)},
    "layers>0.1": (TokenRule(0.1, layers=True), None),
    "most8>0.1": (TokenRule(0.1, most=8), None),
    **{f"bound{n}": (DEFAULT, PageRule(n)) for n in (1, 2, 4, 8)},
    **{f"look{n}of{c}": (DEFAULT, PageRule(n, c, exact=True)) for c in (16, 64) for n in (1, 2, 4)},
    **{f"exact{n}": (DEFAULT, PageRule(n, exact=True)) for n in (1, 2, 4)},
    **{f"bound{n}of{c}layers": (DEFAULT, PageRule(n, layers=c)) for c in (2, 4) for n in (4, 8)},
    **{f"both{s}+{n}": (DEFAULT, PageRule(n, stored=s)) for s, n in STORED_AND_RANKED},
    **{f"both{s}+{n}>0.05": (STRICT, PageRule(n, stored=s)) for s, n in STORED_AND_RANKED},
}
BUILT: dict[str, dict[str, Any]] = {
    "dense": {"attention": "dense"},
    "quest": {"attention": "quest"},
    "paper": {"attention": "losa", "active": 5},
    "paper-refresh": {"attention": "losa", "active": 5, "drift": "refresh"},
    "paper-masked": {"attention": "losa", "active": 5, "candidates": "masked"},
    "paper8": {"attention": "losa", "active": 8},
}


class TriedPolicy(LosaPolicy):
    """LoSA with other rules, for one sequence on the CPU."""

    active_rule: TokenRule
    page_rule: PageRule | None
    _chosen: PageList

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._by_mass = 0 if self.page_rule is None else self.page_rule.stored
        self._mass: dict[int, np.ndarray] = {}
        self._sticky = np.zeros(self.block_length, bool)

    @property
    def commits_ride(self) -> bool:
        return False  # a pass has the rows of one block

    def attend(self, backend: Any, layer: int, q: Any, k: Any, v: Any, batch: Any) -> Any:
        found = super().attend(backend, layer, q, k, v, batch)
        if self.active_rule.heads == "mass" and batch.kind is not PassKind.COMMIT:
            scores = np.einsum("thd,shd->ths", q, np.repeat(k, self.model.group_size, axis=1))
            block = np.logaddexp.reduce(scores / np.sqrt(q.shape[2]), axis=-1)
            self._mass[layer] = 1 / (1 + np.exp(block - batch.sequences[0].slot.lse[layer]))
        return found

    def _refresh(self, backend: Any, layer: int, q: Any, batch: Any) -> Any:
        rule, (sequence,) = self.active_rule, batch.sequences
        stored = sequence.slot.queries[layer]
        change = rule.change(q, stored, self._mass.get(layer))
        active = change > rule.threshold
        if rule.layers:
            active |= self._sticky & (layer > 0)
            self._sticky = active.copy()
        if rule.most is not None:
            active &= np.argsort(np.argsort(-change, kind="stable")) < rule.most
        tokens = np.flatnonzero(active).astype(np.int32)
        if rule.follow:
            np.copyto(stored, q)
        selected = ActiveTokens([tokens], [change.astype(np.float32)])
        if self.page_rule is None:
            selector = backend.selectors[self.config.planner]
            selection = selector.select_pages(layer, q, selected, batch, self.config.pages_per_query)
        else:
            if layer % self.page_rule.layers == 0:
                self._chosen = self._pages(layer, q, tokens, sequence, self.page_rule)
            selection = Selection(selected.tokens, [self._chosen], selected.change)
        stores = not rule.follow
        return backend.refresh_prefix_attention(layer, q, selection, batch, store_queries=stores), selection

    def _pages(
        self, layer: int, q: np.ndarray, tokens: np.ndarray, sequence: SequencePass, rule: PageRule
    ) -> PageList:
        kv_heads, pages, size = self.model.num_kv_heads, sequence.pages, sequence.cache.page_size
        chosen = np.zeros((kv_heads, pages), bool)
        if len(tokens):
            table, length = sequence.cache.table, sequence.prefix_length
            bounds = bound_scores(table, layer, q, tokens, length)[:, :, :pages]
            ranks = bounds
            if rule.exact:
                rows = q[tokens].reshape(len(tokens), kv_heads, -1, q.shape[2]).swapaxes(0, 1)
                rows = rows.reshape(kv_heads, -1, q.shape[2])
                keys = model_keys()[layer][:, : pages * size]
                scores = np.einsum("krd,kpd->krp", rows, keys)
                scores[:, :, length:] = -np.inf
                ranks = scores.reshape(*bounds.shape, size).max(-1)
            if rule.candidates is not None:
                ranks = np.where(highest(bounds, rule.candidates), ranks, -np.inf)
            if rule.stored:
                stored = sequence.slot.top_pages[layer].take(tokens, axis=1)
                for of_head, ids in zip(chosen, stored, strict=True):
                    of_head[ids.ravel()] = True
            chosen |= highest(ranks, rule.pages).any(axis=1)
        counts = chosen.sum(axis=1).astype(np.int32)
        ids = np.zeros((kv_heads, max(1, counts.max())), np.int32)
        for row, of_head, count in zip(ids, chosen, counts, strict=True):
            row[:count] = np.flatnonzero(of_head)
        return PageList.of(ids, counts, sequence)


def highest(ranks: np.ndarray, count: int) -> np.ndarray:
    """Whether each page [..., pages] is among the `count` of highest rank."""
    if count >= ranks.shape[-1]:
        return np.isfinite(ranks)
    chosen = np.zeros(ranks.shape, bool)
    if not count:
        return chosen
    np.put_along_axis(chosen, np.argpartition(-ranks, count - 1, axis=-1)[..., :count], True, axis=-1)
    return chosen & np.isfinite(ranks)


# After a text: without those that need the small checkpoint's keys, or options of their own.
FOLLOWED = ["dense", "quest", *(name for name, (_, pages) in RULES.items() if not (pages and pages.exact))]


@cache
def model(checkpoint: str | None = None) -> losart.Model:
    """The checkpoint, with a method for each rule, whose backend also notes the keys that it writes."""
    for name, (active_rule, page_rule) in RULES.items():
        POLICIES[name] = type(name, (TriedPolicy,), {"active_rule": active_rule, "page_rule": page_rule})
    loaded = losart.load(checkpoint, device="cpu")
    transformer: Any = loaded._engine.runner
    backend, c = transformer.backend, loaded.config
    write = backend.write_kv
    keys = np.zeros((c.num_layers, c.num_kv_heads, c.max_positions, c.head_dim), np.float32)

    def write_kv(layer: int, k: np.ndarray, v: np.ndarray, batch: PassBatch) -> None:
        write(layer, k, v, batch)
        for sequence, rows in batch.rows():
            if not sequence.kind.denoises:
                held = widen(narrow(np.ascontiguousarray(k[rows]), backend.precision.kv))
                keys[layer, :, sequence.prefix_length :][:, : len(held)] = held.swapaxes(0, 1)

    backend.write_kv, backend.keys = write_kv, keys
    return loaded


def model_keys() -> np.ndarray:
    """The keys of the small checkpoint's cache [layers, kv_heads, positions, head_dim], as they are held."""
    transformer: Any = model()._engine.runner
    return transformer.backend.keys


def ask(
    asked: tuple[str, int, str], rules: list[str], budget: int, samples: int, seed: int
) -> tuple[str, list[Cell]]:
    """Answers to one task at one length with one kind of remasking, by each rule."""
    task, length, remasking = asked
    settings = [
        {"budget": budget} | (BUILT.get(rule) or {"attention": rule}) | REMASKING[remasking][1]
        for rule in rules
    ]
    config = EvalConfig((task,), (length,), samples=samples, seed=seed)
    return remasking, measure(model(), task, length, settings, config, "symbols")


@dataclass(frozen=True)
class RuleCell(Cell):
    """A cell with its rule and its kind of remasking."""

    rule: str
    remasking: str


def follow(
    text: Path, rules: list[str], lengths: list[int], budget: int, samples: int
) -> Iterator[Divergence]:
    """How far each rule leads SmolLM2 from dense attention after pieces of a text."""
    loaded = model(GRIDS["english"].model)
    fixed: dict[str, Any] = {
        "budgets": (budget,),
        "samples": samples,
        "options": {"max_new_tokens": 32},
    }
    for length in lengths:
        config = EvalConfig(lengths=(length,), attention=tuple(rules), **fixed)
        yield from measure_divergence(loaded, loaded, config, text=text)


def main() -> None:
    """Ask, and print and write each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--rules", nargs="+", choices=[*BUILT, *RULES], metavar="RULE", help="(all)")
    parser.add_argument("--tasks", nargs="+", default=GRID.groups["budgets"].tasks)
    parser.add_argument("--lengths", type=listed(int), default=(4096,))
    parser.add_argument("--remasking", nargs="+", choices=REMASKING, default=list(REMASKING))
    parser.add_argument("--budget", type=positive, default=64)
    parser.add_argument("--samples", type=positive, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=positive, default=1)
    parser.add_argument("--text", type=Path, metavar="FILE", help="in place of questions")
    args = parser.parse_args()
    every = [*BUILT, *RULES] if args.text is None else FOLLOWED
    args.rules = args.rules or every
    if unknown := [rule for rule in args.rules if rule not in every]:
        parser.error(f"--text is not for {', '.join(unknown)}")
    facts = {name: getattr(args, name) for name in ("budget", "samples", "seed")}
    facts |= {"text": args.text.name} if args.text else {}
    facts |= {"device": environment()["cpu"]["name"], "commit": commit(), "command": command(__file__)}
    report = JsonReport(str(args.json), facts)
    if args.text is not None:
        for row in follow(args.text, args.rules, args.lengths, args.budget, args.samples):
            report.add(row)
            density = share(row.sparse_density)
            print(
                f"{row.length} {row.attention}: {row.mean:.3f}, {row.agreement:.1%} at {density}", flush=True
            )
        return
    asks = partial(ask, rules=args.rules, budget=args.budget, samples=args.samples, seed=args.seed)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for remasking, cells in pool.map(asks, product(args.tasks, args.lengths, args.remasking)):
            for rule, cell in zip(args.rules, cells, strict=True):
                report.add(RuleCell(**vars(cell), rule=rule, remasking=remasking))
                density = share(cell.sparse_density)
                print(
                    f"{cell.length} {cell.task} {remasking} {rule}: {cell.accuracy:.1%} at {density}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
