"""Take a picture of the page of `losart serve`, while a block of an answer is filled.

losart serve smollm2 --attention losa --budget 64
python docs/pictures/page.py http://localhost:8000 docs/pictures/page.png

Needs playwright and a Chromium.
"""

from __future__ import annotations

import shutil
import sys

from playwright.sync_api import sync_playwright

QUESTION = "Why is the sky blue?"
CHARACTERS = 480  # of the answer, before the picture is taken

# Stops drawing at a pass after which there are blanks before filled tokens, and tokens both active and not.
FREEZE = """(characters) => {
  const draw = Answer.prototype.draw;
  Answer.prototype.draw = function () {
    if (document.body.dataset.frozen) return;
    draw.call(this);
    const tokens = this.cells.map((cell) => cell.ink.classList);
    const blank = tokens.map((one) => one.contains("blank"));
    const active = tokens.map((one) => one.contains("active"));
    const between = blank.includes(true) && blank.lastIndexOf(false) > blank.indexOf(true);
    const blanks = blank.filter((one) => one).length, both = new Set(active).size === 2;
    if (this.text.length > characters && between && both && blanks > 2) document.body.dataset.frozen = "yes";
  };
}"""


def main(url: str, file: str) -> None:
    """Ask, wait, and write the picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 800}, reduced_motion="reduce")
        page.goto(url)
        page.evaluate(FREEZE, CHARACTERS)
        page.locator("#model:not(:empty)").wait_for()
        page.locator("#question").fill(QUESTION)
        page.keyboard.press("Enter")
        page.locator("[data-frozen]").wait_for(timeout=120_000)
        page.screenshot(path=file)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
