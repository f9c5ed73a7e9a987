"""The page at / in Chromium: what it generates, shows and tells."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI

from tests.api.conftest import eventually, serving
from tests.browser.conftest import Problems, Tiny

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = pytest.mark.browser
OpenPage = Callable[..., "Page"]
MakeApp = Callable[..., FastAPI]


def generate(page: Page, *, status: str = "Done") -> None:
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("status").filter(has_text=status).wait_for()


def tokens(page: Page, side: str) -> Locator:
    return page.locator(f"#{side} .token")


def shown_text(page: Page, side: str) -> str:
    return page.locator(f"#{side} .text").evaluate("element => element.textContent")


def tints(page: Page, side: str) -> list[tuple[str, float]]:
    return [
        (tone, strength)
        for tone, strength in tokens(page, side).evaluate_all(
            "all => all.map(token => [token.dataset.tone, parseFloat(token.style.getPropertyValue('--tint'))])"
        )
    ]


def posted(tiny: Tiny) -> dict[str, dict[str, Any]]:
    """The last two bodies by side: the base one is what takes no step."""
    return {"base" if body["control"].get("steps") == 0 else "aligned": body for _, body in tiny.bodies[-2:]}


def answer(url: str, body: dict[str, Any]) -> str:
    kind = "chat/completions" if "messages" in body else "completions"
    choice = httpx.post(f"{url}/v1/{kind}", json={**body, "stream": False}, timeout=60).json()["choices"][0]
    return choice["message"]["content"] if "messages" in body else choice["text"]


@pytest.mark.parametrize("mode", ["Chat", "Completion"])
def test_both_sides_show_what_the_server_answers_and_the_base_side_is_the_base_model(
    tiny: Tiny, open_page: OpenPage, mode: str
) -> None:
    page = open_page(tiny.url)
    page.get_by_role("radio", name=mode).check(force=True)
    page.get_by_label("User message" if mode == "Chat" else "Text to continue").fill("hello there")
    generate(page)
    bodies = posted(tiny)
    for side in ("base", "aligned"):
        assert shown_text(page, side) == answer(tiny.url, bodies[side])
    plain = {name: value for name, value in bodies["base"].items() if name != "control"}
    assert shown_text(page, "base") == answer(tiny.url, plain)
    assert shown_text(page, "base") != shown_text(page, "aligned")


def test_tokens_come_one_by_one_on_both_sides_and_their_speed_is_told(make_app: MakeApp, open_page: OpenPage) -> None:
    with serving(make_app(token_delay_s=0.05)) as url:
        page = open_page(url)
        page.get_by_role("button", name="Generate").click()
        for least in (3, 12):
            for side in ("base", "aligned"):
                tokens(page, side).nth(least).wait_for()
                assert least < tokens(page, side).count() < 64
        page.get_by_role("status").filter(has_text="Done: base 64 tokens, aligned 64 tokens.").wait_for()
        for side in ("base", "aligned"):
            (speed,) = re.findall(r"64 tokens · ([\d.]+) tokens/s", page.locator(f"#{side} .speed").inner_text())
            assert 0 < float(speed) <= 20


def test_tokens_are_coloured_by_the_value_or_the_divergence_that_the_server_reported(
    tiny: Tiny, open_page: OpenPage
) -> None:
    page = open_page(tiny.url)
    generate(page)
    body = posted(tiny)["aligned"]
    reply = httpx.post(f"{tiny.url}/v1/chat/completions", json={**body, "stream": False}, timeout=60).json()
    trace = reply["choices"][0]["control_trace"]
    by_value = tints(page, "aligned")
    values = [trace[int(i)]["value_after"]["positive"] for i in indices(page, "aligned")]
    # The head's rewards have mean 0.3 and deviation 2 (tests/conftest.py); a colour is full at 0.9 deviations.
    assert [tone for tone, _ in by_value] == ["low" if value < 0.3 else "high" for value in values]
    expected = [50 * min(abs(value - 0.3) / (0.9 * 2.0), 1) for value in values]
    assert [strength for _, strength in by_value] == pytest.approx(expected, abs=0.06)
    page.get_by_label("Colour by").select_option("kl")
    by_kl = tints(page, "aligned")
    expected = [50 * min(trace[int(i)]["kl"] / 0.3, 1) for i in indices(page, "aligned")]
    assert [strength for _, strength in by_kl] == pytest.approx(expected, abs=0.06)
    assert {strength for _, strength in tints(page, "base")} == {0}
    colours = tokens(page, "aligned").evaluate_all("all => all.map(token => getComputedStyle(token).backgroundColor)")
    assert len(set(colours)) > 5


def indices(page: Page, side: str) -> list[str]:
    return tokens(page, side).evaluate_all("all => all.map(token => token.dataset.index)")


def test_a_tokens_trace_is_shown_under_the_pointer_and_stays_while_it_is_read(tiny: Tiny, open_page: OpenPage) -> None:
    page = open_page(tiny.url)
    generate(page)
    card = page.get_by_role("tooltip")
    assert card.is_hidden()
    token = tokens(page, "aligned").nth(3)
    token.hover()
    text = card.inner_text()
    assert re.search(r"positive\s+−?\d+\.\d{3} → −?\d+\.\d{3}", text)
    assert re.search(r"KL\s+\d\.\d{3} nats", text)
    assert re.search(r"shift\s+\d\.\d{3}", text)
    assert token.get_attribute("aria-describedby") == "trace"
    card.hover()
    page.wait_for_timeout(300)
    assert card.is_visible()
    page.keyboard.press("Escape")
    assert card.is_hidden()
    assert token.get_attribute("aria-describedby") is None
    tokens(page, "base").nth(2).hover()
    assert "→" not in card.inner_text()
    page.mouse.move(5, 5)
    card.wait_for(state="hidden")


def test_a_pane_is_one_stop_and_the_arrows_go_through_its_tokens(tiny: Tiny, open_page: OpenPage) -> None:
    page = open_page(tiny.url)
    generate(page)
    assert page.locator("#aligned .token[tabindex='0']").count() == 1
    tokens(page, "aligned").first.focus()
    told = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home"):
        page.keyboard.press(key)
        focused = page.locator("#aligned .token:focus")
        assert focused.get_attribute("aria-describedby") == "trace"
        told.append((focused.get_attribute("data-index"), page.get_by_role("tooltip").inner_text()))
    all_indices = indices(page, "aligned")
    assert [index for index, _ in told] == [all_indices[i] for i in (1, 2, 1, -1, 0)]
    assert told[0][1] == told[2][1] != told[1][1]
    assert page.locator("#base .token.marked").get_attribute("data-index") == all_indices[0]
    page.keyboard.press("Tab")
    page.get_by_role("tooltip").wait_for(state="hidden")


def test_a_token_that_the_keyboard_scrolls_to_has_its_trace_beside_it(tiny: Tiny, open_page: OpenPage) -> None:
    page = open_page(tiny.url, viewport={"width": 340, "height": 400})
    generate(page)
    tokens(page, "aligned").first.focus()
    for key in ("End", "Home"):
        page.keyboard.press(key)
        page.wait_for_timeout(200)
        token, card = page.locator("#aligned .token:focus").bounding_box(), page.get_by_role("tooltip").bounding_box()
        assert token is not None
        assert card is not None
        gap = max(card["y"] - token["y"] - token["height"], token["y"] - card["y"] - card["height"])
        assert 0 <= token["y"] <= 400
        assert 0 <= gap <= 10


def test_the_chart_draws_both_sides_and_its_table_has_every_token(tiny: Tiny, open_page: OpenPage) -> None:
    page = open_page(tiny.url)
    generate(page)
    chart = page.locator("#chart svg")
    assert re.search(r"base: mean .*aligned, after the edit: mean", chart.get_attribute("aria-label") or "")
    points = {
        kind: (page.locator(f"#chart path.{kind}").get_attribute("d") or "").count("L")
        for kind in ("base", "before", "after")
    }
    counts = [int(count) for count in re.findall(r"\d+", page.get_by_role("status").inner_text())]
    assert list(points.values()) == [counts[0] - 1, counts[1] - 1, counts[1] - 1]
    page.get_by_text("As a table").click()
    page.locator("#table tbody tr").last.wait_for()
    assert page.locator("#table tbody tr").count() == max(counts)
    page.get_by_label("Colour by").select_option("kl")
    assert page.locator("#chart path").count() == 1
    assert page.locator("#chart .level").count() == 1


def test_everything_is_done_by_keyboard_alone(tiny: Tiny, open_page: OpenPage) -> None:
    page = open_page(tiny.url)

    def tab_to(selector: str) -> None:
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        pytest.fail(f"the tab key never reached {selector}")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the responses"
    tab_to("[name=mode]")
    page.keyboard.press("ArrowRight")
    tab_to("#prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type("typed")
    tab_to("#objective")
    page.keyboard.press("ArrowDown")
    tab_to("[data-head=plain] [type=checkbox]")
    page.keyboard.press("Space")
    tab_to("[data-head=plain] [type=range]")
    page.keyboard.press("ArrowRight")
    tab_to("#generate")
    page.keyboard.press("Enter")
    page.get_by_role("status").filter(has_text="Done").wait_for()
    body = posted(tiny)["aligned"]
    assert body["prompt"] == "typed"
    assert body["control"]["objective"] == {"type": "worst_case", "weights": {"plain": 1.1, "positive": 1}}
    tab_to("#aligned .token")
    assert page.get_by_role("tooltip").is_visible()
    tab_to("#copy")
    before = len(tiny.bodies)
    page.get_by_label("Text to continue").focus()
    page.keyboard.press("Control+Enter")
    assert eventually(lambda: len(tiny.bodies) == before + 2)
    page.get_by_role("status").filter(has_text="Done").wait_for()


def test_stop_frees_both_slots_and_keeps_what_came(make_app: MakeApp, open_page: OpenPage) -> None:
    app = make_app(token_delay_s=0.05)
    with serving(app) as url:
        page = open_page(url)
        page.get_by_label("Max tokens").fill("4000")
        page.get_by_role("button", name="Generate").click()
        tokens(page, "aligned").nth(4).wait_for()
        assert app.state.engine.num_open == 2
        page.get_by_role("button", name="Stop").click()
        assert eventually(lambda: app.state.engine.num_open == 0)
        page.get_by_role("status").filter(has_text="Stopped.").wait_for()
        count = tokens(page, "aligned").count()
        assert count >= 5
        assert "by you" in page.locator("#aligned .facts").inner_text()
        assert page.get_by_role("button", name="Stop").get_attribute("aria-disabled") == "true"
        page.wait_for_timeout(200)
        assert tokens(page, "aligned").count() == count


def test_generating_anew_ends_what_runs_and_shows_the_new_run_alone(make_app: MakeApp, open_page: OpenPage) -> None:
    app = make_app(token_delay_s=0.05)
    with serving(app) as url:
        page = open_page(url)
        page.get_by_label("Max tokens").fill("4000")
        page.get_by_role("button", name="Generate").click()
        tokens(page, "base").nth(2).wait_for()
        page.get_by_label("Max tokens").fill("3")
        generate(page)
        assert "Done: base 3 tokens, aligned 3 tokens." in page.get_by_role("status").inner_text()
        assert [tokens(page, side).count() for side in ("base", "aligned")] == [3, 3]
        assert eventually(lambda: app.state.engine.num_open == 0)


def test_an_error_body_is_shown_as_it_came(tiny: Tiny, open_page: OpenPage, problems: Problems) -> None:
    problems.are_errors_expected = True
    page = open_page(tiny.url)
    page.get_by_label("Max tokens").fill("0")
    generate(page, status="Failed")
    error = httpx.post(f"{tiny.url}/v1/chat/completions", json=tiny.bodies[-1][1]).json()["error"]
    for side in ("base", "aligned"):
        alert = page.locator(f"#{side}").get_by_role("alert")
        assert error["message"] in alert.inner_text()
        assert re.search(r"HTTP 400 · invalid_value · field max_tokens · request \w+", alert.inner_text())
    page.get_by_label("Max tokens").fill("4")
    generate(page)
    assert page.locator("#aligned").get_by_role("alert").is_hidden()


def test_an_error_in_mid_stream_leaves_what_came_before_it(make_app: MakeApp, open_page: OpenPage) -> None:
    with serving(make_app(fail_after=5)) as url:
        page = open_page(url)
        generate(page, status="Failed")
        assert tokens(page, "base").count() == 5
        assert "The fake engine failed as told." in page.locator("#base").get_by_role("alert").inner_text()


def test_a_server_that_has_gone_is_told_plainly(make_app: MakeApp, open_page: OpenPage, problems: Problems) -> None:
    problems.are_errors_expected = True
    with serving(make_app()) as url:
        page = open_page(url)
    generate(page, status="Failed")
    assert "The server cannot be reached" in page.locator("#base").get_by_role("alert").inner_text()


@pytest.mark.parametrize(
    ("status", "body"), [(200, "data: <b>proxy</b>\n\n"), (502, "<b>proxy</b>"), (502, '"<b>proxy</b>"')]
)
def test_an_answer_that_is_not_the_servers_is_told_plainly(
    make_app: MakeApp, open_page: OpenPage, problems: Problems, status: int, body: str
) -> None:
    problems.are_errors_expected = True
    with serving(make_app()) as url:
        page = open_page(url)
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=status, body=body))
        generate(page, status="Failed")
        assert "<b>proxy</b>" in page.locator("#aligned").get_by_role("alert").inner_text()


def test_a_key_is_asked_for_kept_in_memory_alone_and_never_written_out(
    make_app: MakeApp, open_page: OpenPage, problems: Problems
) -> None:
    problems.are_errors_expected = True
    with serving(make_app(settings={"api_keys": "k-secret-123"})) as url:
        page = open_page(url, is_connected=False)
        page.get_by_text("This server needs a key").wait_for()
        page.get_by_role("textbox", name="API key").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("does not open this path").wait_for()
        page.get_by_role("textbox", name="API key").fill("k-secret-123")
        page.get_by_role("button", name="Connect").click()
        page.get_by_role("checkbox", name="positive").wait_for()
        assert page.get_by_text("does not open this path").is_hidden()
        generate(page)
        for language in ("curl", "Python"):
            page.get_by_role("radio", name=language).check(force=True)
            assert "RECONTROL_API_KEY" in page.locator("#code").inner_text()
        assert "k-secret-123" not in page.content()
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        page.reload()
        page.get_by_text("This server needs a key").wait_for()


def test_a_pinned_head_cannot_be_set_here(make_app: MakeApp, open_page: OpenPage) -> None:
    pinned = '{"objective": {"weights": {"plain": 1.0}}}'
    with serving(make_app(settings={"pinned_control": pinned})) as url:
        page = open_page(url)
        assert page.get_by_role("checkbox", name="plain").is_disabled()
        assert page.get_by_role("slider", name="Weight of plain").is_disabled()
        generate(page)


def test_a_server_without_heads_shows_two_equal_sides(make_app: MakeApp, open_page: OpenPage) -> None:
    with serving(make_app(heads=())) as url:
        page = open_page(url, is_connected=False)
        page.get_by_text("This server has no value heads").wait_for()
        generate(page)
        assert shown_text(page, "base") == shown_text(page, "aligned") != ""
