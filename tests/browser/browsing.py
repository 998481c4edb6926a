"""What tests of the page share: a page that may not log errors, its panels, its chat, and screenshots."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect

SCREENSHOTS: Final = Path(__file__).parents[2] / "out/screenshots"
TIMEOUT_MS: Final = 30_000

expect.set_options(timeout=TIMEOUT_MS)


@contextmanager
def watched(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """Open a page inside the block; at its end the page must have logged no error and asked no other host."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, **options)
    page = context.new_page()
    faults: list[str] = []

    def check_message(message: ConsoleMessage) -> None:
        # A browser logs every refused request by itself; that an answer failed is for the page to show.
        is_refusal = message.location["url"].endswith("/v1/chat/completions")
        if message.type in {"error", "warning"} and not is_refusal:
            faults.append(message.text)

    page.on("console", check_message)
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


def keep(page: Page, name: str) -> None:
    """Keep a screenshot of the window, and of the whole page."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
    page.screenshot(path=SCREENSHOTS / f"{name}-whole.png", full_page=True)


def panel(page: Page, name: str) -> Locator:
    """Return a panel by its heading."""
    return page.get_by_role("region", name=name, exact=True)


def button(page: Page, name: str) -> Locator:
    """Return a button by its name."""
    return page.get_by_role("button", name=name, exact=True)


def ask(page: Page, question: str) -> None:
    """Send a message in the chat."""
    page.get_by_role("textbox", name="Message").fill(question)
    button(page, "Send").click()


def ask_briefly(page: Page, question: str, tokens: int = 24) -> None:
    """Send a message whose answer is short, and the same every time."""
    page.locator("summary", has_text="Options").click()
    page.get_by_label("Longest answer").fill(str(tokens))
    page.get_by_label("Temperature").fill("0")
    page.locator("summary", has_text="Options").click()
    ask(page, question)
