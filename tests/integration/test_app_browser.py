"""The page in a real browser: what its users do, on a wide screen, on a narrow one, by keyboard, in the dark."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import gradio as gr
import pytest
from fixtures_app import INFO, LINES, SLOW_S, WINDOW, Stub, _at_full_speed, _page, _source, _version  # noqa: F401 (fixtures)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
if CHROMIUM is None:
    pytest.skip("no chromium, chromium-browser or google-chrome on the PATH", allow_module_level=True)

PHONE = {"width": 375, "height": 800}
TABS = ("Write", "Next token", "Recall", "Training", "About")
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any, page: gr.Blocks) -> Iterator[Open]:
    """Open the page as a visitor of its own; at the end, nothing has left this machine, and no script has failed."""
    contexts, asked, failed = [], [], []

    def open_page(**options: Any) -> Any:
        contexts.append(browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | options))
        visitor = contexts[-1].new_page()
        visitor.set_default_timeout(60_000)
        visitor.on("request", lambda request: asked.append(request.url))
        visitor.on("pageerror", lambda error: failed.append(str(error)))
        visitor.on("console", lambda line: failed.append(line.text) if line.type == "error" else None)
        visitor.on("dialog", lambda dialog: failed.append(f"a script ran: {dialog.message}"))
        visitor.goto(page.local_url)
        visitor.wait_for_selector("#write")
        return visitor

    yield open_page
    for context in contexts:
        context.close()
    assert {url for url in asked if not url.startswith((page.local_url, "data:", "blob:"))} == set()
    assert asked
    assert failed == []


def tab(visitor: Any, name: str) -> None:
    visitor.get_by_role("tab", name=name, exact=True).click()
    drawn(visitor)


def drawn(visitor: Any) -> None:
    """Wait for what was opened just now: Gradio lays fields out at the press and sets their values a frame later."""
    visitor.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def write(visitor: Any, prompt: str) -> Any:
    """Have a prompt continued to the end; return the sheet."""
    visitor.locator("#prompt textarea").fill(prompt)
    press_write(visitor, prompt)
    visitor.wait_for_function(WRITTEN, arg=prompt)
    return visitor.locator("#written .verse").first


def press_write(visitor: Any, prompt: str) -> None:
    """Press until the prompt is sent: Gradio heeds no press before it has heard that the last text is done."""

    def is_sent(request: Any) -> bool:
        return "/queue/join" in request.url and request.post_data_json["data"][:1] == [prompt]

    for _ in range(30):
        with suppress(playwright.TimeoutError), visitor.expect_request(is_sent, timeout=2000):
            visitor.locator("#write").click()
            return
    pytest.fail("no press was heeded")


def set_number(visitor: Any, label: str, value: float) -> None:
    box = visitor.get_by_label(f"number input for {label}")
    box.fill(str(value))
    box.press("Tab")


def test_it_writes_and_a_marked_passage_opens_the_place_it_comes_from(visit):
    visitor = visit()
    set_number(visitor, "Temperature", 0)
    set_number(visitor, "Max tokens", 12)
    verse = write(visitor, "First Citizen:\nBefore we")
    assert verse.inner_text() in LINES
    assert verse.locator(".prompt").inner_text() == "First Citizen:\nBefore we"
    assert visitor.locator("#status").inner_text().endswith("0% new")
    assert "tokens/s" in visitor.locator("#status").inner_text()
    visitor.locator("#written mark").first.click()
    place = visitor.locator("#place .place")
    place.wait_for()
    assert "token 0 of" in place.inner_text()
    assert "Resolved. resolved." in place.inner_text()


def test_a_passage_opens_by_keyboard_as_well(visit):
    visitor = visit()
    set_number(visitor, "Temperature", 0)
    write(visitor, "First Citizen:\nBefore we")
    visitor.locator("#written mark").first.focus()
    visitor.keyboard.press("Enter")
    visitor.locator("#place .place").wait_for()


def test_ctrl_enter_writes_and_esc_stops(visit, source):
    visitor = visit()
    source.watched.delay_s = SLOW_S
    visitor.locator("#prompt textarea").fill("All:")
    visitor.locator("#prompt textarea").press("Control+Enter")
    assert source.watched.opens(1)
    visitor.locator("#written .writing").wait_for()
    visitor.keyboard.press("Escape")
    assert source.watched.opens(0)
    visitor.wait_for_function("!document.querySelector('.writing')")  # the caret is gone
    assert "All:" in visitor.locator("#written .verse").inner_text()  # what was written stays


def test_write_cannot_be_pressed_while_it_writes(visit, source):
    visitor = visit()
    source.watched.delay_s = SLOW_S
    button = visitor.locator("#write")
    assert button.evaluate("button => getComputedStyle(button).pointerEvents") != "none"
    button.click()
    visitor.locator("#written .writing").wait_for()
    assert button.evaluate("button => getComputedStyle(button).pointerEvents") == "none"
    visitor.locator("#stop").click()
    visitor.wait_for_function("getComputedStyle(document.querySelector('#write')).pointerEvents != 'none'")


def test_an_example_is_put_in_place_of_the_prompt(visit):
    visitor = visit()
    visitor.locator("#example-3").click()
    playwright.expect(visitor.locator("#prompt textarea")).to_have_value("First Citizen:\nBefore we proceed")


def test_the_keys_reach_what_is_used_most_in_order(visit):
    visitor = visit()
    visitor.locator("#prompt textarea").focus()
    reached = []
    for _ in range(9):
        visitor.keyboard.press("Tab")
        reached.append(visitor.evaluate("document.activeElement.id || document.activeElement.ariaLabel"))
    assert [name for name in reached if name in ("example-0", "write", "stop")] == ["example-0", "write", "stop"]
    assert "number input for Samples" in reached


def test_stop_ends_this_stream_alone(visit, source):
    one, other = visit(), visit()
    source.watched.delay_s = SLOW_S
    for visitor in (one, other):
        visitor.locator("#prompt textarea").fill("All:")
        visitor.locator("#write").click()
        visitor.locator("#written .verse").wait_for()
    assert source.watched.opens(2)
    one.locator("#stop").click()
    assert source.watched.opens(1)
    before = other.locator("#written .verse").inner_text()
    longer = "before => document.querySelector('#written .verse').innerText.length > before + 20"
    other.wait_for_function(longer, arg=len(before))
    other.locator("#stop").click()
    assert source.watched.opens(0)


def test_a_visitor_who_leaves_ends_the_stream(visit, source):
    visitor = visit()
    source.watched.delay_s = SLOW_S
    press_write(visitor, "First Citizen:\n")
    visitor.locator("#written .writing").wait_for()  # until the page reads, the server waits half a minute for it
    assert source.watched.opens(1)
    visitor.close()
    assert source.watched.opens(0)


def test_four_samples_are_written_side_by_side_and_again_the_same(visit):
    visitor = visit()
    set_number(visitor, "Samples", 4)
    set_number(visitor, "Max tokens", 10)
    write(visitor, "All:")
    first = visitor.locator("#written").inner_text()
    assert visitor.locator("#written .sheet").count() == 4
    assert "seed 4" in first
    visitor.locator("#prompt textarea").fill("Something else")
    write(visitor, "Something else")
    write(visitor, "All:")
    visitor.wait_for_function("first => document.querySelector('#written').innerText === first", arg=first)


@pytest.mark.security
@pytest.mark.parametrize(
    "prompt",
    [
        "<img src=x onerror=alert(1)><script>alert(2)</script>",
        "{{constructor}} ${alert(3)} `${1+1}` </textarea>",
        "<|endoftext|>",
        "🙂 é\u202e",
    ],
)
def test_a_prompt_is_shown_as_the_text_it_is(visit, prompt):
    visitor = visit()
    set_number(visitor, "Max tokens", 3)
    verse = write(visitor, prompt)
    assert verse.locator(".prompt").inner_text() == prompt
    assert visitor.locator("#written img, #written script").count() == 0
    tab(visitor, "Next token")
    visitor.locator("#so-far textarea").fill(prompt)
    visitor.locator("#predict").click()
    visitor.locator("#next table").wait_for()
    assert visitor.locator("#next img, #next script").count() == 0


def test_wrong_input_is_refused_in_words_and_what_was_there_stays(visit):
    visitor = visit()
    visitor.get_by_role("button", name="More").click()
    drawn(visitor)
    write(visitor, "All:")
    before = visitor.locator("#written").inner_text()
    visitor.get_by_label("Seed").first.fill("")
    visitor.get_by_label("Seed").first.press("Tab")  # as who leaves the field does
    press_write(visitor, "All:")
    toast = visitor.locator(".toast-body")
    toast.wait_for()
    assert "seed None" in toast.inner_text()
    assert visitor.locator("#written").inner_text() == before


def test_a_press_on_a_token_appends_it_and_goes_on(visit):
    visitor = visit()
    tab(visitor, "Next token")
    visitor.locator("#so-far textarea").fill("First Citizen:\nBefore we proceed")  # no press: it looks while one types
    visitor.locator("#next button", has_text="any").click()
    visitor.wait_for_function("document.querySelector('#so-far textarea').value.endsWith('proceed any')")
    best = visitor.locator("#next tr").nth(1)
    playwright.expect(best).to_contain_text("further")
    playwright.expect(best).to_contain_text("1 of 1")
    assert "Occurrences in the training text: 1." in visitor.locator("#next .note").inner_text()


def test_a_place_is_recited_and_no_longer_when_it_is_shifted(visit):
    visitor = visit()
    tab(visitor, "Recall")
    header = visitor.locator("#heat header")
    loss = float(re.search(r"mean loss ([\d.]+)", header.inner_text())[1])
    playwright.expect(visitor.locator("#recital")).to_contain_text("all correct")
    set_number(visitor, "Shifted by, in tokens", WINDOW // 2)
    playwright.expect(header).to_contain_text(f"tokens {WINDOW // 2}–")
    moved = float(re.search(r"mean loss ([\d.]+)", header.inner_text())[1])
    assert loss < 0.1 < 1 < moved
    playwright.expect(visitor.locator("#recital ins").first).to_be_visible()


def test_words_are_found_in_the_training_text(visit):
    visitor = visit()
    tab(visitor, "Recall")
    visitor.locator("#words input, #words textarea").first.fill("chief enemy")
    visitor.locator("#find").click()
    playwright.expect(visitor.locator("#heat .found").first).to_contain_text("chief")
    visitor.locator("#words input, #words textarea").first.fill("zebra")
    visitor.locator("#find").click()
    playwright.expect(visitor.locator(".toast-body")).to_contain_text("is not in the training text")


def test_another_version_can_be_looked_at_and_laid_beside_the_first(visit):
    visitor = visit()
    tab(visitor, "Training")
    assert "parrot version 7, champion" in visitor.locator("#run").inner_text()
    assert visitor.locator("#run .goal").count() == 1  # the target line
    assert INFO["tags"]["data_sha256"] in visitor.locator("#run").inner_text()
    visitor.locator("#version input").click()
    visitor.get_by_role("option", name="6").click()
    playwright.expect(visitor.locator("#run h2").first).to_have_text("parrot version 6")
    visitor.locator("#compare").click()
    sheets = visitor.locator("#compared .sheet")
    playwright.expect(sheets).to_have_count(2)
    playwright.expect(visitor.locator("#compared .writing")).to_have_count(0)
    assert "parrot version 7" in sheets.nth(0).inner_text()
    assert sheets.nth(0).locator(".verse").inner_text() == sheets.nth(1).locator(".verse").inner_text()
    sheets.nth(1).locator("mark").first.click()
    visitor.locator("#compared-place .place").wait_for()


def test_what_is_wrong_with_the_champion_is_said_on_the_page(visit, source):
    visitor = visit()
    source.trouble = "champion could not be loaded (version 8 is altered), so parrot version 7 stays"
    write(visitor, "All:")
    playwright.expect(visitor.locator("#written .trouble")).to_contain_text("version 8 is altered")


def test_the_parts_are_counted_and_it_is_said_what_the_model_is_not(visit):
    visitor = visit()
    tab(visitor, "About")
    text = visitor.locator("#about").inner_text()
    assert "What it is not" in text
    assert f"{50257 * 48:,}" in text


def test_nothing_sticks_out_of_a_narrow_screen(visit):
    visitor = visit(viewport=PHONE, has_touch=True)
    write(visitor, "First Citizen:\n" + "supercalifragilisticexpialidocious" * 3)
    for name in TABS:
        tab(visitor, name)
        visitor.wait_for_timeout(300)
        assert visitor.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], name
        stray = visitor.evaluate(
            "() => [...document.querySelectorAll('.tabitem *, #head *')].filter(e => e.checkVisibility() && "
            "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        )
        assert stray == [], name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_in_the_dark(visit, scheme):
    """At least 4.5 to 1 between a text and what lies behind it, as WCAG asks of small print."""
    visitor = visit(color_scheme=scheme)
    write(visitor, "First Citizen:\nBefore we")
    for name in TABS:
        tab(visitor, name)
        if name == "Recall":
            set_number(visitor, "Shifted by, in tokens", WINDOW // 2)  # where the heat map is at its darkest
            playwright.expect(visitor.locator("#heat header")).to_contain_text(f"tokens {WINDOW // 2}–")
        visitor.wait_for_timeout(300)
        assert visitor.evaluate(FAINT) == [], name


WRITTEN = """prompt => document.querySelector("#written .prompt")?.textContent === prompt
  && document.querySelector("#written .note")"""
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
