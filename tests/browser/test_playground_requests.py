"""The requests that the page makes of its form, and that what it gives to copy sends the very same."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.conftest import Tiny
from tests.browser.test_playground import OpenPage, generate, posted, shown_text

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
HOSTILE = "It's \"quoted\", $HOME `id` \\ \\n 100%\n{new} line\té 漢 🎉 </script> '"


def copied(page: Page, language: str) -> str:
    page.get_by_role("radio", name=language).check(force=True)
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("status").filter(has_text="Copied.").wait_for()
    return page.evaluate("navigator.clipboard.readText()")


@pytest.mark.parametrize("mode", ["Chat", "Completion"])
def test_what_is_copied_sends_the_request_that_was_sent(tiny: Tiny, open_page: OpenPage, mode: str) -> None:
    page = open_page(tiny.url, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("radio", name=mode).check(force=True)
    page.get_by_label("User message" if mode == "Chat" else "Text to continue").fill(HOSTILE)
    page.get_by_label("Max tokens").fill("12")
    if mode == "Chat":
        page.get_by_label("System message").fill(HOSTILE[::-1])
    generate(page)
    sent = posted(tiny)["aligned"]

    curl = copied(page, "curl")
    command, _, url, *options = shlex.split(curl.replace("\\\n", " "))
    assert command == "curl"
    assert json.loads(options[options.index("-d") + 1]) == sent
    if shutil.which("curl"):
        done = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.rstrip().endswith("data: [DONE]")
        assert tiny.bodies[-1] == (url.removeprefix(tiny.url), sent)

    python = copied(page, "Python")
    done = subprocess.run(
        [sys.executable, "-c", python],
        capture_output=True, check=True, timeout=100, env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert tiny.bodies[-1] == (url.removeprefix(tiny.url), sent)
    assert done.stdout.decode() == shown_text(page, "aligned")


def check(page: Page, *heads: str) -> None:
    for head in heads:
        page.get_by_role("checkbox", name=head).check()


def set_slider(page: Page, name: str, value: float) -> None:
    page.get_by_role("slider", name=name).fill(str(value))


def worst_case(page: Page) -> None:
    check(page, "plain")
    page.get_by_label("Kind of objective").select_option("worst_case")


def target(page: Page) -> None:
    page.get_by_label("Kind of objective").select_option("target")
    set_slider(page, "Target of positive", 1.3)


def floor(page: Page) -> None:
    page.get_by_label("Kind of objective").select_option("floor")
    set_slider(page, "Weight of positive", -0.5)
    check(page, "plain")
    page.get_by_label("What to do with plain").select_option("keep")
    set_slider(page, "Floor of plain", 0.5)


def open_advanced(page: Page) -> None:
    page.get_by_text("When control acts").click()


def gate(page: Page) -> None:
    open_advanced(page)
    page.locator("#gate-head").select_option("plain")
    page.get_by_label("Act when").select_option("above")
    page.get_by_label("Level").fill("-0.25")
    page.get_by_label("Hysteresis").fill("0.1")


def window_and_schedule(page: Page) -> None:
    open_advanced(page)
    page.get_by_label("Up to, and without").fill("20")
    page.get_by_label("Shape").select_option("cosine")
    page.get_by_label("Over tokens").fill("32")
    page.get_by_label("Down to").fill("0.2")


def half_life(page: Page) -> None:
    open_advanced(page)
    page.get_by_label("Shape").select_option("exponential")
    page.get_by_label("Half-life").fill("12.5")


def guardrail(page: Page) -> None:
    open_advanced(page)
    page.locator("#guardrail-head").select_option("plain")
    page.get_by_label("Bound").fill("-3")


def instruction(page: Page) -> None:
    open_advanced(page)
    page.get_by_label("Instruction", exact=True).fill("Be glad.")
    page.get_by_label("Weight of the instruction").fill("1.5")


def instruction_alone(page: Page) -> None:
    page.get_by_role("checkbox", name="positive").uncheck()
    open_advanced(page)
    page.get_by_label("Instruction", exact=True).fill("Be glad.")


def limits(page: Page) -> None:
    open_advanced(page)
    page.get_by_label("Max KL per response").fill("4")
    page.get_by_label("Max shift").fill("0.5")
    page.get_by_label("Steps per token").fill("4")
    set_slider(page, "Max KL per token", 0.25)
    set_slider(page, "Step size", 0.4)


POSITIVE = {"type": "weighted_sum", "weights": {"positive": 1}}
BUDGET = {"step_size": 0.12, "max_kl": 0.3, "trace": True}
FORMS: list[tuple[Callable[[Any], None], dict[str, Any]]] = [
    (worst_case, {"objective": {"type": "worst_case", "weights": {"positive": 1, "plain": 1}}}),
    (target, {"objective": {"type": "target", "values": {"positive": 1.3}}}),
    (floor, {"objective": {"type": "floor", "weights": {"positive": -0.5}, "floors": {"plain": 0.5}}}),
    (gate, {"objective": POSITIVE, "gate": {"head": "plain", "above": -0.25, "hysteresis": 0.1}}),
    (
        window_and_schedule,
        {"objective": POSITIVE, "window": {"end": 20}, "schedule": {"type": "cosine", "tokens": 32, "to": 0.2}},
    ),
    (half_life, {"objective": POSITIVE, "schedule": {"type": "exponential", "half_life": 12.5}}),
    (guardrail, {"objective": POSITIVE, "stop_below": {"plain": -3}}),
    (instruction, {"objective": {"type": "instruction", "text": "Be glad.", "weight": 1.5, "beside": POSITIVE}}),
    (instruction_alone, {"objective": {"type": "instruction", "text": "Be glad."}}),
    (
        limits,
        {"objective": POSITIVE, "max_response_kl": 4, "max_shift": 0.5, "steps": 4, "max_kl": 0.25, "step_size": 0.4},
    ),
]


@pytest.mark.parametrize(("fill", "control"), FORMS, ids=lambda part: getattr(part, "__name__", ""))
def test_each_part_of_the_form_says_what_it_says_in_the_request(
    tiny: Tiny, open_page: OpenPage, fill: Callable[[Any], None], control: dict[str, Any]
) -> None:
    page = open_page(tiny.url)
    fill(page)
    page.get_by_label("Max tokens").fill("6")
    generate(page)
    bodies = posted(tiny)
    assert bodies["aligned"]["control"] == {**BUDGET, **control}
    unguarded = {name: value for name, value in control.items() if name != "stop_below"}
    assert bodies["base"]["control"] == {**BUDGET, **unguarded, "steps": 0}
    assert (bodies["aligned"]["max_tokens"], bodies["aligned"]["temperature"]) == (6, 0.7)


def test_without_a_head_both_sides_ask_for_no_control(tiny: Tiny, open_page: OpenPage) -> None:
    page = open_page(tiny.url)
    page.get_by_role("checkbox", name="positive").uncheck()
    page.get_by_label("Seed").fill("")
    page.get_by_label("Max tokens").fill("6")
    generate(page)
    for _, body in tiny.bodies[-2:]:
        assert body.keys() == {"model", "messages", "max_tokens", "temperature", "stream"}


def test_a_new_seed_is_another_and_goes_into_the_request(tiny: Tiny, open_page: OpenPage) -> None:
    page = open_page(tiny.url)
    before = page.get_by_label("Seed", exact=True).input_value()
    page.get_by_role("button", name="New seed").click()
    after = page.get_by_label("Seed", exact=True).input_value()
    assert after != before
    assert f'"seed": {after}' in page.locator("#code").inner_text()
