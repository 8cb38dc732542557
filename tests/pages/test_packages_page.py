"""docs/packages.md has a row for every model of tests/packages; the lane `packages` measures them."""

import re

from benchmarks.packages_page import FILE, page, read, read_others

from ..packages.checkouts import CHECKOUTS
from ..packages.models import MODELS


def test_rows_are_those_of_the_models():
    """A new model needs a row: python -m benchmarks.packages_page."""
    assert [(row[0], row[2]) for row in read()] == [(model.package, model.name) for model in MODELS]


def test_rows_of_other_code_are_those_of_the_checkouts():
    """A new one needs a row: python -m benchmarks.packages_page --only checkouts."""
    assert [(row[0], row[2], row[3]) for row in read_others()] == [(c.repository, c.file, c.name) for c in CHECKOUTS]


def test_the_page_is_made_from_its_rows():
    """The prose counts what the table says."""
    text = FILE.read_text("utf-8")
    written = page(read(), read_others())
    version = re.compile(r"with torch [\d.]*\d")
    assert version.sub("", text) == version.sub("", written)


def test_what_is_not_re_routed_says_why():
    for row in read():
        assert (row[4] < row[3]) is bool(row[5]), row
    for other in read_others():
        assert (other[5] < other[4]) is bool(other[6]), other


def test_versions_are_those_that_the_lane_installs():
    requirements = (FILE.parents[1] / ".ci" / "packages_requirements.txt").read_text("utf-8")
    installed = dict(re.findall(r"^([\w-]+)==(\S+)$", requirements, re.M))
    assert {row[0]: row[1] for row in read()}.items() <= installed.items()
