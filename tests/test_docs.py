"""The pages are reachable, and what they link to and name is there."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted(
    path for folder in ("benchmarks", "passes", "sere_compile", "tests") for path in (ROOT / folder).rglob("*.md")
)
for template in ("quality_page.md", "quality_beyond_page.md"):  # their links are those of docs/quality.md and the like
    PAGES.remove(ROOT / "benchmarks" / template)
SOURCES = [
    path
    for folder in ("benchmarks", "examples", "ops", "passes", "sere_compile", "tests")
    for path in (ROOT / folder).rglob("*.py")
]
FOLDERS = r"(?:sere_compile|passes|ops|benchmarks|tests|examples|docs|\.ci|\.github)"
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def links(page):
    """Targets of a page's relative links, with their anchors."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [link for link in found if "://" not in link]


def files(page):
    """The same without anchors."""
    return [link.partition("#")[0] for link in links(page) if not link.startswith("#")]


def anchors(page):
    """What links to the headings of a page may end in, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links(page):
    """A link to a file of the repository names one that exists."""
    assert [link for link in files(page) if not (page.parent / link).exists()] == []


@each_page
def test_anchors(page):
    """A link to a heading names one of that page."""
    pairs = [link.partition("#")[::2] for link in links(page) if "#" in link]
    assert [
        f"{file}#{anchor}" for file, anchor in pairs if anchor not in anchors(page.parent / file if file else page)
    ] == []


@each_page
def test_paths(page):
    """A path of the repository that the text names exists."""
    named = re.findall(rf"(?<![\w/.<-]){FOLDERS}/[\w./-]*[\w/](?![\w<*]|[./-]\w)", page.read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_commands():
    """`python -m NAME`, wherever it stands, names a module of ours that can be run."""
    wrong = set()
    for file in [*PAGES, *SOURCES, ROOT / ".ci" / "run", ROOT / ".ci" / "gpu", ROOT / ".ci" / "vllm"]:
        text = file.read_text(encoding="utf-8")
        for module in re.findall(r"python3? (?:-P )?-m ((?:benchmarks|sere_compile|tests)\b(?:\.\w+)*)", text):
            found = importlib.util.find_spec("sere_compile.__main__" if module == "sere_compile" else module)
            runs = found and ("__main__" in found.name or "__main__" in Path(found.origin).read_text(encoding="utf-8"))
            wrong |= set() if runs else {f"{file.relative_to(ROOT)}: {module}"}
    assert wrong == set()


def test_site():
    """Every page that is not for one folder's readers is in the site's contents, and nothing that is not there."""
    site = ROOT / "docs" / "site"
    contents = re.findall(r"^([\w./]+)$", "\n".join(re.findall(r"```{toctree}(.*?)```", (site / "index.md").read_text(
        encoding="utf-8"), re.DOTALL)), re.MULTILINE)  # fmt: skip
    named = {(site / f"{page}.md").resolve() for page in contents}
    assert [page for page in named if not page.exists()] == []
    assert {*(ROOT / "docs").glob("*.md")} - named == {ROOT / "docs" / "README.md"}


def test_index():
    """Every page of docs/ stands in its index, and the README leads there."""
    listed = {(ROOT / "docs" / link).resolve() for link in files(ROOT / "docs" / "README.md")}
    assert [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and page not in listed] == []
    assert {"docs/README.md", "CONTRIBUTING.md"} <= set(files(ROOT / "README.md"))


def test_readme_is_short():
    """Details go to pages of their own."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8")) <= 9_000
