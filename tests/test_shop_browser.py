"""The shop's page, in a real browser: for `make browser`, which sees to it that there is one."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import served

pytestmark = pytest.mark.browser

CHECKOUT = Path(__file__).parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium, whose home is a temporary folder."""
    from playwright.sync_api import sync_playwright  # not at the top: a group of its own

    home = str(tmp_path_factory.mktemp("home"))
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")}
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, NAMES)))
        environment: Any = inherited | {"HOME": home}
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS, env=environment)
        yield chromium
        chromium.close()


@pytest.fixture
def shop(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a shop with a fresh database."""
    from examples.shop.service import app

    monkeypatch.setenv("DATABASE_URL", sqlite_url)
    with served(app) as base:
        yield base


@pytest.fixture
def page(browser: Any, shop: str) -> Iterator[Any]:
    """The shop's page, opened; it has to do without an error, and without any other host."""
    with browser.new_context(viewport={"width": 1200, "height": 860}) as context:
        opened = context.new_page()
        opened.set_default_timeout(20_000)
        complaints: list[str] = []
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        elsewhere: list[str] = []
        opened.on("request", lambda request: elsewhere.append(request.url))
        opened.goto(shop)
        yield opened
        assert complaints == []
        assert [url for url in elsewhere if not url.startswith((shop, "data:"))] == []


def picture(page: Any, name: str) -> None:
    """Leave a screenshot in `.cache`."""
    page.screenshot(path=CHECKOUT / ".cache" / f"shop-{name}.png", full_page=True)


def test_a_person_buys_and_sees_who_holds_what(page: Any) -> None:
    from playwright.sync_api import expect

    lamps = page.get_by_role("row", name="Lamp").first
    expect(page.locator("#stock tr")).to_have_count(4)
    expect(lamps.locator("td").nth(2)).to_have_text("5")

    page.get_by_label("How many of Lamp").fill("2")
    page.get_by_role("button", name="Buy Lamp").click()

    expect(page.locator("#said")).to_have_text("Order 1: 2 × Lamp, 179.98.")
    expect(lamps.locator("td").nth(2)).to_have_text("3")
    expect(page.locator("#orders tr").first).to_have_text(re.compile(r"#1\s*Lamp\s*2\s*179\.98"))

    page.get_by_role("button", name="Hold one").click()

    holder = page.locator("#scopes tr", has_text="POST /hold")
    expect(holder).to_have_count(1)
    expect(holder).to_have_text(re.compile(r"reader.*service\.py:\d+ in hold.*\d s"))
    readers = page.locator("#pools tr", has_text="async reader").locator("td")
    expect(readers.nth(1)).to_contain_text("of 3")
    picture(page, "light")
    page.emulate_media(color_scheme="dark")
    picture(page, "dark")


def test_a_pool_that_is_empty_is_seen_to_be(page: Any) -> None:
    from playwright.sync_api import expect

    for _ in range(4):
        page.get_by_role("button", name="Hold one").click()

    readers = page.locator("#pools tr", has_text="async reader").locator("td")
    expect(readers.nth(1)).to_contain_text("3 of 3")
    expect(readers.nth(3)).to_have_text("2")  # the fourth, and the page itself for the stock
    page.get_by_role("button", name="Buy Lamp").click()
    expect(page.locator("#said")).to_contain_text("Order 1")  # writers have a pool of their own
    picture(page, "empty")


def test_with_the_keyboard_alone(page: Any) -> None:
    from playwright.sync_api import expect

    expect(page.locator("#stock tr")).to_have_count(4)
    page.get_by_label("How many of Teapot").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("26")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Buy Teapot")).to_be_focused()
    page.keyboard.press("Enter")

    expect(page.locator("#said")).to_have_text("Teapot: there are not so many left (409)")
    expect(page.locator("#product-3 td").nth(2)).to_have_text("25")
    with page.expect_response("**/stock"):  # the page is drawn anew, under the keyboard's focus
        pass
    expect(page.get_by_role("button", name="Buy Teapot")).to_be_focused()


def test_a_client_that_hangs_up_leaves_the_notebook_on_the_shelf(page: Any) -> None:
    from playwright.sync_api import expect

    page.get_by_role("button", name="hang up").click()

    holder = page.locator("#scopes tr", has_text="POST /orders")
    expect(holder).to_have_count(1)
    expect(page.locator("#said")).to_contain_text("The client has hung up")
    expect(holder).to_have_count(0)
    expect(page.locator("#product-1 td").nth(2)).to_have_text("100")
    expect(page.locator("#orders tr")).to_have_count(0)
