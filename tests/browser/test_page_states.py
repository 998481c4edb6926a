"""The page in a real browser over a node without a swarm, which says and lists what a test wants to see."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from node.coordinator.submission import ChatFormat
from tests.browser.browsing import ask, watched
from tests.unit.api.fakes import FakeNode, serve_in_thread


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
def page(browser: Browser, node: FakeNode) -> Iterator[Page]:
    with serve_in_thread(node) as url, watched(browser, url) as page:
        expect(page.get_by_role("status").filter(has_text="live")).to_be_visible()
        yield page


def sent_messages(node: FakeNode) -> list[tuple[str, str]]:
    """Return role and text of each message of the last request."""
    return [(message.role, message.content) for message in node.submitter.requests[-1].messages or ()]


def test_reasoning_is_shown_apart_from_the_answer_and_not_sent_again(page: Page, node: FakeNode) -> None:
    node.submitter.chat_format = ChatFormat(reasons=True)
    node.submitter.words = ("<think>six", " by seven", "</think>", "The answer", " is 42.")
    ask(page, "What is it?")
    answer = page.locator(".turn.assistant")
    expect(answer.locator(".cost")).to_contain_text("replaced")
    expect(answer.locator("> .said")).to_have_text("The answer is 42.")
    expect(answer.locator("details .said")).to_have_text("six by seven")
    answer.locator("summary", has_text="Reasoning").click()
    expect(answer.locator("details .said")).to_be_visible()
    ask(page, "Why?")
    expect(page.locator(".turn.assistant .cost").nth(1)).to_contain_text("replaced")
    assert sent_messages(node) == [("user", "What is it?"), ("assistant", "The answer is 42."), ("user", "Why?")]
