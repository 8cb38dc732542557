"""`benchmarks.generate_time` on a small model, with another compiler than Inductor."""

import functools
import re

from click.testing import CliRunner

import sere_compile
from benchmarks import generate_time
from sere_compile.benchmark.subject import make_subject

from ..tiny_models import build


def run(monkeypatch, *arguments):
    for name, value in (("PROMPT", 4), ("LONG", 6), ("SHORT", 2)):
        monkeypatch.setattr(generate_time, name, value)
    eager = functools.partial(sere_compile.generate_config, inner="eager")
    monkeypatch.setattr(sere_compile, "generate_config", eager)
    subject = make_subject("small", build("qwen3_moe"), None, "random")
    monkeypatch.setattr(generate_time, "random_model", lambda *_: subject)
    return CliRunner().invoke(generate_time.main, ["--batch", "4", "--rounds", "1", *arguments]), subject


def test_a_row_per_variant_and_what_the_host_does(monkeypatch):
    result, _ = run(monkeypatch, "--host")
    assert result.exit_code == 0, result.output
    rows = re.findall(r"^\| (.*?) \| -?[\d.]+ \[.*\] \| (-?[\d.]+) \|$", result.output, re.MULTILINE)
    assert [name for name, _ in rows] == ["default", "S = 1", "S = 1, no guards on modules"]
    assert rows[0][1] == "1.00"
    assert result.output.count("function calls") == 3
    assert "small, batch 4, 4 tokens in" in result.output


def test_a_variant_that_is_not_there_is_told(monkeypatch):
    result, _ = run(monkeypatch, "--variants", "default,S = 3")
    assert result.exit_code == 2
    assert "no variant 'S = 3'; there are 'default'" in result.output
