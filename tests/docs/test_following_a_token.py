"""The files that docs/design/following-a-token.md lists are those that a prompt goes through on the CPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pages import DOCS, ROOT

import losart

MOST = 12
PACKAGE = Path(losart.__file__).parent
# Is this a number, float32 from bfloat16, whose turn it is, streams and runs: the page names them as helpers.
HELPERS = {
    "losart/config/checks.py",
    "losart/config/precision.py",
    "losart/backends/cpu/convert.py",
    "losart/engine/turns.py",
    "losart/engine/run.py",
    "losart/engine/stream.py",
}


def files_of(run) -> set[str]:
    """Source files whose functions are called."""
    called = set()
    sys.setprofile(lambda frame, event, _: called.add(frame.f_code.co_filename))
    try:
        run()
    finally:
        sys.setprofile(None)
    return {name for file in called if (name := name_of(Path(file))) is not None}


def name_of(file: Path) -> str | None:
    """A file's path from the root of the repository; None if it is not losart's."""
    for folder in (ROOT, PACKAGE.parent, PACKAGE):
        if file.is_relative_to(folder) and "site-packages" not in str(file.relative_to(folder)):
            name = file.relative_to(folder).as_posix()
            if name.startswith(("losart/loaders", "losart/kernels_cu")):
                name = name.removeprefix("losart/")
            return name if name.startswith(("losart/", "loaders/", "kernels_cu/")) else None
    return None


def test_a_prompt_goes_through_the_listed_files():
    page = (DOCS / "design" / "following-a-token.md").read_text("utf-8")
    listed = re.findall(r"^\| \d+ \| \[`([\w/.]+)`\]", page, re.MULTILINE)
    assert all(f"`{helper}`" in page for helper in HELPERS)
    model = losart.load(device="cpu")
    found = files_of(lambda: model.generate("jalu", max_new_tokens=20, stop="lamu"))
    assert found - HELPERS == set(listed) and len(listed) <= MOST
