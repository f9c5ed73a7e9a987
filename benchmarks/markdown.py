"""Markdown: the rows of tables, and the sections of a page that results are rendered into.

A section is what stands between `<!-- name: begin -->` and `<!-- name: end -->`. Enter at `header`, `row` and
`with_range`, or at `replace_sections`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from server.errors import ConfigurationError
from value_models.files import write_text


def header(titles: Sequence[str]) -> list[str]:
    """The two lines that a table begins with."""
    return [row(titles), "|---" * len(titles) + "|"]


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def with_range(figure: Mapping[str, float], form: str = ".2f") -> str:
    """A mean and its interval, each number in this form."""
    return f"{figure['mean']:{form}} ({figure['low']:{form}} to {figure['high']:{form}})"


def replace_sections(page: Path, sections: Mapping[str, str]) -> None:
    """Put each body between its markers, where the page has them. Raises ConfigurationError when it has none."""
    text = page.read_text()
    found = [name for name in sections if _section(name).search(text)]
    if not found:
        known = ", ".join(f"`<!-- {name}: begin -->`" for name in sections)
        raise ConfigurationError(f"into: {page} has no section; there are {known}")
    for name in found:
        text = _section(name).sub(lambda _, body=sections[name]: f"{body}\n", text)
    write_text(page, text)


def _section(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- {name}: begin -->\n).*?(?=<!-- {name}: end -->)", re.DOTALL)
