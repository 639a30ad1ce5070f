"""The page in a real browser, and what a person sees of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")

# What each frame shows of each block: a letter per token, b(lank) or i(nk), and those of what it is beside.
WATCH = """() => {
  window.frames_seen = [];
  const numbers = new WeakMap(), last = new Map();
  let blocks = 0;
  const look = () => {
    for (const [answer, one] of document.querySelectorAll(".block").entries()) {
      if (!numbers.has(one.firstChild)) numbers.set(one.firstChild, blocks++);
      const tokens = [...one.querySelectorAll(".blank, .ink")];
      const shown = tokens.map((token) => [...token.classList].map((name) => name[0]).join("")).join(" ");
      const block = numbers.get(one.firstChild), before = one.parentElement.firstChild.data ?? "";
      if (last.get(block) !== shown) frames_seen.push({ answer, block, before, shown });
      last.set(block, shown);
    }
    requestAnimationFrame(look);
  };
  look();
}"""

# Texts that are seen, with the contrast of each to what is behind it.
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const parts = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const [r, g, b] = parts(colour).map((one) => one / 255)
      .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (parts(colour)[3] === 255) return colour;
    }
    return "white";
  };
  const seen = [];
  for (const one of document.querySelectorAll("body, body *")) {
    const texts = [...one.childNodes].filter((node) => node.nodeType === 3);
    const own = texts.map((node) => node.data).join("").trim();
    if (!own || one.matches(":disabled, script, noscript *") || !one.checkVisibility()) continue;
    if (one.closest(".unseen")) continue;
    const [high, low] = [getComputedStyle(one).color, behind(one)].map(light).sort((a, b) => b - a);
    seen.push([own, (high + 0.05) / (low + 0.05)]);
  }
  return seen;
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium; the test is skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("there is no Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """The page, watched; it asks for nothing from elsewhere, and its script makes no mistake."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}} | options)
    context.set_default_timeout(20_000)
    page = context.new_page()
    mistakes: list[str] = []
    page.on("pageerror", lambda error: mistakes.append(str(error)))
    page.on("console", lambda message: mistakes.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    asked: list[str] = []
    page.goto(url)
    page.evaluate(WATCH)
    yield page
    assert all(one.startswith((url, "data:")) for one in asked)
    # What a server refuses, the browser says by itself.
    assert not [one for one in mistakes if not one.startswith("Failed to load resource")]
    context.close()
