"""Similarity profiles: validation, attaching to models."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from sere_compile.errors import ProfileError
from sere_compile.similarity import binding
from sere_compile.similarity.profile import SimilarityProfile, attach, detach

from .made import GATES, E, H, build, changed, coefficients, matrices, matrix


@pytest.fixture(params=["Mixtral", "Qwen2Moe", "Qwen3Moe"])
def model(request):
    return build(request.param)


@pytest.fixture
def mixtral():
    return build("Mixtral")


class ListMoe(nn.Module):
    """The layout of most models outside transformers: a router beside a ModuleList of experts."""

    def __init__(self, router="router", experts=E):
        super().__init__()
        setattr(self, router, nn.Linear(H, experts, bias=False))
        self.experts = nn.ModuleList(nn.Linear(H, experts, bias=False) for _ in range(experts))
        self.shared_expert = nn.Linear(H, experts, bias=False)


def stack(*layers):
    """A model whose layers are `blocks.N.ffn`, each with a projection that has E rows beside it."""
    model = nn.Module()
    model.blocks = nn.ModuleList()
    for ffn in layers:
        block = nn.Module()
        block.k_proj, block.ffn = nn.Linear(H, E, bias=False), ffn
        model.blocks.append(block)
    return model


def test_values_are_float32_cpu_copies_in_natural_order():
    """Any float dtype comes in; what is kept is float32, contiguous, and apart from the caller's tensor."""
    given_ = {"layers.10.gate.weight": matrix(0).double(), "layers.2.gate.weight": matrix(1).T.bfloat16()}
    profile = SimilarityProfile(given_)
    given_["layers.10.gate.weight"].zero_()
    assert list(profile) == ["layers.2.gate.weight", "layers.10.gate.weight"]
    for value in profile.values():
        assert (value.dtype, value.device.type, value.is_contiguous()) == (torch.float32, "cpu", True)
    assert torch.equal(profile["layers.10.gate.weight"], matrix(0))
    assert torch.equal(profile["layers.2.gate.weight"], matrix(1).bfloat16().float())


def test_writing_to_a_matrix_that_was_handed_out_changes_nothing():
    """The profile is read-only although tensors are not: every access gives a fresh copy."""
    profile = SimilarityProfile(matrices())
    profile[GATES[0]].zero_()
    next(iter(profile.values())).zero_()
    assert profile == SimilarityProfile(matrices())


def test_the_profile_itself_cannot_be_changed():
    """No item assignment, no deletion, no new metadata, and the caller's metadata dict is not kept."""
    metadata = {"method": "frobenius"}
    profile = SimilarityProfile(matrices(), metadata)
    metadata["method"] = "cka"
    with pytest.raises(TypeError):
        profile[GATES[0]] = matrix()
    with pytest.raises(TypeError):
        del profile[GATES[0]]
    with pytest.raises(TypeError):
        profile.metadata["method"] = "cka"
    with pytest.raises(AttributeError):
        profile.metadata = {}
    assert profile.metadata == {"method": "frobenius"}


def test_it_is_a_mapping():
    """`in`, len, get and KeyError as for a dict."""
    profile = SimilarityProfile(matrices())
    assert GATES[1] in profile
    assert "lm_head.weight" not in profile
    assert len(profile) == 3
    assert profile.get("lm_head.weight") is None
    with pytest.raises(KeyError):
        profile["lm_head.weight"]


def test_equality_is_by_gates_and_bits():
    """One bit, one gate more or another name differ; metadata does not count; profiles are not hashable."""
    profile = SimilarityProfile(matrices(), {"method": "cka"})
    assert profile == SimilarityProfile(matrices())
    assert profile == copy.deepcopy(profile) == pickle.loads(pickle.dumps(profile))
    assert profile != SimilarityProfile(matrices(GATES[:2]))
    assert profile != SimilarityProfile(matrices(["a", "b", "c"]))
    assert profile != matrices()
    zero, negative = changed(0.0), changed(-0.0)
    zero[2, 1], negative[2, 1] = 0.0, -0.0
    assert SimilarityProfile({"a": zero}) != SimilarityProfile({"a": negative})
    with pytest.raises(TypeError, match="unhashable"):
        hash(profile)


def test_repr_tells_gates_experts_and_origin():
    """One line for a log: counts, and where the numbers came from when that is known."""
    assert repr(SimilarityProfile({"a": torch.ones(1, 1)})) == "<SimilarityProfile: 1 gate, 1 expert>"
    mixed = {**matrices(), "b": matrix(experts=4)}
    profile = SimilarityProfile(mixed, {"method": "frobenius", "tokens": "51200"})
    assert repr(profile) == "<SimilarityProfile: 4 gates, 4/8 experts, frobenius, 51200 tokens>"


def test_profiles_made_in_inference_mode_hold_ordinary_tensors(tmp_path):
    """Calibration runs in inference mode; its tensors must be usable by compiled graphs outside of it."""
    with torch.inference_mode():
        profile = SimilarityProfile({"a": matrix()})
        handed_out = profile["a"]
    assert not profile["a"].is_inference()
    assert not handed_out.is_inference()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1.0]], r"gate\.weight: expected a tensor of shape \[E, E\], got list"),
        (torch.ones(8, 7), r"gate\.weight: a similarity matrix is square.*got shape \(8, 7\)"),
        (torch.ones(8), r"gate\.weight: a similarity matrix is square.*got shape \(8,\)"),
        (torch.ones(0, 0), r"gate\.weight: .*E >= 1; got shape \(0, 0\)"),
        (torch.ones(8, 8, dtype=torch.long), r"gate\.weight: .*floating-point.*torch\.int64.*\(8, 8\)"),
        (changed(float("nan")), r"gate\.weight: .*\(8, 8\) has 1 entries.*\[1, 2\] = nan"),
        (changed(float("inf")), r"gate\.weight: .*\(8, 8\) has 1 entries.*\[1, 2\] = inf"),
        (matrix().double() * 1e300, r"gate\.weight: .*has 64 entries that are not finite in float32"),
        (
            changed(7.0, 5, 3),
            r"gate\.weight: .*\(8, 8\) is not symmetric: \[3, 5\] = 0\.\d+ but \[5, 3\] = 7$",
        ),
        (torch.ones(8, 8, device="meta"), r"gate\.weight: .*\(8, 8\) on the meta device"),
        (matrix().to_sparse(), r"gate\.weight: .*\(8, 8\) of layout torch\.sparse_coo"),
    ],
)
def test_a_malformed_matrix_is_refused_by_name_and_shape(value, message):
    """One error per kind of mistake; each names the gate and what is wrong with its matrix."""
    with pytest.raises(ProfileError, match=message):
        SimilarityProfile({"ok": matrix(), "layers.0.gate.weight": value})


def test_the_symmetry_tolerance_is_relative():
    """A mismatch of 5e-5 of the largest entry is rounding, of 2e-4 is not, whatever the scale."""
    for scale in (1e-6, 1.0, 1e6):
        base = torch.ones(E, E) * scale
        base[1, 2] *= 1 + 5e-5
        SimilarityProfile({"a": base})
        base[1, 2] *= 1 + 2e-4
        with pytest.raises(ProfileError, match="not symmetric"):
            SimilarityProfile({"a": base})


@pytest.mark.parametrize(
    ("mapping", "metadata", "message"),
    [
        ({}, {}, "needs at least one gate"),
        ([matrix()], {}, "expected a mapping of gate name to matrix, got list"),
        (
            {0: matrix()},
            {},
            "got 0; a file keyed by layer index is read with SimilarityProfile.from_reference",
        ),
        ({"": matrix()}, {}, "named by its router's weight.*got ''"),
        ({"a": matrix()}, {"tokens": 51200}, "strings to strings, got 'tokens': 51200"),
        ({"a": matrix()}, {"format": "pt"}, "'format' is reserved"),
        ({"a": matrix()}, {"library_version": "1"}, "'library_version' is reserved"),
    ],
)
def test_bad_names_and_metadata_are_refused(mapping, metadata, message):
    """What is not a mapping of names to matrices, or metadata that a file could not hold as it is."""
    with pytest.raises(ProfileError, match=message):
        SimilarityProfile(mapping, metadata)


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


def test_projections_travel_with_the_profile(tmp_path):
    """Saved, loaded, compared and attached; they need not be symmetric."""
    given_ = coefficients()
    profile = SimilarityProfile(matrices(), {"method": "frobenius"}, given_)
    profile.save(tmp_path / "p.safetensors")
    loaded = SimilarityProfile.load(tmp_path / "p.safetensors")
    assert loaded == profile != SimilarityProfile(matrices())
    assert list(loaded) == list(loaded.projections) == GATES
    for name in GATES:
        assert torch.equal(loaded.projections[name], given_[name])
        loaded.projections[name].zero_()
        assert torch.equal(loaded.projection(name), given_[name]), "copies are handed out"
    assert "with projections" in repr(loaded)
    model = build("Mixtral")
    attach(model, loaded)
    bound = binding.lookup(model.get_parameter(GATES[1])).projection
    assert torch.equal(bound, given_[GATES[1]].clone().fill_diagonal_(1.0)), "an expert that stays keeps its weight"


@pytest.mark.parametrize(
    ("projections", "message"),
    [
        (coefficients(GATES[:2]), "are of different gates: model.layers.2.mlp.gate.weight"),
        (coefficients(experts=E + 1), r"projections of shape \(9, 9\) beside a matrix of shape \(8, 8\)"),
        ({name: torch.full((E, E), float("nan")) for name in GATES}, r"\(projection\): .* not finite"),
        ({name: torch.ones(E, E, dtype=torch.int64) for name in GATES}, "expected a floating-point matrix"),
        (3, "projections map gate names to matrices, got int"),
    ],
)
def test_projections_are_checked(projections, message):
    """One for each gate, of its size, finite."""
    with pytest.raises(ProfileError, match=message):
        SimilarityProfile(matrices(), None, projections)
