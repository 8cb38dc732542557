"""The pages are reachable, and what they link to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))]


def links(page):
    """Targets of a page's relative links, without their anchors."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [link.partition("#")[0] for link in found if "://" not in link and not link.startswith("#")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    """A link to a file of the repository names one that exists."""
    assert [link for link in links(page) if not (page.parent / link).exists()] == []


def test_index():
    """Every page of docs/ stands in its index, and the README leads there."""
    listed = {(ROOT / "docs" / link).resolve() for link in links(ROOT / "docs" / "README.md")}
    assert [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and page not in listed] == []
    assert "docs/README.md" in links(ROOT / "README.md")


def test_readme_is_short():
    """Details go to pages of their own."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
