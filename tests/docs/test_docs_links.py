"""What the pages point at exists: linked files and headings, and source files that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import DOCS, PAGES, ROOT

FOLDERS = ("losart", "loaders", "kernels_cu", "benchmarks", "tests", "docs")
README_LINES = 150  # at most
SOURCES = {file.name for folder in FOLDERS for file in (ROOT / folder).rglob("*.*")}
# Files of a checkpoint, and those that a page has its reader write.
ELSEWHERE = {
    *("config.json", "generation_config.json", "tokenizer.json", "training.json"),
    *("adapter_config.json", "losart.json"),
    *("dataset2prompt.json", "dataset2maxlen.json"),  # LongBench's
    *("losart/attention/window.py", "kernels_cu/FOLDER/NAME.cu", "benchmarks/cuda/NAME.py"),
}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@every_page
def test_named_sources_exist(page):
    """A path from the root or from losart/, or the bare name of a file anywhere in the sources."""
    for name in re.findall(r"`([\w/.-]+\.(?:pyx?|pxd|h|cuh?|md|json))`", without_code(page)):
        places = (ROOT / name, ROOT / "losart" / name, ROOT / "benchmarks" / name)
        exists = any(place.exists() for place in places) or ("/" not in name and name in SOURCES)
        assert exists or name in ELSEWHERE, name


def test_the_index_has_every_page():
    index = (DOCS / "README.md").read_text("utf-8")
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.glob("*/**/*.md")]
    assert pages and all(f"({page})" in index for page in pages)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= README_LINES
