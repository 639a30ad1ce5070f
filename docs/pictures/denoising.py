"""Draw the passes over one block of the small checkpoint's answer as an SVG.

python examples/write_document.py --task chains-2 --tokens 4096 --seed 0 > question.txt
python docs/pictures/denoising.py question.txt > docs/pictures/denoising.svg
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from html import escape
from pathlib import Path

import losart

LAYER = 2  # whose active tokens are marked
CELL, ROW, LEFT, TOP = 47, 33, 66, 34  # pixels
WIDTH, RIGHT = LEFT + 16 * CELL + 76, LEFT + 16 * CELL + 68

# Colors that stand out on a light and on a dark page alike.
STYLE = """
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
text { fill: #7d8590; text-anchor: middle }
.label { text-anchor: start } .read { text-anchor: end }
.masked { fill: #8b949e; fill-opacity: .18 }
.fixed { fill: #1f6feb; fill-opacity: .22 } .fixed + text:not(.label) { fill: #4184e4 }
.new { fill: #1f6feb } .new + text:not(.label) { fill: #fff; font-weight: bold }
.active { fill: #e3742f }
"""


def draw(steps: list[losart.Step], word: Callable[[int], str]) -> str:
    """One row per pass: masked positions grey, fixed ones blue, those that the pass fixed bright."""
    height = TOP + len(steps) * ROW + 30
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">']
    svg += [f"<style>{STYLE}</style>", f'<text class="read" x="{RIGHT}" y="20">prefix read</text>']
    for row, step in enumerate(steps):
        y = TOP + row * ROW
        svg.append(f'<text class="label" x="0" y="{y + 18}">pass {row + 1}</text>')
        for column, token in enumerate(step.block):
            x = LEFT + column * CELL
            kind = "masked" if token is None else "new" if column in step.fixed else "fixed"
            svg.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{CELL - 4}" height="28" rx="4"/>')
            text = "" if token is None else escape(word(token))
            svg.append(f'<text x="{x + 21}" y="{y + 17}">{text}</text>')
            if column in step.layers[LAYER].active:
                svg.append(f'<circle class="active" cx="{x + 21.5}" cy="{y + 24}" r="2"/>')
        svg.append(f'<text class="read" x="{RIGHT}" y="{y + 18}">{step.density:.0%}</text>')
    legend = {"masked": "masked", "new": "fixed by this pass", "fixed": "fixed before"}
    for x, (kind, meaning) in zip((0, 90, 270), legend.items(), strict=True):
        svg.append(f'<rect class="{kind}" x="{LEFT + x}" y="{height - 18}" width="14" height="14" rx="3"/>')
        svg.append(f'<text class="label" x="{LEFT + x + 20}" y="{height - 7}">{meaning}</text>')
    svg.append(f'<circle class="active" cx="{LEFT + 411}" cy="{height - 11}" r="3"/>')
    svg.append(f'<text class="label" x="{LEFT + 420}" y="{height - 7}">active: reads the prefix anew</text>')
    return "\n".join([*svg, "</svg>\n"])


def main() -> None:
    model = losart.load(device="cpu")
    steps: list[losart.Step] = []
    options = {"remasking": "low_confidence_static", "denoising_steps": 8, "budget": 64}
    prompt = Path(sys.argv[1]).read_text("utf-8")
    model.generate(prompt, attention="losa", observer=steps.append, **options)
    print(draw(steps, lambda token: model.tokenizer.decode([token]) or "end"), end="")


if __name__ == "__main__":
    main()
