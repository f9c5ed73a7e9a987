"""The documentation site builds without a warning, can be searched, and asks no other host for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
RESOURCE = re.compile(
    r"<(?:script|img|iframe)[^>]* src=\"(?:https?:)?//|<link[^>]* href=\"(?:https?:)?//|url\(['\"]?https?:"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` builds it, where a warning is an error."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "-b", "html", ".", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_and_the_docstrings_are_there(site: Path) -> None:
    pages = [path.stem for path in (ROOT / "docs").glob("*.md")]
    assert all((site / f"docs/{page}.html").exists() for page in pages)
    assert "LinearHead" in (site / "docs/reference.html").read_text()


def test_its_first_page_leads_to_the_contents(site: Path) -> None:
    assert "url=docs/index.html" in (site / "index.html").read_text()


def test_it_can_be_searched_without_a_server(site: Path) -> None:
    assert "guardrail" in (site / "searchindex.js").read_text()


def test_no_page_takes_fonts_scripts_or_pictures_from_elsewhere(site: Path) -> None:
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert len(files) > 20
    assert not [str(path) for path in files if RESOURCE.search(path.read_text())]
