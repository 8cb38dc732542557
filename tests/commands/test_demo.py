"""`sere demo` on the model that comes with the package, as a user runs it."""

import re

import pytest
from click.testing import CliRunner

from sere_compile.benchmark.timing import machine_name
from sere_compile.cli import main
from sere_compile.commands.demo import KINDS, PROMPTS, _without_re_routing
from sere_compile.integrations.generate import generate_config
from sere_compile.integrations.transformers import SHIPPED


@pytest.mark.slow
def test_demo_decodes_with_fewer_active_experts():
    """Every gate of the trained model is re-routed, and at S = 1 a decode batch activates fewer experts."""
    result = CliRunner().invoke(main, ["demo", "--new-tokens", "4"])
    assert result.exit_code == 0, result.output
    counts = [tuple(map(float, pair)) for pair in re.findall(r"gate\.weight: ([\d.]+) -> ([\d.]+)", result.output)]
    assert len(counts) == 4
    assert all(0 < after < before for before, after in counts)
    assert result.output.count("re-routed  ") == len(PROMPTS)
    speed = rf"ms per step, {re.escape(machine_name())}, in turn, medians of 5: unchanged ([\d.]+), re-routed ([\d.]+)"
    assert all(float(time) > 0 for time in re.search(speed, result.output).groups())


def test_what_is_compared_differs_in_re_routing_alone():
    """The unchanged model is compiled by the same inner compiler with the same options."""
    sere = generate_config(inner="inductor", max_autotune=False)
    plain = _without_re_routing(sere)
    assert (sere.backend, plain.backend) == ("sere", "inductor")
    assert sere.options == {**plain.options, "inner": "inductor"}
    assert plain.options["max_autotune"] is False
    assert plain._compile_all_devices


@pytest.mark.slow
def test_demo_with_nothing_to_re_route():
    """Texts are shown, and why both are the same."""
    result = CliRunner().invoke(main, ["demo", "--model", "qwen3", "--new-tokens", "2", "--select-top-k", "4"])
    assert result.exit_code == 0, result.output
    assert (
        "nothing was re-routed: S = 4 keeps all K = 4 experts of a token; give --select-top-k 1 to 3" in result.output
    )


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_models_stay_small(kind):
    """A trained model of the package is at most 12 MB, with its tokenizer and its record of training."""
    folder = SHIPPED / kind
    assert (folder / "model.safetensors").stat().st_size <= 12e6
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "training.json").is_file()
