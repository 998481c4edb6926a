"""The page in a real browser over a node without a swarm, which says and lists what a test wants to see."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any, cast

import pytest
from playwright.sync_api import Browser, Page, expect

from node.api.interface import ModelDocument
from node.coordinator.chat import ChatFormat
from node.coordinator.recent_jobs import MAX_ENDED, JobState, RecentJob, RecentJobs
from node.coordinator.submission import Consensus, JobError, JobErrorCode, Vote
from protocol.identity import BlockRange, JobId, Stage
from tests.browser.browsing import ask, button, panel, watched
from tests.browser.conftest import API_KEY, until
from tests.unit.api.fakes import FASTER, JOB, MODEL, PEERS, FakeNode, make_result, serve_in_thread


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


def begin_job(node: FakeNode) -> RecentJob:
    """Let a job run over both peers."""
    job = node.recent_jobs.begin(JOB, MODEL, "tiny", is_trial=False, prompt_tokens=5)
    stages = (Stage(PEERS[0], BlockRange(0, 4)), Stage(PEERS[1], BlockRange(4, 8)))
    node.recent_jobs.progress(job, stages=stages, method=FASTER, tokens=3, replays=0)
    return job


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
    node.submitter.words, node.submitter.fail = (), JobError(JobErrorCode.FAILED, "no peer serves blocks 3-4")
    ask(page, "What is it?")
    expect(page.get_by_role("alert")).to_contain_text("no peer serves blocks 3-4")
    expect(page.locator("#chat-status")).to_have_text("The answer failed")
    node.submitter.words, node.submitter.fail = ("42",), None
    button(page, "Retry").click()
    expect(page.locator(".turn.assistant .said")).to_have_text("42")
    expect(page.locator("#chat-status")).to_contain_text("The answer has ended: ")
    expect(page.get_by_role("alert")).to_have_count(0)
    assert sent_messages(node) == [("user", "What is it?")]


def test_works_by_keyboard_alone(page: Page, node: FakeNode) -> None:
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

    node.submitter.hang = True
    begin_job(node)
    keyboard.press("Tab")
    keyboard.press("Enter")  # the link that skips to the chat
    keyboard.type("Say hello.")
    keyboard.press("Enter")
    expect(page.locator(".turn.assistant .said")).to_have_text("Hello, wörld")
    keyboard.press("Escape")
    expect(page.locator(".turn.assistant .cost")).to_contain_text("stopped")
    tab_to("Add a node")
    keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Add a node")
    expect(dialog).to_contain_text("--serve tiny")
    keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    tab_to("Show the votes for job")
    keyboard.press("Enter")
    expect(page.locator("#job-table tr.selected")).to_have_count(1)


def test_jobs_of_a_node_that_started_anew_replace_those_before(page: Page, node: FakeNode) -> None:
    """Also where the page was in the background meanwhile, and saw no connection end."""

    def set_hidden(value: bool) -> None:
        page.evaluate(
            """hidden => {
              Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
              document.dispatchEvent(new Event("visibilitychange"));
            }""",
            value,
        )

    begin_job(node)
    expect(panel(page, "Jobs").locator("tbody tr")).to_have_count(1)
    set_hidden(True)
    node.recent_jobs = RecentJobs()
    set_hidden(False)
    expect(panel(page, "Jobs").locator("tbody tr")).to_have_count(0)
    expect(page.locator("#no-jobs")).to_be_visible()
    expect(page.locator("#map .packet")).to_have_count(0)


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_tokens_go_round_the_route_unless_motion_is_reduced(browser: Browser, node: FakeNode, motion: Any) -> None:
    begin_job(node)
    with serve_in_thread(node) as url, watched(browser, url, reduced_motion=motion) as page:
        expect(page.locator("#map .link.active")).to_have_count(1)
        assert page.locator("#map .packet").count() == (1 if motion == "no-preference" else 0)


def test_key_that_no_header_can_carry_is_not_taken(browser: Browser, node: FakeNode) -> None:
    with serve_in_thread(node, api_key=API_KEY) as url, closing(browser.new_context()) as context:
        page = context.new_page()
        page.goto(url)
        dialog = page.get_by_role("dialog", name="API key")
        key = dialog.get_by_label("Key")
        for wrong in ("ключ", "open sesame"):
            key.fill(wrong)
            button(page, "Continue").click()
            expect(dialog).to_be_visible()
            assert key.evaluate("input => input.validationMessage") != ""
        page.keyboard.press("Escape")  # closes the dialog whatever it holds
        assert page.evaluate("() => sessionStorage.length") == 0
        key.fill(f" {API_KEY} ")
        button(page, "Continue").click()
        expect(page.locator("#peers tbody tr")).to_have_count(2)


def test_agreed_method_is_among_the_methods_shown(page: Page, node: FakeNode) -> None:
    methods = [f"engine=fused|top_k={number}" for number in range(20)]
    vote = Vote(peer=PEERS[0], scores={name: float(number) for number, name in enumerate(methods)})
    consensus = Consensus(votes=(vote,), agreed=methods[16], epoch=None, table_digest=None, weighed=False)
    job = begin_job(node)
    job.result = replace(make_result("", ()), consensus=consensus)
    node.recent_jobs.end(job, JobState.DONE)
    votes = panel(page, "Predictions and votes")
    expect(votes.locator("tbody tr.selected")).to_contain_text("top k 16 ✓ agreed")
    expect(votes.locator("tbody tr")).to_have_count(13)
    expect(votes).to_contain_text("and 7 more methods")


def test_epoch_is_divided_as_the_node_says(page: Page) -> None:
    chain = panel(page, "Consensus").locator(".chain")
    expect(chain).to_contain_text("measure, ")
    parts = chain.locator(".phases i")
    widths = parts.evaluate_all("parts => parts.map(part => [part.title, Number(getComputedStyle(part).flexGrow)])")
    assert widths == [["measure", 300], ["reveal", 150], ["propose", 150]]


def test_models_of_strangers_are_drawn_within_bounds(browser: Browser, node: FakeNode) -> None:
    tiny, _ = node.models()
    strange: dict[str, Any] = {**tiny, "name": "", "local": False, "complete": False, "block_count": 1024}
    uncovered = [(start, start + 1) for start in range(0, 1024, 2)]
    node.strangers = [
        cast("ModelDocument", {
            **strange, "model": f"{number:064x}", "coverage": [0, 1] * 512, "uncovered": uncovered
        })
        for number in range(64)
    ]  # fmt: skip
    asked: list[str] = []
    with serve_in_thread(node) as url, watched(browser, url) as page:
        page.on("request", lambda request: asked.append(request.url))
        models = panel(page, "Models")
        expect(models.locator(".model")).to_have_count(20)
        expect(models).to_contain_text("and 46 more models")
        expect(models.locator("h3").first).to_have_text("tiny")
        assert models.locator("*").count() < 6000
        command = models.locator(".model").nth(2).locator(".gap").first
        command.get_by_role("button", name="Show the command").click()
        expect(command.locator("code")).to_contain_text("metaswarm node --serve")
        assert [url for url in asked if "/swarm/join" in url] == asked[-1:]


def test_jobs_of_which_many_end_at_a_time_do_not_stay_running(page: Page, node: FakeNode) -> None:
    jobs = [
        node.recent_jobs.begin(JobId(f"{number:032x}"), MODEL, "tiny", is_trial=False, prompt_tokens=5)
        for number in range(2 * MAX_ENDED)
    ]
    for job in jobs:
        node.recent_jobs.progress(job, stages=(), method=FASTER, tokens=1, replays=0)
    rows = panel(page, "Jobs").locator("tbody tr")
    expect(rows.filter(has_text="running").first).to_be_visible()
    for job in jobs:
        node.recent_jobs.end(job, JobState.DONE)
    expect(rows.filter(has_text="done")).not_to_have_count(0)
    expect(rows.filter(has_text="running")).to_have_count(0)


def test_silent_node_is_said_not_to_answer(browser: Browser, node: FakeNode) -> None:
    with serve_in_thread(node) as url, closing(browser.new_context()) as context:
        page = context.new_page()
        page.clock.install()
        page.goto(url)
        connection = page.locator("#connection")
        expect(connection).to_have_text("live")

        def says(text: str) -> bool:
            page.clock.run_for(11_000)
            return connection.inner_text() == text

        node.is_silent = True
        until(lambda: says("the node does not answer: trying again"))
        node.is_silent = False
        until(lambda: says("live"))


def test_fault_of_the_page_is_not_said_to_be_the_node_s(browser: Browser, node: FakeNode) -> None:
    with serve_in_thread(node) as url, closing(browser.new_context()) as context:
        page = context.new_page()
        page.goto(url)
        connection = page.locator("#connection")
        expect(connection).to_have_text("live")
        node.strangers = [cast("ModelDocument", {"model": "ab" * 32})]
        expect(connection).to_have_text("this page cannot show what the node says: reload it")
        node.strangers = []
        expect(connection).to_have_text("live")


def test_page_of_another_release_is_loaded_anew(page: Page, node: FakeNode) -> None:
    page.evaluate("() => { window.isOld = true; }")
    node.agent = "metaswarm/0.2.0"
    expect(page.locator("#node")).to_contain_text("metaswarm/0.2.0")
    assert page.evaluate("() => window.isOld") is None


def test_page_of_another_release_keeps_its_conversation(browser: Browser, node: FakeNode) -> None:
    with serve_in_thread(node) as url, closing(browser.new_context()) as context:
        page = context.new_page()
        page.goto(url)
        ask(page, "Hi")
        expect(page.locator(".turn.assistant .cost")).to_contain_text("replaced")
        node.agent = "metaswarm/0.2.0"
        expect(page.locator("#connection")).to_have_text("this page cannot show what the node says: reload it")
        expect(page.locator(".turn")).to_have_count(2)
