"""The page for screen readers, in both colour schemes, on a small screen, and under its own security policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.api.conftest import serving
from tests.browser.conftest import PHONE, Problems, Tiny, require
from tests.browser.test_playground import MakeApp, OpenPage, generate, tokens

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser


def fresh(_: Page) -> None:
    """As it is opened."""


def generated(page: Page) -> None:
    generate(page)
    tokens(page, "aligned").nth(2).hover()


def by_kl(page: Page) -> None:
    generate(page)
    page.get_by_label("Colour by").select_option("kl")
    page.get_by_text("As a table").click()


def everything_open(page: Page) -> None:
    page.get_by_text("When control acts").click()
    page.get_by_label("Shape").select_option("cosine")
    page.get_by_label("Kind of objective").select_option("floor")
    page.get_by_role("checkbox", name="plain").check()
    page.get_by_label("What to do with plain").select_option("keep")
    page.get_by_role("button", name="API key").click()
    page.get_by_role("radio", name="Python").check(force=True)


def failed(page: Page) -> None:
    page.get_by_label("Max tokens").fill("0")
    generate(page, status="Failed")


STATES = [fresh, generated, by_kl, everything_open, failed]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_axe_finds_nothing_in_either_colour_scheme(
    tiny: Tiny, open_page: OpenPage, problems: Problems, scheme: str, state: Callable[[Any], None]
) -> None:
    axe = require("axe_playwright_python.sync_playwright").Axe()
    problems.are_errors_expected = state is failed
    page = open_page(tiny.url, color_scheme=scheme)
    state(page)
    results = axe.run(page)
    assert results.violations_count == 0, results.generate_report()
    # What axe could not decide about contrast is no finding; nothing is left undecided but where it says why.
    assert {rule["id"] for rule in results.response["passes"]} >= {"color-contrast", "label", "button-name"}


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_nothing_is_wider_than_a_phone_of_320_pixels(
    tiny: Tiny, open_page: OpenPage, problems: Problems, state: Callable[[Any], None]
) -> None:
    problems.are_errors_expected = state is failed
    page = open_page(tiny.url, viewport=PHONE, has_touch=True, is_mobile=True)
    state(page)
    assert page.evaluate("document.scrollingElement.scrollWidth") == 320
    outside = page.evaluate(
        """() => [...document.querySelectorAll("main *, header *")]
          .filter(element => !element.closest("pre, .scroll, .visually-hidden") && !element.matches(".visually-hidden"))
          .filter(element => element.getClientRects().length && element.getBoundingClientRect().right > 320.5)
          .map(element => element.outerHTML.slice(0, 80))"""
    )
    assert outside == []


def test_a_tap_on_a_token_shows_its_trace_inside_the_screen(tiny: Tiny, open_page: OpenPage) -> None:
    page = open_page(tiny.url, viewport=PHONE, has_touch=True, is_mobile=True)
    generate(page)
    tokens(page, "aligned").nth(5).tap()
    card = page.get_by_role("tooltip").bounding_box()
    assert card is not None
    assert card["x"] >= 0
    assert card["x"] + card["width"] <= 320


def test_text_has_good_contrast_on_every_tint(tiny: Tiny, open_page: OpenPage) -> None:
    """WCAG's ratio of the text's colour to the strongest tint of either hue, which a run may not happen to show."""
    for scheme in ("light", "dark"):
        page = open_page(tiny.url, color_scheme=scheme)
        generate(page)
        ratios = tokens(page, "aligned").first.evaluate(
            """token => ["low", "high"].map(tone => {
              token.dataset.tone = tone;
              token.style.setProperty("--tint", "50%");
              const parsed = text => text.startsWith("color(") ? text.match(/[\\d.]+/g).map(Number)
                : text.match(/[\\d.]+/g).map(part => part / 255);
              const luminance = colour => parsed(colour).slice(0, 3)
                .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
                .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
              const style = getComputedStyle(token);
              const [a, b] = [luminance(style.color), luminance(style.backgroundColor)].sort((x, y) => y - x);
              return (a + 0.05) / (b + 0.05);
            })"""
        )
        assert min(ratios) >= 4.5, (scheme, ratios)


def test_the_policy_stops_what_is_inline_or_made_of_strings(
    make_app: MakeApp, open_page: OpenPage, problems: Problems
) -> None:
    with serving(make_app()) as url:
        page = open_page(url)
        stopped = page.evaluate(
            """async () => {
              const violated = [];
              document.addEventListener("securitypolicyviolation", event => violated.push(event.effectiveDirective));
              const blocked = attempt => { try { attempt(); } catch { violated.push("threw"); } };
              blocked(() => { document.body.innerHTML = "<p>markup</p>"; });
              blocked(() => { setTimeout("window.wasRun = true"); });
              const script = document.createElement("script");
              blocked(() => { script.textContent = "window.wasRun = true"; document.body.append(script); });
              document.body.setAttribute("style", "color: red");
              const image = document.body.appendChild(document.createElement("img"));
              image.src = "http://127.0.0.1:1/icon.png";
              await fetch("http://127.0.0.1:1/").catch(() => {});
              await new Promise(resolve => setTimeout(resolve, 100));
              return [window.wasRun ?? false, violated];
            }"""
        )
    assert stopped[0] is False
    assert {"style-src-attr", "connect-src", "img-src", "require-trusted-types-for"} <= set(stopped[1])
    assert stopped[1].count("threw") == 3
    # Provoked on purpose; every other test holds that there are none.
    assert problems.complaints
    problems.complaints.clear()
    problems.foreign.clear()
