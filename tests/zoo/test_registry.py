"""The registry lists exactly the MoE architectures of the installed transformers, and each builds small."""

import pytest
import torch

from .discover import has_experts_interface, moe_architectures
from .oracle import counting, selecting_modules
from .registry import ENTRIES, NO_MOE, build, inputs

# Built in every run; the lane of the zoo builds all.
REPRESENTATIVES = ("dbrx", "deepseek_v3", "glm4_moe", "gpt_oss", "jetmoe", "llama4", "olmoe", "phimoe")


def test_every_architecture_is_listed():
    """A new MoE architecture of transformers is met by a test, not by a user."""
    unlisted = sorted(set(moe_architectures()) - set(ENTRIES) - set(NO_MOE))
    assert not unlisted, (
        f"transformers has MoE architectures that the zoo does not list: {unlisted}. Add an Entry for each to "
        f"tests/zoo/registry.py (tests/zoo/README.md says how), or name it in NO_MOE with the reason."
    )


def test_nothing_is_listed_twice():
    assert not set(ENTRIES) & set(NO_MOE)


def test_detection_sees_a_new_architecture(monkeypatch):
    """Undo an entry: the first test has to turn red."""
    monkeypatch.delitem(ENTRIES, "olmoe")
    with pytest.raises(AssertionError, match=r"does not list: \['olmoe'\]"):
        test_every_architecture_is_listed()


def _builds(name):
    model = build(name)
    assert sum(parameter.numel() for parameter in model.parameters()) < 50e6
    assert has_experts_interface(name) == model._can_set_experts_implementation()
    assert selecting_modules(name, model)
    with torch.no_grad(), counting(name, model) as calls:
        output = model(**inputs(name))[0]
    assert output.isfinite().all()
    assert len(calls) >= 2, "one layer cannot tell whether each gets its own matrix"


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_representative_builds(name):
    _builds(name)


@pytest.mark.zoo
@pytest.mark.parametrize("name", sorted(set(ENTRIES) - set(REPRESENTATIVES)))
def test_builds(name):
    """Every other architecture runs on a CPU with finite results, and selects experts at least twice."""
    if name not in moe_architectures():
        pytest.skip("not in the installed transformers")
    _builds(name)
