"""The page at /: how it is served, and that it is whole, small in what it may do, and in the installed package."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.api import playground
from tests.api.conftest import serving

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "server" / "playground"
FILES = sorted(FOLDER.iterdir())
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
KEY = "k-first-0123456789"
CLOSED = (
    "http://testserver//",
    "/index.html",
    "/playground",
    "/playground/",
    "/playground/none.js",
    "/playground/main.js/",
    "/playground/../v1/models",
    "/v1/models",
    "/v1/heads",
    "/metrics",
    "/openapi.json",
)


PAGES = {"index.html": "/", "train.html": "/train"}


def path_of(file: Path) -> str:
    return PAGES.get(file.name, f"/playground/{file.name}")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_is_served_with_its_type_and_under_the_policy(client: TestClient, file: Path) -> None:
    response = client.get(path_of(file))
    assert response.status_code == 200
    assert response.content == file.read_bytes()
    headers = response.headers
    assert headers["content-type"] == TYPES[file.suffix]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy.pop("default-src") == "'none'"
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert set(policy.values()) == {"'self'", "'none'"}
    assert {name for name, value in policy.items() if value == "'self'"} == {
        "script-src", "style-src", "img-src", "connect-src",
    }  # fmt: skip
    assert "set-cookie" not in headers


def test_a_browser_that_has_a_file_is_told_so_until_it_changes(client: TestClient) -> None:
    first = client.get("/")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    assert client.get("/", headers={"if-none-match": '"older"'}).status_code == 200


def test_the_page_and_its_assets_are_public_and_nothing_beside_them_is(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(settings={"api_keys": KEY})) as client:
        for file in FILES:
            assert client.get(path_of(file)).status_code == 200
        for closed in CLOSED:
            assert client.get(closed).status_code == 401, closed
        assert client.post("/v1/completions", json={"model": "fake", "prompt": "hi"}).status_code == 401
        assert client.post("/").status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        "/playground/../settings.py",
        "/playground/..%2fsettings.py",
        "/playground/%2e%2e/settings.py",
        "/playground/..%5csettings.py",
        "/playground//etc/passwd",
        "/playground/%2fetc%2fpasswd",
        "/playground/main.js%00.html",
        "/playground/index.html",
        "/playground/.",
    ],
)
def test_no_path_leads_to_another_file(make_app: Callable[..., FastAPI], path: str) -> None:
    """Over a socket and raw, since clients tidy such paths up."""
    with serving(make_app()) as url, httpx.Client() as client:
        request = client.build_request("GET", url)
        request.extensions["target"] = path.encode()
        response = client.send(request)
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/json"


def test_a_server_can_do_without_the_page(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(settings={"playground": False})) as client:
        assert [client.get(path).status_code for path in sorted(playground.PATHS)] == [404] * len(playground.PATHS)
    with TestClient(make_app(settings={"playground": False, "api_keys": KEY})) as client:
        assert client.get("/").status_code == 401


def test_the_page_is_no_part_of_the_api_that_is_described(client: TestClient) -> None:
    assert not {"/", "/train", "/playground/{name}"} & set(client.get("/openapi.json").json()["paths"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_file_names_another_host_or_holds_anything_inline(file: Path) -> None:
    text = file.read_text()
    addresses = set(re.findall(r"(?:\w+:)?//[\w.-]+\.\w+[^\s\"')]*", text))
    # The names of SVG's elements are an address that nobody asks.
    assert {address for address in addresses if "www.w3.org/2000/svg" not in address} == set()
    if file.suffix == ".html":
        assert not re.search(r"\son\w+\s*=|\sstyle\s*=|<style|<script(?![^>]*\ssrc=)|javascript:", text)
    if file.suffix == ".js":
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
        assert not re.search(r"localStorage|sessionStorage|document\.cookie|indexedDB", text)
    if file.suffix == ".css":
        assert not re.search(r"@import|url\(", text)


def asked_by(page: str) -> set[str]:
    """The files that a page asks for, and those that its scripts do."""
    asked, found = set[str](), set(re.findall(r'(?:src|href)="playground/([\w.-]+)"', (FOLDER / page).read_text()))
    while new := found - asked:
        asked |= new
        scripts = [(FOLDER / name).read_text() for name in new if name.endswith(".js")]
        found = {name for script in scripts for name in re.findall(r'from "\./([\w.-]+)"', script)}
    return asked


def test_what_a_file_asks_for_is_there() -> None:
    asked = set[str]().union(*map(asked_by, PAGES))
    assert asked == {file.name for file in FILES} - set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_an_id_that_a_script_asks_for_is_on_its_page(page: str) -> None:
    text = (FOLDER / page).read_text()
    ids = re.findall(r'\bid="([\w-]+)"', text)
    assert len(ids) == len(set(ids))
    # What a shared module asks for where it is used; the pages use different parts of it.
    (script,) = re.findall(r'script type="module" src="playground/([\w.-]+)"', text)
    shared = set(re.findall(r'from "\./([\w.-]+)"', (FOLDER / script).read_text())) - {"heads.js"}
    asked = {name for file in [script, *shared]
             for name in re.findall(r'(?:byId|number)\("([\w-]+)"\)', (FOLDER / file).read_text())}  # fmt: skip
    assert len(asked) > 20
    assert asked <= set(ids)


def test_the_installed_package_has_every_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q"]
    steps = ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run([*command, *steps], cwd=ROOT, check=True, capture_output=True)
    built = tmp_path / "lib" / "server" / "playground"
    assert sorted(path.name for path in built.iterdir()) == [file.name for file in FILES]
