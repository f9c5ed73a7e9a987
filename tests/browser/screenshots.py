"""The pictures of the pages, from a running server: python -m tests.browser.screenshots http://127.0.0.1:8000"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.chromium import launch

FOLDER = Path(__file__).parent / "screenshots"
DESKTOP = {"viewport": {"width": 1280, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
GENERATED_MS = 120_000


def main(url: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as playwright, launch(playwright) as browser:
        light = generated(browser, url, color_scheme="light", **DESKTOP)
        hover(light)
        light.screenshot(path=FOLDER / "desktop-light.png")
        dark = generated(browser, url, color_scheme="dark", **DESKTOP)
        dark.get_by_label("Colour by").select_option("kl")
        hover(dark)
        dark.screenshot(path=FOLDER / "desktop-dark.png")
        phone = generated(browser, url, color_scheme="light", **PHONE)
        phone.screenshot(path=FOLDER / "phone.png")


def generated(browser: Browser, url: str, **options: Any) -> Page:
    """The page with both sides complete."""
    page = browser.new_context(reduced_motion="reduce", **options).new_page()
    page.goto(url)
    page.get_by_role("checkbox", name="positive").wait_for()
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("status").filter(has_text="Done").wait_for(timeout=GENERATED_MS)
    return page


def hover(page: Page) -> None:
    """Over the token that moved most."""
    tokens = page.locator("#aligned .token")
    tints = tokens.evaluate_all("all => all.map(token => parseFloat(token.style.getPropertyValue('--tint')))")
    tokens.nth(tints.index(max(tints))).hover()


if __name__ == "__main__":
    main(sys.argv[1])
