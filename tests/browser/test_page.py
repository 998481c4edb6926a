"""The page at `/` in a real browser, over a swarm of three real daemons; the last test kills one of them.

Screenshots are in out/screenshots.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser.conftest import API_KEY, MODEL, Daemon

ROOT: Final = Path(__file__).parents[2]
SCREENSHOTS: Final = ROOT / "out/screenshots"
CONTRAST: Final = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8").partition("\n")[2]
NAMES: Final = (Path(__file__).parent / "names.js").read_text(encoding="utf-8").partition("\n")[2]
QUESTION: Final = "Name three colours of the rainbow."
TIMEOUT_MS: Final = 30_000

expect.set_options(timeout=TIMEOUT_MS)

OpenPage = Callable[..., Page]


@contextmanager
def watched(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """Open a page inside the block; at its end the page must have logged no error and asked no other host."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, **options)
    page = context.new_page()
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text) if message.type in {"error", "warning"} else None)
    page.on("pageerror", lambda error: faults.append(str(error)))

    def check_host(asked: str) -> None:
        if urlsplit(asked).netloc != urlsplit(url).netloc:
            faults.append(f"asked {asked}")

    page.on("request", lambda request: check_host(request.url))
    page.on("websocket", lambda socket: faults.append(f"opened {socket.url}"))
    page.goto(url)
    yield page
    assert faults == []
    context.close()


@pytest.fixture
def page(browser: Browser, swarm: list[Daemon]) -> Iterator[Page]:
    with watched(browser, swarm[0].api_url) as page:
        expect(page.get_by_role("status").filter(has_text="live")).to_be_visible()
        yield page


def keep(page: Page, name: str) -> None:
    """Keep a screenshot of the window, and of the whole page."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
    page.screenshot(path=SCREENSHOTS / f"{name}-whole.png", full_page=True)


def panel(page: Page, name: str) -> Locator:
    return page.get_by_role("region", name=name, exact=True)


def ask(page: Page, question: str, tokens: int = 24) -> None:
    page.locator("summary", has_text="Options").click()
    page.get_by_label("Longest answer").fill(str(tokens))
    page.get_by_label("Temperature").fill("0")
    page.locator("summary", has_text="Options").click()
    page.get_by_label("Message").fill(question)
    page.get_by_role("button", name="Send").click()


def test_shows_three_peers_and_their_blocks(page: Page, swarm: list[Daemon]) -> None:
    rows = page.get_by_role("region", name="Table of peers").locator("tbody tr")
    expect(rows).to_have_count(3)
    for daemon, blocks in zip(swarm, ("0-10", "10-20", "20-30"), strict=True):
        row = rows.filter(has_text=daemon.peer_id[-6:])
        expect(row).to_contain_text(blocks)
        if daemon is not swarm[0]:
            expect(row).to_contain_text("ms")
    assert page.locator("#map .peer").count() == 3
    assert page.locator("#map .link").count() >= 2
    description = page.locator("#map-description").text_content() or ""
    assert description.startswith("3 peers")
    model = panel(page, "Models").locator(".model").first
    expect(model).to_contain_text(MODEL)
    expect(model).to_contain_text("complete")
    expect(model).to_contain_text("30 blocks, 1 peer each")
    assert model.locator(".blocks rect").count() == 30


def test_streams_answer_and_shows_job_on_its_way(page: Page) -> None:
    ask(page, QUESTION, tokens=96)
    answer = page.locator(".turn.assistant")
    expect(answer.locator(".said")).not_to_be_empty()
    running = panel(page, "Jobs").locator("tbody tr.running")
    expect(running).to_contain_text("running")
    expect(page.locator("#map .packet")).to_have_count(1)
    expect(page.locator("#map .link.active").first).to_be_attached()
    before = page.locator("#map .packet").get_attribute("cx")
    expect(page.locator("#map .packet")).not_to_have_attribute("cx", before or "")
    keep(page, "light")
    expect(answer.locator(".cost")).to_contain_text("3 stages")
    expect(answer.locator(".cost")).to_contain_text("tokens/s")
    done = panel(page, "Jobs").locator("tbody tr").first
    expect(done).to_contain_text("done")
    expect(done.locator(".stage")).to_have_count(3)
    assert "compute" in (done.locator(".stage").first.get_attribute("title") or "")
    votes = panel(page, "Predictions and votes")
    expect(votes).to_contain_text("✓ agreed")
    expect(votes).to_contain_text("3 votes")
    expect(votes).to_contain_text("Measured ÷ predicted")
    expect(panel(page, "Learning").locator(".chart circle").first).to_be_attached()


def test_stop_ends_job_and_retry_asks_again(page: Page, swarm: list[Daemon]) -> None:
    ask(page, "Write a long story about a lighthouse.", tokens=400)
    expect(page.locator(".turn.assistant .said")).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".turn.assistant .cost")).to_contain_text("stopped")
    expect(panel(page, "Jobs").locator("tbody tr").first).to_contain_text("cancelled")
    assert httpx.get(f"{swarm[0].api_url}/swarm/status", timeout=30).json()["jobs"]["running"] == 0
    page.get_by_label("Longest answer").evaluate("input => { input.value = 8; }")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".turn.assistant .cost")).to_contain_text("3 stages")
    expect(page.locator(".turn")).to_have_count(2)


def test_works_by_keyboard_alone(page: Page) -> None:
    keyboard = page.keyboard

    def tab_to(name: str) -> None:
        for _ in range(60):
            keyboard.press("Tab")
            focused = page.evaluate("() => document.activeElement.ariaLabel || document.activeElement.textContent")
            if focused.strip().startswith(name):
                outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", f"nobody sees that {name!r} has the focus"
                return
        raise AssertionError(f"{name!r} is not reached by the Tab key")

    keyboard.press("Tab")
    keyboard.press("Enter")  # the link that skips to the chat
    keyboard.type("Say hello.")
    keyboard.press("Enter")
    expect(page.locator(".turn.assistant .cost")).to_contain_text("token")
    keyboard.press("Escape")
    expect(page.locator(".turn.assistant .cost")).to_contain_text("token")
    tab_to("Add a node")
    keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Add a node")
    expect(dialog).to_contain_text("--bootstrap")
    keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    tab_to("Show the votes for job")
    keyboard.press("Enter")
    expect(page.locator("#job-table tr.selected")).to_have_count(1)


def test_copies_command_with_which_another_node_joins(browser: Browser, swarm: list[Daemon]) -> None:
    allowed = ["clipboard-read", "clipboard-write"]
    with watched(browser, swarm[0].api_url, permissions=allowed) as page:
        page.get_by_role("button", name="Add a node").click()
        copy = page.get_by_role("dialog", name="Add a node").locator(".command button").first
        expect(copy).to_be_focused()
        copy.click()
        expect(copy).to_have_accessible_name("Copied")
        copied = page.evaluate("() => navigator.clipboard.readText()")
        assert f"--bootstrap {swarm[0].multiaddr}" in copied
        assert f"--serve {MODEL}" in copied


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_has_names_and_contrast_in_both_schemes(browser: Browser, swarm: list[Daemon], scheme: Any) -> None:
    with watched(browser, swarm[0].api_url, color_scheme=scheme, reduced_motion="reduce") as page:
        expect(page.locator("#job-table tbody tr").first).to_be_visible()
        if scheme == "dark":
            ask(page, QUESTION)
            expect(page.locator(".turn.assistant .cost")).to_contain_text("3 stages")
            keep(page, "dark")
        expect(page.locator("#votes-body table")).to_be_visible()
        assert page.evaluate(NAMES) == []
        assert page.evaluate(CONTRAST) == []
        ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        page.get_by_role("button", name="Theme").click()
        page.get_by_role("button", name="Theme: light").click()
        page.get_by_role("button", name="Theme: dark").click()
        assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == ground, "the system's again"
        assert page.locator("#map .packet").count() == 0


def test_fits_a_phone(browser: Browser, swarm: list[Daemon]) -> None:
    with watched(browser, swarm[0].api_url) as page:
        page.set_viewport_size({"width": 390, "height": 844})
        expect(page.locator("#job-table tbody tr").first).to_be_attached()
        keep(page, "phone")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390


def test_asks_for_api_key_and_keeps_it_in_the_tab(browser: Browser, swarm: list[Daemon]) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(swarm[1].api_url)
    dialog = page.get_by_role("dialog", name="API key")
    for key in ("wrong", API_KEY):
        dialog.get_by_label("Key").fill(key)
        dialog.get_by_role("button", name="Continue").click()
        if key == "wrong":
            expect(dialog).to_contain_text("does not know this key")
    expect(page.locator("#peers tbody tr")).to_have_count(3)
    page.reload()
    expect(page.locator("#peers tbody tr")).to_have_count(3)
    assert page.evaluate("() => localStorage.length") == 0
    assert context.cookies() == []
    context.close()


def test_survives_the_death_of_a_peer(page: Page, swarm: list[Daemon]) -> None:
    expect(page.locator("#map .peer")).to_have_count(3)
    swarm[2].kill()
    expect(page.locator("#map .peer.lost")).to_have_count(1)
    expect(page.locator("#peers tbody tr")).to_have_count(2)
    models = panel(page, "Models").locator(".model").first
    expect(models).to_contain_text("incomplete")
    expect(models).to_contain_text("Blocks 20-30 are missing")
    expect(models.locator(".command code")).to_contain_text(f"--serve {MODEL}:20-30")
    assert models.locator(".blocks .cover-0").count() == 10
    expect(page.get_by_label("Model", exact=True)).to_have_text("no complete model")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    keep(page, "peer-lost")
    expect(page.locator("#map .peer")).to_have_count(2)
    expect(page.get_by_role("status").filter(has_text="live")).to_be_visible()
