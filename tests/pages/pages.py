"""The pages, and what their tests read from them."""

from __future__ import annotations

import re
from pathlib import Path

PAGES = sorted(
    [
        *Path().glob("*.md"),
        *Path("docs").glob("*.md"),
        Path("deploy/README.md"),
        Path("examples/README.md"),
        *Path("value_models/pretrained").glob("*/README.md"),
    ]
)


def text_of(page: str | Path) -> str:
    return Path(page).read_text()


def section(page: str, name: str) -> str | None:
    """What stands between its markers in a page's text, if it has them."""
    _, found, rest = page.partition(f"<!-- {name}: begin -->")
    return rest.split(f"<!-- {name}: end -->")[0].strip() if found else None


def blocks(page: str, language: str) -> list[str]:
    """The fenced code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def anchors(page: str) -> set[str]:
    """Of the headings, as code hosts make them."""
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"(?m)^#+ (.+)$", page)}


def curl_bodies(page: str) -> list[tuple[str, str]]:
    """(path, JSON) of each curl that a page shows."""
    return re.findall(r"(?s)curl (?:-s )?localhost:8000(/\S+)[^\n]* -d '(.*?)'\n", page)
