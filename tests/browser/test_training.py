"""The page at /train in Chromium: from a sentence or pairs to a head under a slider."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.browser.conftest import MANAGER, PHONE, Problems, Tiny, require
from tests.browser.test_playground import OpenPage, shown_text, tokens

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
PAIRS = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(10)]


def opened(tiny: Tiny, open_page: OpenPage, *, key: str = MANAGER, **options: object) -> Page:
    page = open_page(tiny.url, is_connected=False, **options)
    page.goto(f"{tiny.url}/train")
    page.get_by_text("tiny", exact=True).wait_for()
    page.get_by_label("Management key", exact=True).fill(key)
    return page


def train(page: Page, name: str, *, pairs: str) -> None:
    page.get_by_role("radio", name="Pairs").check(force=True)
    page.get_by_label("Pairs, one JSON").fill(pairs)
    page.get_by_role("textbox", name="Name").fill(name)
    page.get_by_role("button", name="Train").click()


def say(page: Page, text: str) -> None:
    page.locator("#try-status, #status").filter(has_text=text).first.wait_for()


def test_pairs_become_a_head_whose_strength_slides(tiny: Tiny, open_page: OpenPage) -> None:
    page = opened(tiny, open_page)
    train(page, "by-pairs", pairs="\n".join(map(json.dumps, PAIRS)))
    say(page, "Trained by-pairs")
    say(page, "Done.")
    assert page.locator("#progress").evaluate("bar => bar.value") == 1
    assert "pairs in order" in page.locator("#figures").inner_text()
    base, strong = shown_text(page, "base"), shown_text(page, "aligned")
    tiny.bodies.clear()
    page.get_by_role("slider", name="Strength").fill("0")
    say(page, "Done.")
    tokens(page, "aligned").nth(2).wait_for()
    assert shown_text(page, "base") == shown_text(page, "aligned") == base != strong
    ((path, body),) = tiny.bodies
    assert path == "/v1/chat/completions"
    assert body["control"]["objective"] == {"type": "weighted_sum", "weights": {"by-pairs": 0}}


def test_a_sentence_becomes_a_head(tiny: Tiny, open_page: OpenPage) -> None:
    page = opened(tiny, open_page)
    page.get_by_role("textbox", name="Sentence").fill("Be kind.")
    page.get_by_label("Rather than").fill("Be rude.")
    page.get_by_label("Prompts to read it at").fill("60")
    page.get_by_role("textbox", name="Name").fill("kind")
    page.get_by_role("button", name="Train").click()
    say(page, "Trained kind")
    assert "closes of the instruction" in page.locator("#figures").inner_text()


@pytest.mark.parametrize(
    ("key", "pairs", "why"),
    [
        ("wrong", json.dumps(PAIRS[0]), "needs a management key"),
        (MANAGER, json.dumps(PAIRS[0]), "at least 8 are needed"),
        (MANAGER, "{}\n{torn", "Line 2 of the pairs is no JSON object"),
    ],
)
def test_what_is_wrong_is_told_where_it_is_looked_for(
    tiny: Tiny, open_page: OpenPage, problems: Problems, key: str, pairs: str, why: str
) -> None:
    problems.are_errors_expected = True
    page = opened(tiny, open_page, key=key)
    train(page, "other", pairs=pairs)
    page.locator("#job-problem").filter(has_text=why).wait_for()
    say(page, "Not started.")


def test_a_job_is_cancelled(tiny: Tiny, open_page: OpenPage) -> None:
    page = opened(tiny, open_page)
    page.get_by_role("textbox", name="Name").fill("given-up")
    page.get_by_role("button", name="Train").click()
    page.locator("#phase").filter(has_text="The model reads").wait_for()
    page.get_by_role("button", name="Cancel").click()
    say(page, "Cancelled.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_nothing_is_wider_than_a_phone(tiny: Tiny, open_page: OpenPage, scheme: str) -> None:
    axe = require("axe_playwright_python.sync_playwright").Axe()
    page = opened(tiny, open_page, color_scheme=scheme, viewport=PHONE, has_touch=True, is_mobile=True)
    assert page.evaluate("document.scrollingElement.scrollWidth") == 320
    train(page, f"for-{scheme}", pairs="\n".join(map(json.dumps, PAIRS)))
    say(page, "Done.")
    assert page.evaluate("document.scrollingElement.scrollWidth") == 320
    results = axe.run(page)
    assert results.violations_count == 0, results.generate_report()
