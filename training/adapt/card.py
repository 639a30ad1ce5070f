"""The model card of what is written: how it was made, what it does, where it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .family import Family


def write_card(
    directory: Path, run: Path, family: Family, base_name: str, licence: str, adapter: bool, note: str
) -> None:
    """Write README.md from a training's training.json and figures.json.

    Parameters
    ----------
    directory, run : Path
    family : Family
    base_name, licence : str
    adapter : bool
        Whether the directory holds an adapter, else a checkpoint.
    note : str
        What was done to the weights in writing them.
    """
    summary, figures = (_read(run / name) for name in ("training.json", "figures.json"))
    shifted = summary.get("plan", {}).get("noise", {}).get("shifted")
    rows = "the row before it" if shifted else "its own row"
    what = "An adapter that turns" if adapter else "A checkpoint of"
    use = 'losart.load("BASE", adapter="THIS DIRECTORY")' if adapter else 'losart.load("THIS DIRECTORY")'
    lines = [
        "---",
        f"license: {licence}",
        f"base_model: {base_name}",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {base_name.rpartition('/')[2]}, filling in blocks",
        "",
        f"{what} {base_name}{' into' if adapter else ', made'} a block-diffusion language model that decodes "
        f"as losart's family `{family.name}`: a masked token is predicted by {rows}.",
        "",
        "```python",
        "import losart",
        "",
        f"model = {use}",
        'messages = [{"role": "user", "content": "What is the sea?"}]',
        "print(model.generate(messages).text)",
        "```",
        "",
        "## How it was made",
        "",
        "By `python -m training.adapt`, which is in losart's repository, on the base's own dialogues, and on "
        "conversations with facts and questions about them:",
        "",
        *_trainings(summary),
        *([note, ""] if note else []),
        *_figures(figures),
        "## Limits",
        "",
        "The base is a small model that loops and invents, and the data are its own text: this one knows "
        "nothing more, and says some of it worse. It was trained for minutes, on English. The facts that it "
        "finds in tests are of one kind.",
        "",
        f"Licence: {licence}, as the base's.",
        "",
    ]
    (directory / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _trainings(summary: dict[str, Any]) -> list[str]:
    """An item for each training, of which every later one began with the weights of the one before."""
    plan = summary.get("plan", {})
    noise, sizes, lora = plan.get("noise", {}), plan.get("sizes", {}), plan.get("lora")
    what = "all matrices" if lora is None else f"LoRA of rank {lora['rank']} on {', '.join(lora['targets'])}"
    item = (
        f"- {what}, the norms and the mask token's vector, {summary.get('seconds', 0):.0f} s on "
        f"{summary.get('device')}: {summary.get('step')} steps of {sizes.get('clean')} tokens and "
        f"{sizes.get('noisy')} of noisy copies, AdamW at {plan.get('rate')}, seed {plan.get('seed')}, block "
        f"lengths {', '.join(map(str, plan.get('blocks', [])))}, certainty's weight {plan.get('certain')}, "
        f"decay {noise.get('decay')}, blocks masked from a token on {noise.get('suffix')}"
    )
    before = _trainings(summary["start"])[:-1] if summary.get("start") else []
    return [*before, item, ""]


def _figures(figures: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for block, of_block in figures.get("cross_entropy", {}).items():
        cells = ", ".join(f"{value:.3f} with {count}" for count, value in of_block.items())
        lines += [
            f"Cross-entropy of held-out dialogues, tokens of each block of {block} masked: {cells}.",
            "",
        ]
    recalled = figures.get("recall", [])
    if recalled:
        cells = ", ".join(f"{c['task']} {c['length']}: {c['right']} of {c['samples']}" for c in recalled)
        lines += [f"English tasks of losart's evaluation, by length of the text: {cells}.", ""]
    rows = figures.get("answers", [])
    if rows:
        names = ("perplexity", "distinct_2", "repeated_4", "tokens_a_pass", "tokens_a_pass_with_commits")
        lines += [
            "Answers to held-out questions; perplexity is the base's, and 4-grams repeat within an answer:",
            "",
            "| | perplexity | distinct 2-grams | repeated 4-grams | tokens a pass | with commits |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            cells = [f"{row[name]:.3g}" if name in row else "1" for name in names]
            lines.append(f"| {row['of']} | {' | '.join(cells)} |")
        lines.append("")
    return ["## Figures", "", *lines] if lines else []


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
