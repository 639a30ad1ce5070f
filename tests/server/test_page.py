"""The page in a browser: a block that fills, stopping, errors, keys, phones, dark screens, two settings."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")
pytest.importorskip("playwright")

import httpx
from browser import CONTRASTS, chromium, opened
from playwright.sync_api import Browser, Page, expect
from served import Served, eventually, served

import losart

OPTIONS = {"max_new_tokens": 24, "block_length": 8, "stop_token_ids": []}
PASS = 0.04  # seconds, which a person, and a browser's frames, can follow
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}

expect.set_options(timeout=20_000)


class SlowEngine(losart.Engine):
    """Whose passes take a while."""

    def step(self) -> bool:
        time.sleep(PASS)
        return super().step()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def slow_server(model) -> Iterator[Served]:
    with served(model, SlowEngine(model), options=OPTIONS) as one:
        yield one


@pytest.fixture(scope="module")
def long_server(model) -> Iterator[Served]:
    """Whose answers are long enough to be stopped."""
    options = OPTIONS | {"max_new_tokens": 2000}
    with served(model, SlowEngine(model), options=options) as one:
        yield one


@pytest.fixture
def page(browser, slow_server) -> Iterator[Page]:
    with opened(browser, slow_server.url) as one:
        expect(one.locator("#model")).to_have_text("tiny")
        yield one


@pytest.fixture
def long_page(browser, long_server) -> Iterator[Page]:
    with opened(browser, long_server.url) as one:
        expect(one.locator("#model")).to_have_text("tiny")
        yield one


def ask(page: Page, question: str = "Why is the sky blue?") -> None:
    page.locator("#question").fill(question)
    page.keyboard.press("Enter")


def wait_for_end(page: Page) -> None:
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator(".answer[aria-busy=true]")).to_have_count(0)


def begin_block(page: Page) -> None:
    """Wait until a block is half full."""
    expect(page.locator(".block .ink").nth(1)).to_be_attached()


def plain(text: str) -> str:
    """Text without what is not seen, and what JavaScript and Python do not both call space."""
    return re.sub(r"[\s\x00-\x1f\x7f-\xa0\ufeff]", "", text)


def chat(server: Served, messages: list[dict[str, str]], **options: Any) -> str:
    """What the server answers to the same."""
    body = {"model": "tiny", "messages": messages, **options}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    return answer["choices"][0]["message"]["content"]


def said_by_user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def asked_by(page: Page, act: Callable[[], None]) -> dict[str, Any]:
    with page.expect_request("**/v1/chat/completions") as request:
        act()
    return json.loads(request.value.post_data or "")


def test_a_block_fills_in_place(page, slow_server):
    page.keyboard.type("Why is the sky blue?")  # the field has the focus from the start
    page.keyboard.press("Enter")
    expect(page.locator(".question")).to_have_text("Why is the sky blue?")
    expect(page.locator("#question")).to_have_value("")
    wait_for_end(page)

    blocks: dict[int, list[list[str]]] = {}
    for frame in page.evaluate("frames_seen"):
        blocks.setdefault(frame["block"], []).append(frame["shown"].split())
    assert len(blocks) >= 3
    jumps = 0
    for frames in blocks.values():
        assert len({len(frame) for frame in frames}) == 1
        for before, after in itertools.pairwise(frames):
            filled = [place for place, one in enumerate(after) if one[0] == "i"]
            assert {place for place, one in enumerate(before) if one[0] == "i"} <= set(filled)
            jumps += filled != list(range(len(filled)))
        assert len(frames) == 1 or any(one[0] == "b" for frame in frames for one in frame)
        assert any(one[:2] == "if" for frame in frames for one in frame)  # filled in this pass
    assert jumps  # not from left to right

    expect(page.locator(".block")).to_have_count(0)
    answer = chat(slow_server, [said_by_user("Why is the sky blue?")])
    assert plain(page.locator(".text").text_content()) == plain(answer)
    assert plain(page.locator("#aloud").text_content()) == plain(answer)
    expect(page.locator(".note")).to_have_text("Ended at 24 tokens, the most that an answer may have.")
    names, values = page.locator("dt").all_text_contents(), page.locator("dd").all_text_contents()
    figures = dict(zip(names, values, strict=True))
    assert figures["Tokens"] == "24" and figures["Tokens active"] == "100%"
    assert float(page.locator(".rate b").text_content()) > 1


def test_stopping_and_going_on(long_page, long_server):
    page = long_page
    ask(page, "Once")
    begin_block(page)
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.")
    eventually(lambda: long_server.engine.stats.running == 0)
    stopped = page.evaluate("turns[0].answers[0].text")

    body = asked_by(page, partial(ask, page, "Twice"))
    assert body["messages"] == [
        *([said_by_user("Once"), {"role": "assistant", "content": stopped}] if stopped.strip() else []),
        said_by_user("Twice"),
    ]
    begin_block(page)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".note")).to_have_text(["Stopped."] * 2)
    expect(page.locator("#question")).to_be_focused()

    page.locator("#setting").click()
    page.locator("[name=max_tokens]").fill("12")
    body = asked_by(page, partial(ask, page, "Thrice"))
    assert body["messages"][-1] == said_by_user("Thrice")
    wait_for_end(page)
    answer = chat(long_server, body["messages"], max_tokens=12)
    assert plain(page.locator(".text").last.text_content()) == plain(answer) != ""
    page.get_by_role("button", name="New").click()
    expect(page.locator(".turn")).to_have_count(0)
    assert asked_by(page, partial(ask, page, "Again"))["messages"] == [said_by_user("Again")]


def test_keys_alone_will_do(long_page):
    page = long_page
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator("#question")).to_have_value("one\ntwo")
    seen = {}
    for _ in range(8):  # once around, and through the browser's own
        page.keyboard.press("Tab")
        focused = page.locator("button:focus-visible")
        if focused.count():
            style = focused.evaluate("one => getComputedStyle(one).outlineStyle")
            seen[focused.get_attribute("id")] = style
    assert seen == dict.fromkeys(("setting", "compare", "send", "key-button", "new"), "solid")

    page.locator("#setting").focus()
    page.keyboard.press("Enter")
    expect(page.locator("[name=attentionA]")).to_be_focused()
    page.keyboard.type("LoSA")
    page.keyboard.press("Tab")
    page.keyboard.type("16")
    expect(page.locator("#summary")).to_have_text("LoSA, budget 16")
    page.keyboard.press("Escape")
    expect(page.locator("#options")).to_be_hidden()
    expect(page.locator("#setting")).to_be_focused()
    page.locator("#question").focus()
    body = asked_by(page, lambda: page.keyboard.press("Enter"))
    assert body["attention"] == "losa" and body["budget"] == 16 and "temperature" not in body
    assert body["messages"] == [said_by_user("one\ntwo")]
    page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.")


def test_options_are_the_servers_until_they_are_changed(page):
    assert set(asked_by(page, partial(ask, page))) == {"model", "stream", "losart", "messages", "attention"}
    page.keyboard.press("Escape")
    page.locator("#setting").click()
    shown = page.locator("#options input").evaluate_all(
        "all => all.map((one) => [one.name, one.placeholder])"
    )
    assert {name: value for name, value in shown if not name.endswith("B")} == {
        "budgetA": "256",
        "change_thresholdA": "0.05",
        "block_length": "8",
        "confidence_threshold": "0.85",
        "max_tokens": "24",
        "temperature": "0",
    }
    own = {"block_length": 4, "confidence_threshold": 0.5, "max_tokens": 6, "temperature": 0.7}
    for name, value in own.items():
        page.locator(f"[name={name}]").fill(str(value))
    body = asked_by(page, partial(ask, page))
    assert {name: body[name] for name in own} == own
    wait_for_end(page)
    expect(page.locator(".note").last).to_contain_text("Ended at 6 tokens")
    page.locator("[name=temperature]").fill("3")
    ask(page, "hot")  # is not sent: the browser says why
    expect(page.locator(".turn")).to_have_count(2)
    page.get_by_role("button", name="defaults").click()
    expect(page.locator("#summary")).to_have_text("Dense")


def test_two_settings_side_by_side(page):
    page.get_by_role("button", name="Compare").click()
    page.locator("#setting").click()
    page.locator("[name=attentionA]").select_option("losa")
    page.locator("[name=budgetA]").fill("16")
    page.locator("[name=attentionB]").select_option("dense")
    expect(page.locator("#summary")).to_have_text("A LoSA, budget 16 · B Dense")
    page.locator("#setting").click()
    bodies = []
    page.on("request", lambda request: bodies.append(json.loads(request.post_data or "{}")))
    ask(page, "x " * 60)
    wait_for_end(page)
    assert {one["attention"]: one.get("budget") for one in bodies} == {"losa": 16, "dense": None}
    expect(page.locator(".setting")).to_have_text(["ALoSA, budget 16", "BDense"])
    left, right = page.locator(".answer").all()
    assert left.bounding_box()["y"] == right.bounding_box()["y"]
    assert left.bounding_box()["x"] + left.bounding_box()["width"] <= right.bounding_box()["x"]
    sparse, dense = [int(one.locator("dd").first.text_content().rstrip("%")) for one in (left, right)]
    assert sparse < dense == 100
    assert {one["answer"] for one in page.evaluate("frames_seen")} == {0, 1}

    def colours(canvas):
        return canvas.evaluate("""one => {
            const { data } = one.getContext("2d").getImageData(0, 0, one.width, one.height);
            const seen = new Set();
            for (let at = 0; at < data.length; at += 4) {
                if (data[at + 3]) seen.add(data.slice(at, at + 3).join());
            }
            return [...seen];
        }""")

    assert len(colours(left.locator("canvas"))) > len(colours(right.locator("canvas"))) == 1
    expect(left.locator("canvas")).to_have_attribute("aria-label", re.compile(rf": {sparse}% on average"))

    # Each goes on with its own answers, and a single setting with the first one's.
    ask(page, "and?")
    wait_for_end(page)
    said = [one["messages"][1]["content"] for one in bodies[2:]]
    assert said == page.evaluate("turns[0].answers.map((one) => one.text)")
    page.get_by_role("button", name="Compare").click()
    assert asked_by(page, partial(ask, page, "so?"))["messages"][1]["content"] == said[0]
    page.keyboard.press("Escape")


def test_a_server_with_a_key(browser, model):
    with served(model, api_keys=("right",)) as server, opened(browser, server.url) as page:
        field = page.locator("#key-field")
        expect(field).to_be_focused()  # since the server wants one
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-error")).to_contain_text("the request needs an API key of this server")
        field.fill("right")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("tiny")
        expect(page.locator("#key")).to_be_hidden()
        expect(page.locator("#question")).to_be_focused()
        ask(page)
        wait_for_end(page)
        assert plain(page.locator(".text").text_content())
        kept = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
        assert kept == [["right"], [], ""]

        page.evaluate("sessionStorage.setItem('losart-key', 'outdated')")
        ask(page)
        alert = page.locator(".answer [role=alert]")
        expect(alert).to_contain_text("the request needs an API key of this server")
        page.locator("#key-field").fill("right")
        page.keyboard.press("Enter")
        expect(page.locator("#key")).to_be_hidden()
        alert.get_by_role("button", name="Try again").click()
        wait_for_end(page)
        expect(alert).to_have_count(0)
        assert plain(page.locator(".text").last.text_content())
        page.locator("#key-button").click()
        page.get_by_role("button", name="Forget").click()
        assert page.evaluate("sessionStorage.length") == 0


def test_errors_are_shown_as_the_server_says_them(browser, model):
    limits = {"longest_prompt": 60, "seconds": 0.5}
    with served(model, SlowEngine(model), **limits) as server, opened(browser, server.url) as page:
        ask(page, "long " * 60)
        alert = page.locator(".answer [role=alert]")
        expect(alert).to_contain_text("tokens; this server takes 60")
        ask(page, "short")  # but not as short as the time that this server has
        expect(alert.last).to_contain_text("the answer was not complete within 0.5 seconds")
        assert page.locator(".text").last.text_content()  # what came before it stays
        page.context.set_offline(True)
        ask(page, "anybody?")
        expect(alert.last).to_contain_text("The server cannot be reached.")


def answer_with(page: Page, text: str) -> None:
    """Let the page have this answer, whatever it asks."""
    chunk = {"choices": [{"delta": {"content": text}, "finish_reason": "stop"}]}
    answer = {"body": f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", "content_type": "text/event-stream"}
    page.route("**/chat/completions", lambda route: route.fulfill(**answer))


def test_text_stays_text(page):
    markup = "<img src=x onerror=alert(1)>\n```html\n<b>bold</b>\n```\n<script>alert(2)</script>"
    answer_with(page, markup)
    ask(page, "<i>Why?</i>")
    wait_for_end(page)
    expect(page.locator(".question")).to_have_text("<i>Why?</i>")
    assert plain(page.locator(".text").text_content()) == plain(
        markup.replace("```html", "").replace("```", "")
    )
    expect(page.locator("#turns img, #turns script, #turns b, #turns i")).to_have_count(1)  # of the readout
    expect(page.locator("pre")).to_have_text("<b>bold</b>")


def test_figures_stay_beside_a_long_answer(page):
    answer_with(page, "word " * 5000)
    ask(page)
    wait_for_end(page)
    expect(page.locator(".note, .text").last).to_be_in_viewport()
    assert page.evaluate("room()") < 1 and page.evaluate("scrollY") > 1000
    expect(page.locator(".rate")).to_be_in_viewport(ratio=1)


def test_who_reads_elsewhere_is_left_there(browser, long_server):
    with opened(browser, long_server.url, viewport={"width": 1200, "height": 360}) as page:
        expect(page.locator("#model")).to_have_text("tiny")
        ask(page)
        begin_block(page)
        assert page.evaluate("scrollY") > 100
        for place, stays in (("room() + scrollY", "room() < 48"), ("0", "scrollY === 0")):
            page.evaluate(f"scrollTo(0, {place})")
            later = page.evaluate("turns[0].answers[0].passes.length") + 40
            eventually(lambda later=later: page.evaluate("turns[0].answers[0].passes.length") > later)
            assert page.evaluate(stays)


def test_edited_tokens_are_shown_as_edited(browser, model):
    options = OPTIONS | {"max_new_tokens": 40, "editing_threshold": 0.0, "max_post_steps": 4}
    with served(model, SlowEngine(model), options=options) as server, opened(browser, server.url) as page:
        ask(page)
        expect(page.locator(".block .edited").first).to_be_visible()
        assert page.locator(".block .edited").first.get_attribute("title").startswith("was “")
        wait_for_end(page)
        answer = chat(server, [said_by_user("Why is the sky blue?")])
        assert plain(page.locator(".text").text_content()) == plain(answer)
        before = [frame["before"] for frame in page.evaluate("frames_seen")]
        assert all(plain(answer).startswith(plain(one)) for one in before) and len(set(before)) >= 3


def test_active_tokens_are_marked(page):
    page.locator("#setting").click()
    page.locator("[name=attentionA]").select_option("losa")
    page.locator("#setting").click()
    ask(page, "x " * 40)
    wait_for_end(page)
    tokens = [one for frame in page.evaluate("frames_seen") for one in frame["shown"].split()]
    assert any(one.endswith("a") for one in tokens) and any(not one.endswith("a") for one in tokens)


def test_a_phone(browser, long_server):
    def fits() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        heights = page.locator("button:visible").evaluate_all("all => all.map((one) => one.offsetHeight)")
        assert min(heights) >= 44

    with opened(browser, long_server.url, **PHONE) as page:
        expect(page.locator("#model")).to_have_text("tiny")
        fits()
        ask(page, "long" * 100)
        begin_block(page)
        fits()
        expect(page.locator(".block")).to_be_in_viewport()
        page.get_by_role("button", name="Stop").click()
        fits()
        page.get_by_role("button", name="Compare").click()
        page.locator("#setting").click()
        fits()
        page.locator("#setting").click()
        ask(page)
        begin_block(page)
        page.get_by_role("button", name="Stop").click()
        fits()
        above, below = [one.bounding_box() for one in page.locator(".side .answer").all()]
        assert above["y"] + above["height"] <= below["y"]
        page.locator("#key-button").click()
        fits()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_can_be_read(browser, long_server, scheme):
    def readable() -> None:
        seen = page.evaluate(CONTRASTS)
        assert len(seen) > 10
        assert not [(text, round(contrast, 2)) for text, contrast in seen if contrast < 4.5]  # WCAG's AA

    with opened(browser, long_server.url, color_scheme=scheme, reduced_motion="reduce") as page:
        expect(page.locator("#model")).to_have_text("tiny")
        red, *_ = map(
            int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
        )
        assert (red < 60) == (scheme == "dark")
        readable()
        page.get_by_role("button", name="Compare").click()
        page.locator("#setting").click()
        ask(page)
        begin_block(page)
        readable()
        assert page.locator("#legend .fresh").evaluate("one => getComputedStyle(one).animationName") == "none"
        page.keyboard.press("Escape")
        page.locator("#key-button").click()
        readable()
        page.route("**/chat/completions", lambda route: route.abort())
        ask(page)
        expect(page.locator("[role=alert]").last).to_contain_text("cannot be reached")
        readable()


def test_a_model_that_does_not_chat_completes(browser, make_checkpoint):
    checkpoint = make_checkpoint()
    file = checkpoint / "tokenizer_config.json"
    file.write_text(
        json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"})
    )
    model = losart.load(checkpoint, "cpu")
    with served(model) as server, opened(browser, server.url) as page:
        ask(page, "Once upon a time")
        wait_for_end(page)
        body = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 12}
        answer = httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"]
        assert plain(page.locator(".text").text_content()) == plain(answer) != ""


def test_nothing_comes_from_outside(slow_server):
    answer = httpx.get(slow_server.url)
    assert answer.headers["content-type"].startswith("text/html")
    rules = dict(one.split(" ", 1) for one in answer.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'"
    assert not {"unsafe-inline", "unsafe-eval", "http", "*"} & set(
        re.findall(r"[\w*-]+", " ".join(rules.values()))
    )
    assert not re.search(r"(?:https?:)?//[a-z]", answer.text.replace("http://www.w3.org/2000/svg", ""))
    assert "innerHTML" not in answer.text
