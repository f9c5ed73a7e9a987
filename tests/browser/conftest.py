"""A real server on this machine and a real Chromium: what is missing is a skip with its reason, or a failure when told.

`make test-browser` sets RECONTROL_REQUIRE_BROWSER, so that nothing there is skipped for want of a browser.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.app import create_app
from server.engines.embedded.engine import EmbeddedEngine
from server.engines.embedded.model.loader import load_model
from server.settings import Settings
from server.telemetry import Telemetry
from tests.api.conftest import make_app, serving
from tests.browser import chromium
from tests.engines.test_contract import write_heads
from value_models.heads import ValueHead

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

__all__ = ["make_app"]  # a fixture here too

MANAGER = "k-manager-0123456789"
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 320, "height": 640}


def require(name: str) -> Any:
    """The imported module of an optional package."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        _skip_without(f"the Python package of {name}")


def _skip_without(what: str) -> NoReturn:
    reason = f"{what} is not installed; `make test-browser` installs it"
    if os.environ.get("RECONTROL_REQUIRE_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """No longer than a module: while playwright runs, so does an event loop, and none can be run beside it."""
    playwright = require("playwright.sync_api")
    if chromium.path() is None:
        _skip_without("the Debian package chromium")
    with playwright.sync_playwright() as running, chromium.launch(running) as started:
        yield started


@dataclass
class Problems:
    """What a page complained of. Chromium's own line about a response that is an error is expected where one is."""

    complaints: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    are_errors_expected: bool = False

    def ask(self, url: str, *, own: str) -> None:
        if not url.startswith(own):
            self.foreign.append(url)

    def add(self, text: str) -> None:
        if not (self.are_errors_expected and text.startswith("Failed to load resource")):
            self.complaints.append(text)


@pytest.fixture
def problems() -> Iterator[Problems]:
    found = Problems()
    yield found
    assert not found.complaints
    assert not found.foreign


@pytest.fixture
def open_page(browser: Browser, problems: Problems) -> Iterator[Callable[..., Page]]:
    """A function from a server's address to its page, once heads are shown; `options` are the context's."""
    with contextlib.ExitStack() as contexts:

        def opened(url: str, *, is_connected: bool = True, **options: Any) -> Page:
            context: BrowserContext = browser.new_context(
                **{"viewport": DESKTOP, "reduced_motion": "reduce", **options}
            )
            contexts.callback(context.close)
            context.set_default_timeout(20_000)
            page = context.new_page()
            page.on("console", lambda message: problems.add(message.text) if message.type != "log" else None)
            page.on("pageerror", lambda error: problems.add(str(error)))
            page.on("request", lambda request: problems.ask(request.url, own=url))
            page.goto(url)
            if is_connected:
                page.get_by_role("checkbox", name="positive").wait_for()
            return page

        yield opened


class Recorded:
    """Keeps the JSON bodies that reach the app."""

    def __init__(self, app: ASGIApp, bodies: list[Any]) -> None:
        self._app = app
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def recording() -> Message:
            message = await receive()
            if message.get("body"):
                self._bodies.append((scope["path"], json.loads(message["body"])))
            return message

        await self._app(scope, recording, send)


@dataclass
class Tiny:
    """A served tiny random model with the heads `positive` and `plain`, which MANAGER may train others for."""

    url: str
    app: FastAPI
    bodies: list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def tiny(
    browser: Browser,
    model_folder: Callable[..., Path],
    heads: dict[str, ValueHead],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Tiny]:
    """Asks for the browser so that nothing is loaded where there is none."""
    model = str(model_folder())
    heads_dir = tmp_path_factory.mktemp("heads")
    identity = load_model(model, device="cpu", dtype="float32").identity
    write_heads(heads_dir, {"positive": heads["good"], "plain": heads["line"]}, identity)
    settings = Settings(
        model=model,
        served_model_name="tiny",
        heads_dir=heads_dir,
        device="cpu",
        dtype="float32",
        max_batch_size=4,
        management_keys=SecretStr(MANAGER),
    )
    telemetry, bodies = Telemetry(), []
    app = create_app(settings, EmbeddedEngine(settings, observer=telemetry), telemetry)
    app.add_middleware(Recorded, bodies=bodies)
    with serving(app) as url:
        yield Tiny(url, app, bodies)
