"""The page in a real browser while a peer dies, in a swarm of its own."""

from playwright.sync_api import Browser, expect

from tests.browser.browsing import button, keep, panel, watched
from tests.browser.conftest import MODEL, running_swarm


def test_survives_the_death_of_a_peer(browser: Browser) -> None:
    with running_swarm("0-20", "20-30") as (first, second), watched(browser, first.api_url) as page:
        expect(page.locator("#map .peer")).to_have_count(2)
        expect(button(page, "Send")).to_be_enabled()
        second.kill()
        expect(page.locator("#map .peer.lost")).to_have_count(1)
        expect(page.locator("#peers tbody tr")).to_have_count(1)
        models = panel(page, "Models").locator(".model").first
        expect(models).to_contain_text("incomplete")
        expect(models).to_contain_text("Blocks 20-30 are missing")
        expect(models.locator(".command code")).to_contain_text(f"--serve {MODEL}:20-30")
        assert models.locator(".blocks .cover-0").count() == 10
        expect(page.get_by_label("Model", exact=True)).to_have_text("no complete model")
        expect(button(page, "Send")).to_be_disabled()
        keep(page, "peer-lost")
        expect(page.locator("#map .peer")).to_have_count(1)
        expect(page.get_by_role("status").filter(has_text="live")).to_be_visible()
