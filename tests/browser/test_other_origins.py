"""Pages of other origins in Chromium: what they may ask of the server, and what the browser keeps from them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.api.conftest import eventually, serving
from tests.browser.test_playground import MakeApp

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser
KEY = "sk-test-0123456789"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "seed": 1}
ASK = """async ([url, body, options]) => {
  try {
    const response = await fetch(url, {method: "POST", body: JSON.stringify(body), ...options});
    const reader = response.body.getReader(), decoder = new TextDecoder(), parts = [];
    for (let part; !(part = await reader.read()).done; ) parts.push(decoder.decode(part.value, {stream: true}));
    const told = name => response.headers.get(name);
    return {status: response.status, id: told("x-request-id"), retry: told("retry-after"), parts};
  } catch (error) {
    return {error: error.name};
  }
}"""


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """A page that another server of this machine has sent, which is another origin."""
    (tmp_path / "index.html").write_text("<!doctype html><title>Another page</title>")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=tmp_path)) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        context = browser.new_context()
        opened = context.new_page()
        opened.goto(f"http://127.0.0.1:{other.server_port}/")
        yield opened
        context.close()
        other.shutdown()
        thread.join()


def ask(page: Page, url: str, body: dict[str, Any], **options: Any) -> dict[str, Any]:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", "X-Stainless-Lang": "js"}
    return page.evaluate(ASK, [f"{url}/v1/chat/completions", body, {"headers": headers, **options}])


def test_a_page_of_an_allowed_origin_reads_answers_streams_and_errors(page: Page, make_app: MakeApp) -> None:
    origin = page.evaluate("location.origin")
    app = make_app(settings={"allowed_origins": origin, "api_keys": KEY}, token_delay_s=0.02)
    with serving(app) as url:
        whole = ask(page, url, BODY)
        assert whole["status"] == 200
        assert whole["id"]
        streamed = ask(page, url, {**BODY, "stream": True})
        assert "".join(streamed["parts"]).endswith("data: [DONE]\n\n")
        assert len(streamed["parts"]) > 3
        refused = ask(page, url, {**BODY, "temperature": 9})
        assert (refused["status"], "temperature" in "".join(refused["parts"])) == (400, True)
        unknown = ask(page, url, BODY, headers={"Content-Type": "application/json"})
        assert (unknown["status"], bool(unknown["id"])) == (401, True)


def test_a_page_that_leaves_its_stream_frees_its_place(page: Page, make_app: MakeApp) -> None:
    app = make_app(settings={"allowed_origins": "*", "api_keys": KEY}, token_delay_s=0.02)
    leave = """async ([url, body, headers]) => {
      const left = new AbortController(), asked = {method: "POST", headers, signal: left.signal};
      const response = await fetch(url, {...asked, body: JSON.stringify(body)});
      await response.body.getReader().read();
      left.abort();
    }"""
    with serving(app) as url:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        body = {**BODY, "stream": True, "max_tokens": 4000}
        page.evaluate(leave, [f"{url}/v1/chat/completions", body, headers])
        assert eventually(lambda: app.state.engine.num_open == 0)


@pytest.mark.parametrize("allowed", [None, "https://app.example"])
def test_the_browser_keeps_answers_from_a_page_that_is_not_allowed(
    page: Page, make_app: MakeApp, allowed: str | None
) -> None:
    app = make_app(settings={"allowed_origins": allowed} if allowed else {})
    asked: list[object] = []
    app.state.engine.generate = asked.append
    with serving(app) as url:
        assert ask(page, url, BODY) == {"error": "TypeError"}
        assert ask(page, url, {**BODY, "stream": True}) == {"error": "TypeError"}
        # What a page may send without asking first has another type than JSON, and its answer has no body to read.
        assert ask(page, url, BODY, mode="no-cors", headers={}) == {"error": "TypeError"}
    assert not asked
