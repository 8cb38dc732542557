"""Similarity profiles: mapping, validation, projections."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from sere_compile.errors import ProfileError
from sere_compile.similarity import binding
from sere_compile.similarity.attach import attach
from sere_compile.similarity.profile import SimilarityProfile

from .made import GATES, E, build, changed, coefficients, matrices, matrix


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
