"""Which matrix is for which layer of vLLM; no vLLM is needed."""

from __future__ import annotations

import pytest
import torch

from sere_compile import ProfileError, SimilarityProfile
from sere_compile.integrations.vllm.matrices import find_profile, match_layers


def profile(*names):
    return SimilarityProfile({name: torch.eye(4) for name in names})


def test_layers_are_matched_by_number():
    """vLLM and transformers name the block differently."""
    layers = {f"model.layers.{i}.block_sparse_moe.experts": 4 for i in (2, 10)}
    matched = match_layers(profile("model.layers.10.mlp.gate.weight", "model.layers.2.mlp.gate.weight"), layers, True)
    assert list(matched) == list(layers)


def test_a_stage_of_a_pipeline_leaves_matrices_over():
    gates = profile("model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight")
    layers = {"model.layers.1.mlp.experts": 4}
    assert list(match_layers(gates, layers, complete=False)) == list(layers)
    with pytest.raises(ProfileError, match=r"does not have: model\.layers\.0\."):
        match_layers(gates, layers, complete=True)


def test_the_reference_matrices_of_a_checkpoint_are_found(tmp_path):
    matrix = torch.tensor([[1.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 1.0]])
    assert find_profile(None, str(tmp_path)) is None
    assert find_profile(None, "organisation/name") is None
    torch.save({0: matrix}, tmp_path / "similarity_matrices.pt")
    for found in (find_profile(None, str(tmp_path)), find_profile(str(tmp_path / "similarity_matrices.pt"), "")):
        assert torch.equal(found["model.layers.0.mlp.gate.weight"], matrix)
