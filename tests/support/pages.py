"""The repository's Markdown pages, and the code blocks in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CARD = ROOT / "losart" / "small_checkpoint" / "README.md"
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", CARD, *sorted(DOCS.glob("**/*.md")))


def run_block(page: str, number: int, namespace: dict[str, Any]) -> None:
    """Run one of the page's Python blocks; errors name the page and the line in it."""
    file = ROOT / page
    text = file.read_text("utf-8")
    match = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))[number]
    lines_before = text.count("\n", 0, match.start(1))
    exec(compile("\n" * lines_before + match[1], str(file), "exec"), namespace)
