"""Attaching: which matrix is bound to which router weight of a model."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from sere_compile.errors import ProfileError
from sere_compile.similarity import binding
from sere_compile.similarity.attach import attach, detach
from sere_compile.similarity.profile import SimilarityProfile

from .made import GATES, E, H, ListMoe, build, matrices, matrix, stack


@pytest.fixture(params=["Mixtral", "Qwen2Moe", "Qwen3Moe"])
def model(request):
    return build(request.param)


@pytest.fixture
def mixtral():
    return build("Mixtral")


def bound(model):
    """What is recorded for a model's parameters: name -> (matrix, source)."""
    entries = {name: binding.lookup(p) for name, p in model.named_parameters()}
    return {name: (e.matrix, e.source) for name, e in entries.items() if e is not None}


def test_attach_binds_every_router_and_nothing_else(model):
    """On real models each layer's router gets its own layer's matrix, with the origin in words."""
    attach(model, SimilarityProfile(matrices(), {"method": "frobenius", "tokens": "51200"}))
    entries = bound(model)
    assert sorted(entries) == GATES
    for seed, gate in enumerate(GATES):
        assert torch.equal(entries[gate][0], matrix(seed))
        assert entries[gate][1] == "profile (frobenius, 51200 tokens)"


def test_attach_does_not_change_the_model(mixtral):
    """Nothing is registered on the modules: state dict and outputs stay as they were."""
    before = {name: value.clone() for name, value in mixtral.state_dict().items()}
    attach(mixtral, SimilarityProfile(matrices()))
    after = mixtral.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_source_without_metadata_is_plain(mixtral):
    attach(mixtral, SimilarityProfile(matrices()))
    assert {source for _, source in bound(mixtral).values()} == {"profile"}


def test_the_names_that_are_bound_are_the_models_own(mixtral):
    """Reports show the parameter's name."""
    attach(mixtral, SimilarityProfile(matrices()))
    parameters = dict(mixtral.named_parameters())
    assert [binding.lookup(parameters[gate]).name for gate in GATES] == GATES


def test_attaching_again_replaces(mixtral):
    attach(mixtral, SimilarityProfile(matrices()))
    attach(mixtral, SimilarityProfile({gate: matrix(7) for gate in GATES}, {"method": "cka"}))
    for value, source in bound(mixtral).values():
        assert torch.equal(value, matrix(7))
        assert source == "profile (cka)"


def test_detach_forgets_this_model_only(mixtral):
    """Another model's matrices stay, a second detach is harmless, and disturbs no compiled graph."""
    other = build("Mixtral")
    for each in (mixtral, other):
        attach(each, SimilarityProfile(matrices()))
    detach(mixtral)
    assert bound(mixtral) == {}
    assert len(bound(other)) == 3
    version = binding.version()
    detach(mixtral)
    assert binding.version() == version


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("compiled", ["no", "whole", "layer"])
def test_attach_sees_through_torch_compile(mixtral, compiled, prefix):
    """Plain names fit a compiled model, and names taken from a compiled model fit the plain one."""
    profile = SimilarityProfile({prefix + gate: matrix(i) for i, gate in enumerate(GATES)})
    model = mixtral
    if compiled == "whole":
        model = torch.compile(mixtral)
    elif compiled == "layer":
        mixtral.model.layers[1] = torch.compile(mixtral.model.layers[1])
    attach(model, profile)
    gates = [layer.mlp.gate.weight for layer in mixtral.model.layers]
    assert [binding.lookup(weight).name for weight in gates] == GATES
    for seed, weight in enumerate(gates):
        assert torch.equal(binding.lookup(weight).matrix, matrix(seed))
    detach(model)
    assert bound(mixtral) == {}


def test_attach_takes_a_model_on_the_meta_device(monkeypatch):
    """Profiles are checked against models that are not loaded yet; the matrix itself has data."""
    given_ = []
    monkeypatch.setattr(binding, "assign", lambda weight, name, value, source, projection: given_.append(value))
    profile = SimilarityProfile(matrices())
    with torch.device("meta"):
        model = build("Mixtral", device="meta")
        attach(model, profile)
    assert model.lm_head.weight.is_meta
    assert all(torch.equal(value, matrix(seed)) for seed, value in enumerate(given_))
    assert len(given_) == 3


def test_attach_accepts_a_transposed_router():
    """Some models keep [H, E]."""
    model = nn.Module()
    model.gate = nn.Parameter(torch.zeros(H, E))
    attach(model, SimilarityProfile({"gate": matrix()}))
    assert torch.equal(bound(model)["gate"][0], matrix())


def refused(model, profile, message):
    """`attach` raises the message and records nothing at all."""
    with pytest.raises(ProfileError, match=message):
        attach(model, profile)
    assert bound(model) == {}


def test_an_unknown_gate_gives_the_nearest_names(mixtral):
    """Even the gates that do exist are not attached."""
    wrong = "model.layers.2.mlp.router.weight"
    message = rf"gate {re.escape(wrong)} is not .*\(1 unknown: .*nearest names .*{re.escape(GATES[2])}"
    refused(mixtral, SimilarityProfile(matrices([*GATES[:2], wrong])), message)


def test_a_peft_prefix_must_be_exact(mixtral):
    """Names of a wrapped model do not fit the plain one by luck; the message shows the model's own."""
    names = ["base_model.model." + gate for gate in GATES]
    message = r"3 unknown: base_model.*nearest names in the model are .*model\.layers\.\d\.mlp\.gate\.weight"
    refused(mixtral, SimilarityProfile(matrices(names)), message)
    wrapper = nn.ModuleDict({"base_model": nn.ModuleDict({"model": mixtral})})
    attach(wrapper, SimilarityProfile(matrices(names)))
    assert sorted(bound(mixtral)) == GATES


def test_another_number_of_experts_gives_both_shapes(mixtral):
    """Refused for one gate, refused for all."""
    profile = SimilarityProfile({**matrices(), GATES[1]: matrix(experts=6)})
    message = r"layers\.1\.mlp\.gate\.weight: .*shape \(6, 6\) does not fit .*shape \(8, 16\)"
    refused(mixtral, profile, message)


def test_a_router_with_further_columns():
    """LongCat-Flash scores E + 2 columns; a matrix over the E experts beside it fits, one of another size does not."""
    model = build("LongcatFlash")
    names = ["model.layers.0.mlp.router.classifier.weight"]
    other = SimilarityProfile({names[0]: matrix(experts=6)})
    refused(model, other, r"\(6, 6\) does not fit .*shape \(10, 16\).*scores more than real experts")
    attach(model, SimilarityProfile(matrices(names)))
    assert list(bound(model)) == names


def test_a_parameter_that_is_not_a_matrix_is_refused(mixtral):
    """Stacked experts have E rows too, in three dimensions."""
    names = [f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(3)]
    refused(mixtral, SimilarityProfile(matrices(names)), r"\(8, 8\) does not fit .*\(8, 16, 16\), .*must be 2-D")


def test_a_router_without_a_matrix_is_refused(mixtral):
    """A profile of another depth: the message names the router and what the profile has."""
    message = (
        r"router model\.layers\.1\.mlp\.gate\.weight has no matrix .*\(1 without.*"
        r"gates are model\.layers\.0\.mlp\.gate\.weight, model\.layers\.2"
    )
    refused(mixtral, SimilarityProfile(matrices([GATES[0], GATES[2]])), message)


def test_a_namesake_of_another_shape_needs_no_matrix():
    """Layers that share a name but not a shape, such as dense ones, are not the profile's business."""
    model = stack(ListMoe("gate"), ListMoe("gate", experts=4))
    attach(model, SimilarityProfile({"blocks.0.ffn.gate.weight": matrix()}))
    assert list(bound(model)) == ["blocks.0.ffn.gate.weight"]


def test_one_parameter_under_two_gates_is_refused():
    """Tied routers can have one matrix; the second must not replace the first silently."""
    model = stack(ListMoe(), ListMoe())
    model.blocks[1].ffn.router.weight = model.blocks[0].ffn.router.weight
    names = [f"blocks.{i}.ffn.router.weight" for i in range(2)]
    message = f"{re.escape(names[0])} and {re.escape(names[1])} are one parameter"
    refused(model, SimilarityProfile(matrices(names)), message)
    attach(model, SimilarityProfile(matrices(names[1:])))
    assert torch.equal(binding.lookup(model.blocks[0].ffn.router.weight).matrix, matrix())


def test_attach_of_a_dict_says_how_to_wrap_it(mixtral):
    """Unchecked matrices are not taken."""
    with pytest.raises(ProfileError, match=r"got dict; wrap a dict as SimilarityProfile\(\{name: matrix\}\)"):
        attach(mixtral, matrices())


def test_a_router_that_is_a_buffer_is_refused_with_what_to_do():
    model = nn.Module()
    model.register_buffer("router", torch.randn(E, H))
    with pytest.raises(ProfileError, match=r"router is a buffer of the model.*requires_grad=False"):
        attach(model, SimilarityProfile({"router": matrix(0)}))


def test_a_path_is_loaded(mixtral, tmp_path):
    path = tmp_path / "p.safetensors"
    SimilarityProfile(matrices(), {"method": "cosine"}).save(path)
    attach(mixtral, str(path))
    attach(mixtral, path)
    assert bound(mixtral)[GATES[0]][1] == "profile (cosine)"
    with pytest.raises(ProfileError, match=r"none\.safetensors"):
        attach(mixtral, tmp_path / "none.safetensors")
