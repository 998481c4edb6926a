"""The page at `/` in a real browser, over a swarm of three real daemons.

Screenshots are in out/screenshots.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser.browsing import ask_briefly, keep, panel, watched
from tests.browser.conftest import API_KEY, MODEL, Daemon

CONTRAST: Final = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8").partition("\n")[2]
NAMES: Final = (Path(__file__).parent / "names.js").read_text(encoding="utf-8").partition("\n")[2]
QUESTION: Final = "Name three colours of the rainbow."


@pytest.fixture
def page(browser: Browser, swarm: list[Daemon]) -> Iterator[Page]:
    with watched(browser, swarm[0].api_url) as page:
        expect(page.get_by_role("status").filter(has_text="live")).to_be_visible()
        yield page


@pytest.fixture(scope="module")
def done_job(swarm: list[Daemon]) -> str:
    """A job that is done: its id."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, "metaswarm": {}}
    answer = httpx.post(f"{swarm[0].api_url}/v1/chat/completions", json=body, timeout=60)
    return str(answer.raise_for_status().json()["metaswarm"]["job_id"])


def row_of(page: Page, job_id: str) -> Locator:
    """Return the row of a job."""
    return page.locator("#job-table tbody tr").filter(has_text=job_id[:8])


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
    ask_briefly(page, QUESTION, tokens=96)
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
    ask_briefly(page, "Write a long story about a lighthouse.", tokens=400)
    expect(page.locator(".turn.assistant .said")).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".turn.assistant .cost")).to_contain_text("stopped")
    expect(panel(page, "Jobs").locator("tbody tr").first).to_contain_text("cancelled")
    assert httpx.get(f"{swarm[0].api_url}/swarm/status", timeout=30).json()["jobs"]["running"] == 0
    page.get_by_label("Longest answer").evaluate("input => { input.value = 8; }")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".turn.assistant .cost")).to_contain_text("3 stages")
    expect(page.locator(".turn")).to_have_count(2)


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
def test_has_names_and_contrast_in_both_schemes(
    browser: Browser, swarm: list[Daemon], done_job: str, scheme: Any
) -> None:
    def ground(page: Page) -> str:
        return str(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))

    with watched(browser, swarm[0].api_url, color_scheme=scheme, reduced_motion="reduce") as page:
        expect(row_of(page, done_job)).to_contain_text("done")
        if scheme == "dark":
            ask_briefly(page, QUESTION)
            expect(page.locator(".turn.assistant .cost")).to_contain_text("3 stages")
            keep(page, "dark")
        expect(page.locator("#votes-body table")).to_be_visible()
        assert page.evaluate(NAMES) == []
        assert page.evaluate(CONTRAST) == []
        theme_button = page.get_by_role("button", name="Theme")
        grounds = [ground(page)]
        for theme in ("light", "dark", "system"):
            theme_button.click()
            expect(theme_button).to_have_text(f"Theme: {theme}")
            grounds.append(ground(page))
        system, light, dark, again = grounds
        assert light != dark
        assert system == again == {"light": light, "dark": dark}[scheme]


def test_fits_a_phone(browser: Browser, swarm: list[Daemon], done_job: str) -> None:
    with watched(browser, swarm[0].api_url) as page:
        page.set_viewport_size({"width": 390, "height": 844})
        expect(row_of(page, done_job)).to_contain_text("done")
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
