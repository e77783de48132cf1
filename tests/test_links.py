"""The links of the pages lead somewhere: to files that exist, and to their headings."""

import re
from pathlib import Path

import pytest

from tests.helpers.processes import REPOSITORY

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *REPOSITORY.glob("docs/*.md")]


def without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings; settings.md has some of its own."""
    headings = re.findall(r"^#+ (.*)", without_code(page), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    own = re.findall(r'<a (?:id|name)="([^"]+)"', page.read_text())
    return {*own, *(heading.replace(" ", "-") for heading in words)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_or_a_heading(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)", re.sub(r"`[^`]*`", "", without_code(page)))
    for target in targets:
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
