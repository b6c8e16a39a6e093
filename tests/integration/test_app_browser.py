"""The page in a real browser, as its users see it: with a mouse, by keyboard, on a phone and in the dark."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import gradio as gr
import pytest
from fixtures_app import INFO, LINES, PROMPT, WINDOW, _page, _slow, _source, _version  # noqa: F401 (fixtures)

PATIENCE_MS = 60_000  # of actions and of expectations: both cores may be busy with other tests
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
if CHROMIUM is None:
    pytest.skip("no chromium, chromium-browser or google-chrome on the PATH", allow_module_level=True)

DESKTOP, PHONE = {"width": 1200, "height": 900}, {"width": 375, "height": 800}
TABS = ("Write", "Next token", "Recall", "Training", "About")
PLACE = "Place in the text, in tokens"
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    playwright.expect.set_options(timeout=PATIENCE_MS)
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any, page: gr.Blocks) -> Iterator[Open]:
    """Open the page as a new visitor; at the end, no request has left this machine and no script has failed."""
    contexts, requested, failed = [], [], []

    def open_page(**options: Any) -> Any:
        contexts.append(browser.new_context(**{"viewport": DESKTOP} | options))
        visitor = contexts[-1].new_page()
        visitor.set_default_timeout(PATIENCE_MS)
        visitor.on("request", lambda request: requested.append(request.url))
        visitor.on("pageerror", lambda error: failed.append(str(error)))
        visitor.on("console", lambda line: failed.append(line.text) if line.type == "error" else None)
        visitor.on("dialog", lambda dialog: failed.append(f"a script ran: {dialog.message}"))
        visitor.goto(page.local_url)
        visitor.wait_for_selector("#write")
        return visitor

    yield open_page
    for context in contexts:
        context.close()
    assert {url for url in requested if not url.startswith((page.local_url, "data:", "blob:"))} == set()
    assert requested
    assert failed == []


def open_tab(visitor: Any, name: str) -> None:
    visitor.get_by_role("tab", name=name, exact=True).click()
    wait_for_layout(visitor)


def wait_for_layout(visitor: Any) -> None:
    """Gradio lays fields out at the press and sets their values a frame later; then colours change gradually."""
    visitor.evaluate(LAID_OUT)


def write(visitor: Any, prompt: str) -> Any:
    """Complete a prompt; return the text element."""
    visitor.locator("#prompt textarea").fill(prompt)
    press_write(visitor, prompt)
    visitor.wait_for_function(WRITTEN, arg=prompt)
    return visitor.locator("#written .verse").first


def press_write(visitor: Any, prompt: str) -> None:
    """Press until the prompt is sent: Gradio ignores a press until it knows that the last text is finished."""

    def is_sent(request: Any) -> bool:
        return "/queue/join" in request.url and request.post_data_json["data"][:1] == [prompt]

    for _ in range(30):
        with suppress(playwright.TimeoutError), visitor.expect_request(is_sent, timeout=2000):
            visitor.locator("#write").click()
            return
    pytest.fail("no press sent the prompt")


def set_number(visitor: Any, label: str, value: float) -> None:
    box = visitor.get_by_label(f"number input for {label}")
    box.fill(str(value))
    box.press("Tab")


def near(one: Any, other: Any) -> bool:
    """Whether `one` is right below `other`."""
    upper, lower = other.bounding_box(), one.bounding_box()
    return bool(-5 < lower["y"] - upper["y"] - upper["height"] < 30)


def test_it_writes_and_a_mark_opens_its_place_by_mouse_and_by_keyboard(visit):
    visitor = visit()
    set_number(visitor, "Temperature", 0)
    set_number(visitor, "Max tokens", 16)
    text = write(visitor, PROMPT)
    assert text.inner_text() in LINES
    assert text.locator(".prompt").inner_text() == PROMPT
    assert visitor.locator("#status").inner_text().endswith("0% new")
    assert "tokens/s" in visitor.locator("#status").inner_text()
    place, mark = visitor.locator("#written .beside"), visitor.locator("#written mark").first
    mark.click()
    playwright.expect(place).to_contain_text("at its beginning")
    playwright.expect(place).to_contain_text("Resolved. resolved.")
    assert 0 < place.bounding_box()["y"] - mark.bounding_box()["y"] < 100  # beside it
    place.locator("button").click()
    playwright.expect(place).to_have_count(0)
    mark.click()
    place.wait_for()
    set_number(visitor, "Samples", 4)
    write(visitor, PROMPT + " proceed")
    playwright.expect(place).to_have_count(0)
    assert visitor.locator("#written .sheet").count() == 4
    first = int(visitor.locator("#written header").first.inner_text().split("seed ")[1].split()[0])
    assert f"seed {first + 3}" in visitor.locator("#written").inner_text()
    mark.focus()
    visitor.keyboard.press("Enter")
    place.wait_for()


def test_it_is_used_by_keyboard_and_writes_one_text_at_a_time(visit, slow):
    visitor, pressable = visit(), "getComputedStyle(document.querySelector('#write')).pointerEvents != 'none'"
    prompt = visitor.locator("#prompt textarea")
    assert visitor.evaluate(pressable)
    visitor.locator("#example-1").click()
    playwright.expect(prompt).to_have_value(re.compile("^(?!All:)"))  # another one than at the start
    example = prompt.input_value()
    prompt.press("Control+Enter")
    assert slow.opens(1)
    visitor.locator("#written .writing").wait_for()
    assert not visitor.evaluate(pressable)
    visitor.keyboard.press("Escape")
    assert slow.opens(0)
    visitor.wait_for_function("!document.querySelector('.writing')")  # the caret is gone
    visitor.wait_for_function(pressable)
    assert example in visitor.locator("#written .verse").inner_text()  # the text stays


def test_a_prompt_is_shown_as_text(visit):
    visitor = visit()
    set_number(visitor, "Max tokens", 3)
    scripts = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    for prompt in (scripts, "{{constructor}} ${alert(3)} `${1+1}` </textarea>", "🙂 é\u202e"):
        assert write(visitor, prompt).locator(".prompt").inner_text() == prompt
        assert visitor.locator("#written img, #written script").count() == 0


def test_an_error_stays_beside_its_field_and_the_text_of_another_prompt_is_marked(visit):
    visitor = visit()
    set_number(visitor, "Max tokens", 3)
    write(visitor, "All:")
    old, faults = visitor.locator("#written [data-old]"), visitor.locator(".fault")
    before = visitor.locator("#written").inner_text()
    playwright.expect(old).to_have_count(0)
    visitor.locator("#example-1").click()
    playwright.expect(old).to_have_count(1)
    set_number(visitor, "Max tokens", 5000)  # beyond the slider
    visitor.locator("#prompt textarea").fill("All:")
    playwright.expect(old).to_have_count(0)
    press_write(visitor, "All:")
    playwright.expect(faults).to_have_text("5000: choose a number from 1 to 2,000")
    assert near(faults, visitor.locator(".block", has=visitor.get_by_label("number input for Max tokens")).last)
    assert visitor.locator("#written").inner_text() == before
    assert visitor.locator(".toast-body").count() == 0
    visitor.get_by_role("checkbox", name="Keep it").check()
    visitor.get_by_label("Seed").first.fill("")
    visitor.get_by_label("Seed").first.press("Tab")  # Gradio sends a field when it loses the focus
    press_write(visitor, "All:")
    playwright.expect(faults).to_contain_text("choose a whole number from 0")
    set_number(visitor, "Max tokens", 3)
    visitor.get_by_label("Seed").first.fill("5")
    write(visitor, "All: ")
    assert "seed 5" in visitor.locator("#written").inner_text()
    playwright.expect(faults).to_have_count(0)


def test_on_a_phone_the_text_comes_into_view_and_stop_stays_there(visit, slow):
    visitor = visit(viewport=PHONE, has_touch=True)
    status, stop = visitor.locator("#status"), visitor.locator("#stop")
    assert status.bounding_box()["y"] > PHONE["height"]
    visitor.locator("#write").click()
    visitor.locator("#written .writing").wait_for()
    for part in (status, stop, visitor.locator("#written .sheet")):
        assert 0 <= part.bounding_box()["y"] < PHONE["height"] - 30
    stop.click()
    assert slow.opens(0)


def test_all_tabs_of_an_open_page_change_their_version_and_say_so(visit, source, monkeypatch):
    visitor = visit()
    open_tab(visitor, "Recall")
    playwright.expect(visitor.locator("#heat .heat")).to_be_visible()
    for name in ("Training", "About"):
        open_tab(visitor, name)
    monkeypatch.setattr(source, "current", lambda: source.open("6"))
    playwright.expect(visitor.locator("#version-change")).to_contain_text("Version 6 has replaced version 7")
    for part in ("#head", "#run", "#about"):
        playwright.expect(visitor.locator(part)).to_contain_text("version 6", use_inner_text=False)
    playwright.expect(visitor.locator("#recital .samples")).to_have_count(1)  # it recited again
    open_tab(visitor, "Write")
    set_number(visitor, "Max tokens", 2)
    write(visitor, "All:")
    playwright.expect(visitor.locator("#status")).to_contain_text("written by parrot version 6")


def test_a_press_shows_its_place_in_the_queue_until_stop(visit, slow, page, monkeypatch):
    for n in (1, 2):
        visit().locator("#write").click()
        assert slow.opens(n)
    monkeypatch.setattr(page._queue.event_queue_per_concurrency_id["model"], "concurrency_limit", 2)
    visitor = visit()
    visitor.locator("#write").click()
    waiting, shown = visitor.locator("#status .progress-text"), visitor.locator("#status [data-testid=status-tracker]")
    playwright.expect(waiting).to_contain_text("queue: ")
    assert shown.bounding_box()["height"] > 10  # Gradio hides it over an empty result
    playwright.expect(visitor.locator("#write")).to_have_css("pointer-events", "none")
    visitor.keyboard.press("Escape")
    playwright.expect(waiting).to_have_count(0)
    assert slow.opens(2)


def test_a_pressed_token_is_appended_and_the_next_one_predicted(visit, tokenizer):
    visitor = visit()
    open_tab(visitor, "Next token")
    prompt, best = visitor.locator("#so-far textarea"), visitor.locator("#next tr").nth(1)
    prompt.fill("First Citizen:\nBefore we")
    prompt.press_sequentially(" proceed")  # it predicts while one types
    playwright.expect(best).to_contain_text("any")
    best.locator("button").click()
    playwright.expect(prompt).to_have_value("First Citizen:\nBefore we proceed any")
    playwright.expect(best).to_contain_text("further")
    playwright.expect(best).to_contain_text("1 of 1")
    assert "The training text contains it once." in visitor.locator("#next .note").inner_text()
    prompt.press("Backspace")
    playwright.expect(visitor.locator("#next .note")).to_contain_text("there are no grey bars")
    for text, predicted in (("All:", "↵"), ("First Citizen:\nBefore we proceed any", "further")):
        prompt.fill(text)  # as a paste and an input method do: without a key
        playwright.expect(best).to_contain_text(predicted)
    parts = tokenizer.encode("🐱")  # the table does not have these tokens
    for n, token in enumerate(parts, start=1):
        visitor.locator("#next button").first.evaluate(PRESS_TOKEN, token)
        sent = " ".join(map(str, parts[:n])) if n < len(parts) else ""
        playwright.expect(visitor.locator("#next table")).to_have_attribute("data-part", sent)
    playwright.expect(prompt).to_have_value("First Citizen:\nBefore we proceed any🐱")


def test_a_place_is_recited_if_the_model_knows_it_and_words_are_found(visit):  # it knows its windows only
    visitor = visit()
    open_tab(visitor, "Recall")
    header, words = visitor.locator("#heat header"), visitor.locator("#words input, #words textarea").first
    playwright.expect(visitor.locator("#recital")).to_contain_text("all correct")
    loss = float(re.search(r"mean loss ([\d.]+)", header.inner_text())[1])
    set_number(visitor, PLACE, WINDOW // 2 + 5)
    playwright.expect(header).to_contain_text(f"tokens {WINDOW // 2 + 5}–")
    shifted_loss = float(re.search(r"mean loss ([\d.]+)", header.inner_text())[1])
    assert loss < 0.1 < 1 < shifted_loss
    playwright.expect(visitor.locator("#recital ins").first).to_be_visible()
    words.fill("chief enemy")
    visitor.locator("#find").click()
    playwright.expect(visitor.locator("#heat .found").first).to_contain_text("chief")
    words.fill("zebra")
    visitor.locator("#find").click()
    playwright.expect(visitor.locator(".fault")).to_contain_text("is not in the training text")
    assert near(visitor.locator(".fault"), visitor.locator("#words"))


def test_another_version_is_shown_and_compared_with_the_first(visit):
    visitor = visit()
    open_tab(visitor, "Training")
    assert "parrot version 7" in visitor.locator("#run h2").first.inner_text()
    assert visitor.locator("#run .goal").count() == 1  # the target line
    assert INFO["tags"]["data_sha256"] in visitor.locator("#run").inner_text()
    visitor.locator("#version input").click()
    visitor.get_by_role("option", name="6").click()
    playwright.expect(visitor.locator("#run h2").first).to_have_text("parrot version 6")
    visitor.locator("#compared-prompt textarea").fill("First Citizen:\nBefore")  # it recites the rest of the window
    visitor.locator("#compare").click()
    sheets = visitor.locator("#compared .sheet")
    playwright.expect(sheets).to_have_count(2)
    playwright.expect(visitor.locator("#compared .writing")).to_have_count(0)
    assert "parrot version 7" in sheets.nth(0).inner_text()
    assert sheets.nth(0).locator(".verse").inner_text() == sheets.nth(1).locator(".verse").inner_text()
    sheets.nth(1).locator("mark").first.click()
    visitor.locator("#compared .beside .place").wait_for()


@pytest.mark.parametrize(("scheme", "screen"), [("light", DESKTOP), ("dark", PHONE)])
def test_every_tab_fits_the_screen_and_has_enough_contrast(visit, scheme, screen):
    """Contrast of at least 4.5 to 1, as WCAG requires for small text."""
    visitor = visit(color_scheme=scheme, viewport=screen, has_touch=screen is PHONE)
    set_number(visitor, "Max tokens", 16)
    write(visitor, "supercalifragilisticexpialidocious" * 3)
    assert visitor.evaluate(OUTSIDE) == []
    write(visitor, PROMPT)
    for name in TABS:
        open_tab(visitor, name)
        if name == "Recall":
            set_number(visitor, PLACE, WINDOW // 2 + 5)  # where the heat map is darkest
            playwright.expect(visitor.locator("#heat header")).to_contain_text(f"tokens {WINDOW // 2 + 5}–")
        wait_for_layout(visitor)
        assert visitor.evaluate(FAINT) == [], name
        assert visitor.evaluate("document.documentElement.scrollWidth") <= screen["width"], name
        assert visitor.evaluate(OUTSIDE) == [], name


PRESS_TOKEN = "(button, token) => { button.dataset.token = token; button.disabled = false; button.click(); }"
WRITTEN = """prompt => document.querySelector("#written .prompt")?.textContent === prompt
  && document.querySelector("#written .note")"""
LAID_OUT = """async () => {
  for (let n = 0; n < 2; n++) await new Promise(requestAnimationFrame);
  const passing = document.getAnimations().filter((a) => a.effect.getComputedTiming().endTime !== Infinity);
  await Promise.allSettled(passing.map((a) => a.finished));
}"""
OUTSIDE = """() => [...document.querySelectorAll(".tabitem *, #head *")]
  .filter((e) => e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1)
  .map((e) => e.outerHTML.slice(0, 80))"""
FAINT = """() => {
  const parse = (c) => { const n = c.match(/[\\d.]+/g).map(Number); return c.startsWith("color(srgb")
    ? [n[0] * 255, n[1] * 255, n[2] * 255, n[3] ?? 1] : [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3]));
  const light = (c) => { const [r, g, b] = c.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92
    : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { const layers = [];
    for (; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((under, layer) => over(layer, under), [255, 255, 255]); };
  const faint = [];
  for (const e of document.querySelectorAll("#head *, .tabitem *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest("svg, .blank, button:disabled")) continue;
    const back = behind(e), ink = over(parse(getComputedStyle(e).color), back);
    const [a, b] = [light(ink), light(back)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) faint.push(`${ratio.toFixed(2)} ${e.className} ${e.textContent.trim().slice(0, 40)}`);
  }
  return [...new Set(faint)];
}"""
