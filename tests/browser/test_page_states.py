"""The page in a real browser over a node without a swarm, which says and lists what a test wants to see."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from node.coordinator.submission import ChatFormat, JobError, JobErrorCode
from tests.browser.browsing import ask, button, watched
from tests.browser.conftest import until
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


def test_clear_during_an_answer_leaves_nothing_of_it(page: Page, node: FakeNode) -> None:
    node.submitter.words, node.submitter.hang = ("Once", " upon"), True
    ask(page, "Tell a story.")
    expect(page.locator(".turn.assistant .said")).to_have_text("Once upon")
    button(page, "Clear").click()
    until(node.submitter.left.is_set)  # the job is cancelled
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#chat-log .hint")).to_be_visible()
    node.submitter.words, node.submitter.hang = ("42",), False
    ask(page, "What is it?")
    expect(page.locator(".turn.assistant .said")).to_have_text("42")
    assert sent_messages(node) == [("user", "What is it?")]


def test_failed_answer_says_why_and_retry_asks_again(page: Page, node: FakeNode) -> None:
    node.submitter.words, node.submitter.fail = (), JobError(JobErrorCode.INTERNAL, "no peer serves blocks 3-4")
    ask(page, "What is it?")
    expect(page.get_by_role("alert")).to_contain_text("no peer serves blocks 3-4")
    expect(page.locator("#chat-status")).to_have_text("The answer failed")
    node.submitter.words, node.submitter.fail = ("42",), None
    button(page, "Retry").click()
    expect(page.locator(".turn.assistant .said")).to_have_text("42")
    expect(page.locator("#chat-status")).to_contain_text("The answer has ended: ")
    expect(page.get_by_role("alert")).to_have_count(0)
    assert sent_messages(node) == [("user", "What is it?")]
