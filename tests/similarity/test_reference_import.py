"""The reference implementation's files: their layouts, what is wrong with them, and whose matrix is whose."""

from __future__ import annotations

import json
import os
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from sere_compile.errors import ProfileError
from sere_compile.similarity import binding
from sere_compile.similarity.attach import attach
from sere_compile.similarity.profile import SimilarityProfile

from .made import GATES, E, H, ListMoe, build, changed, matrices, matrix, stack


@pytest.fixture(params=["Mixtral", "Qwen2Moe", "Qwen3Moe"])
def model(request):
    return build(request.param)


class StackedMoe(nn.Module):
    """Stacked experts with further tensors of a row per expert beside them, as quantised models have."""

    def __init__(self, router, *rows):
        super().__init__()
        setattr(self, router, nn.Linear(H, E, bias=False))
        self.experts = nn.Module()
        self.experts.up_proj = nn.Parameter(torch.zeros(E, H, H))
        for name in rows:
            setattr(self.experts, name, nn.Parameter(torch.zeros(E, H)))


def reference_file(path, keys=(0, 1, 2), **options):
    torch.save({key: matrix(seed) for seed, key in enumerate(keys)}, path, **options)
    return path


def same_layers(profile, names):
    return profile == SimilarityProfile(matrices(names))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keys", [(0, 1, 2), ("0", "1", "2")])
def test_reference_file_without_a_model_uses_the_template(tmp_path, keys, zipped):
    """Layer indices as numbers or as digits, in torch's new and old format."""
    path = reference_file(tmp_path / "similarity_matrices.pt", keys, _use_new_zipfile_serialization=zipped)
    profile = SimilarityProfile.from_reference(path)
    assert same_layers(profile, GATES)
    assert profile.metadata == {"source": "similarity_matrices.pt"}


def test_reference_file_with_another_template(tmp_path):
    """The index is the layer's, not a running number: dense layers are left out of the file."""
    path = reference_file(tmp_path / "s.pt", (3, 4, 11))
    profile = SimilarityProfile.from_reference(path, name="decoder.{layer}.router.weight")
    assert list(profile) == [f"decoder.{layer}.router.weight" for layer in (3, 4, 11)]


@pytest.mark.parametrize("name", ["model.gate.weight", "{}.gate", "{layer.gate", "{other}"])
def test_a_template_without_layer_is_refused(tmp_path, name):
    path = reference_file(tmp_path / "s.pt")
    with pytest.raises(ProfileError, match=rf"name='{re.escape(name)}' .*\{{layer\}}"):
        SimilarityProfile.from_reference(path, name=name)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("plain", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, plain):
    """Code in a pickle must not run, neither from a plain pickle nor inside a torch file."""
    path, trace = tmp_path / "similarity_matrices.pt", tmp_path / "trace"
    content = {0: matrix(), 1: Payload(trace)}
    if plain:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(ProfileError, match="Nothing but tensors is loaded, because unpickling can run any code"):
        SimilarityProfile.from_reference(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(content, protocol=2))
    assert trace.exists(), "the payload is harmless, so this test proves nothing"


@settings(max_examples=60, deadline=None)
@given(data=st.data(), zipped=st.booleans())
def test_a_torch_file_that_is_cut_off_is_a_profile_error(tmp_path_factory, data, zipped):
    """Wherever it ends, and whatever else the rest becomes."""
    path = tmp_path_factory.mktemp("damaged") / "s.pt"
    reference_file(path, (0,), _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 5))
    path.write_bytes(content[:at] + data.draw(st.binary(max_size=4)))
    with pytest.raises(ProfileError, match=r"s\.pt"):
        SimilarityProfile.from_reference(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), zipped=st.booleans())
def test_a_torch_file_with_other_bytes_is_a_profile_error_or_a_profile(tmp_path_factory, data, zipped):
    """Some damage leaves a file that can be read; what is read then is a profile like any other."""
    path = tmp_path_factory.mktemp("damaged") / "s.pt"
    reference_file(path, (0,), _use_new_zipfile_serialization=zipped)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 4))
    content[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
    path.write_bytes(content)
    try:
        profile = SimilarityProfile.from_reference(path)
    except ProfileError:
        return
    assert [tuple(value.shape) for value in profile.values()] == [(E, E)]
    assert all(value.isfinite().all() for value in profile.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([matrix()], "expected a dict of layer index to matrix, got list"),
        ({}, "expected layer indices.*it holds none"),
        (
            {0: matrix(), "lm_head": matrix()},
            "expected layer indices, or tensors named .*it holds 0, lm_head",
        ),
        ({-1: matrix()}, "expected layer indices.*it holds -1"),
        ({True: matrix()}, "expected layer indices.*it holds True"),
        ({0: matrix(), "0": matrix()}, "a layer index occurs twice among 0, '0'"),
        ({3: None}, r"layer 3: expected a square matrix, \[E, E\], got NoneType"),
        ({3: torch.ones(8, 7)}, r"layer 3: expected a square matrix, \[E, E\], got shape \(8, 7\)"),
        ({3: changed(float("nan"))}, r"layers\.3\.mlp\.gate\.weight: .*not finite"),
        ({0: matrix(), 3: torch.eye(E)}, r"layers\.3\.mlp\.gate\.weight is the identity"),
    ],
)
def test_reference_contents_that_are_not_matrices_by_layer(tmp_path, content, message):
    """Each is an error of its own; an entry is never skipped for being odd."""
    torch.save(content, tmp_path / "s.pt")
    with pytest.raises(ProfileError, match=message):
        SimilarityProfile.from_reference(tmp_path / "s.pt")


def test_an_identity_of_two_experts_is_a_right_answer(tmp_path):
    """With two experts the one distance is the largest: similarity 0."""
    torch.save({0: torch.eye(2)}, tmp_path / "s.pt")
    assert torch.equal(SimilarityProfile.from_reference(tmp_path / "s.pt")[GATES[0]], torch.eye(2))


def test_a_profile_given_to_from_reference_points_to_load(tmp_path):
    SimilarityProfile(matrices()).save(tmp_path / "p.safetensors")
    with pytest.raises(ProfileError, match=r"is a sere_compile profile; .*SimilarityProfile\.load"):
        SimilarityProfile.from_reference(tmp_path / "p.safetensors")


def checkpoint(layers=(0, 1, 2), moe="mlp"):
    """A calibrated checkpoint's tensors: the matrices, between weights that must not be taken for any."""
    tensors = {"lm_head.weight": torch.ones(64, H)}
    for seed, layer in enumerate(layers):
        tensors[f"model.layers.{layer}.{moe}.similarity_matrix"] = matrix(seed)
        tensors[f"model.layers.{layer}.{moe}.gate.weight"] = torch.ones(E, H)
    return tensors


def write_sharded(folder, tensors, shards=3):
    """The layout of a large model: `model-0000x.safetensors` files and an index."""
    weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


def write_checkpoint(folder, layout, tensors):
    """Write a checkpoint in one of the layouts; the path to give to from_reference."""
    if layout == "sharded":
        write_sharded(folder, tensors)
    elif layout == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("layout", ["sharded", "safetensors", "bin"])
def test_calibrated_checkpoints_of_every_layout(tmp_path, layout, with_model):
    """The buffer's module holds the router: the same profile from shards, one file, or a state dict."""
    folder = write_checkpoint(tmp_path, layout, checkpoint())
    model = build("Qwen2Moe") if with_model else None
    assert same_layers(SimilarityProfile.from_reference(folder, model=model), GATES)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_checkpoint_file_can_be_named_itself(tmp_path, file):
    """The folder is not needed when the file is known."""
    write_checkpoint(tmp_path, "safetensors" if file.endswith("s") else "bin", checkpoint())
    assert same_layers(SimilarityProfile.from_reference(tmp_path / file), GATES)


def test_a_folder_prefers_the_unrounded_matrices(tmp_path):
    """The reference writes both: a checkpoint, possibly in bf16, and similarity_matrices.pt."""
    rounded = {k: v.bfloat16() for k, v in checkpoint().items()}
    write_sharded(tmp_path, rounded)
    reference_file(tmp_path / "similarity_matrices.pt")
    assert same_layers(SimilarityProfile.from_reference(tmp_path), GATES)


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(ProfileError, match=r"holds none of similarity_matrices\.pt, model\.safetensors, .*index"):
        SimilarityProfile.from_reference(tmp_path)


def test_a_missing_shard_is_an_error(tmp_path):
    """A layer whose shard is not there is not left out."""
    weight_map = write_sharded(tmp_path, checkpoint())
    (tmp_path / weight_map["model.layers.1.mlp.similarity_matrix"]).unlink()
    with pytest.raises(ProfileError, match=r"there is no file .*model-\d\.safetensors"):
        SimilarityProfile.from_reference(tmp_path)


def test_a_matrix_the_shards_do_not_hold_is_an_error(tmp_path):
    """An index that promises more than its shards have."""
    weight_map = write_sharded(tmp_path, checkpoint())
    lost = "model.layers.7.mlp.similarity_matrix"
    weight_map[lost] = weight_map["model.layers.1.mlp.similarity_matrix"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ProfileError, match=f"promises {re.escape(lost)}, which the shards do not hold"):
        SimilarityProfile.from_reference(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}', "[]"])
def test_a_damaged_index_is_an_error(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ProfileError, match=r"index\.json is not an index of shards"):
        SimilarityProfile.from_reference(tmp_path)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("sharded", "names no similarity_matrix; it lists lm_head.weight"),
        (
            "safetensors",
            "expected layer indices, or tensors named ...similarity_matrix; it holds lm_head.weight",
        ),
        ("bin", "expected layer indices, or tensors named ...similarity_matrix; it holds lm_head.weight"),
    ],
)
def test_a_checkpoint_that_was_never_calibrated(tmp_path, layout, message):
    folder = write_checkpoint(tmp_path, layout, {"lm_head.weight": torch.ones(2, 2)})
    with pytest.raises(ProfileError, match=re.escape(message)):
        SimilarityProfile.from_reference(folder)


def test_a_checkpoint_module_outside_the_template_needs_the_model_or_a_name(tmp_path):
    """The router is in the buffer's own module; a template that leads elsewhere is not followed."""
    folder = write_checkpoint(tmp_path, "bin", checkpoint(moe="block_sparse_moe"))
    with pytest.raises(ProfileError, match=r"no router weight inside model\.layers\.0\.block_sparse_moe"):
        SimilarityProfile.from_reference(folder)
    name = "model.layers.{layer}.block_sparse_moe.gate.weight"
    profile = SimilarityProfile.from_reference(folder, name=name)
    assert list(profile) == [name.format(layer=layer) for layer in range(3)]


def test_a_checkpoint_module_finds_the_router_in_the_model(tmp_path):
    """Of the parameters with E rows below the module: not an expert's, not a shared expert's."""
    tensors = {f"blocks.{i}.ffn.similarity_matrix": matrix(i) for i in range(2)}
    torch.save(tensors, tmp_path / "m.pt")
    profile = SimilarityProfile.from_reference(tmp_path / "m.pt", model=stack(ListMoe(), ListMoe()))
    assert same_layers(profile, [f"blocks.{i}.ffn.router.weight" for i in range(2)])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            stack(ListMoe(experts=4)),
            r"blocks\.0\.ffn \(8 experts\) cannot be determined: .* no such weight .* 0 parameters",
        ),
        (
            stack(nn.ModuleDict({"a": nn.Linear(H, E), "b": nn.Linear(H, E)})),
            r"ffn\.a\.weight, blocks\.0\.ffn\.b",
        ),
    ],
)
def test_a_checkpoint_module_without_a_certain_router(tmp_path, model, message):
    """None, or two: the candidates are listed."""
    torch.save({"blocks.0.ffn.similarity_matrix": matrix()}, tmp_path / "m.pt")
    with pytest.raises(ProfileError, match=message):
        SimilarityProfile.from_reference(tmp_path / "m.pt", model=model)


def test_layers_of_a_model_with_the_usual_names(tmp_path, model):
    """Mixtral, Qwen2-MoE and Qwen3-MoE have the template's names; other weights with E rows are no matter."""
    path = reference_file(tmp_path / "s.pt")
    assert same_layers(SimilarityProfile.from_reference(path, model=model), GATES)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("Mixtral", "model.layers.{layer}.mlp.gate.weight"),
        ("Qwen2Moe", "model.layers.{layer}.mlp.gate.weight"),
        ("GptOss", "model.layers.{layer}.mlp.router.weight"),
        ("Phimoe", "model.layers.{layer}.mlp.router.weight"),
        ("Jamba", "model.layers.{layer}.feed_forward.router.weight"),
    ],
)
def test_routers_are_found_without_their_names(tmp_path, kind, name):
    """By the experts beside them: a template that does not fit the model is no obstacle."""
    path = reference_file(tmp_path / "s.pt")
    profile = SimilarityProfile.from_reference(path, model=build(kind), name="no.such.{layer}")
    assert same_layers(profile, [name.format(layer=layer) for layer in range(3)])


@pytest.mark.parametrize("router", ["router", "gate", "weird"])
def test_routers_beside_a_list_of_experts_are_found(tmp_path, router):
    """Experts as a ModuleList; only without a telling name must the router be the one weight with E rows."""
    path = reference_file(tmp_path / "s.pt", (1,))
    model = stack(nn.Linear(H, H), ListMoe(router))
    profile = SimilarityProfile.from_reference(path, model=model)
    assert list(profile) == [f"blocks.1.ffn.{router}.weight"]


@pytest.mark.parametrize(
    "moe",
    [StackedMoe("weird", "up_proj_bias", "up_proj_scale"), StackedMoe("gate", "up_proj_zeros")],
)
def test_tensors_of_the_experts_are_not_taken_for_the_router(tmp_path, moe):
    """They are nearer to the experts than the router is: biases and scales never count, a router's name wins."""
    path = reference_file(tmp_path / "s.pt", (0,))
    profile = SimilarityProfile.from_reference(path, model=stack(moe))
    assert list(profile) in (["blocks.0.ffn.weird.weight"], ["blocks.0.ffn.gate.weight"])


def test_routers_inside_a_compiled_model_are_found(tmp_path):
    """`torch.compile` renames what it wraps; the profile keeps the plain names."""
    path = reference_file(tmp_path / "s.pt", (0,))
    model = stack(ListMoe())
    model.blocks[0] = torch.compile(model.blocks[0])
    profile = SimilarityProfile.from_reference(path, model=torch.compile(model))
    assert list(profile) == ["blocks.0.ffn.router.weight"]


def two_stacks():
    model = nn.Module()
    model.encoder, model.decoder = stack(ListMoe()), stack(ListMoe())
    return model


@pytest.mark.parametrize(
    ("make", "candidates"),
    [
        (two_stacks, ["encoder.blocks.0.ffn.router.weight", "decoder.blocks.0.ffn.router.weight"]),
        (
            lambda: build("JetMoe"),
            [
                "model.layers.0.self_attention.experts.router.layer.weight",
                "model.layers.0.mlp.router.layer.weight",
            ],
        ),
    ],
)
def test_an_ambiguous_layer_lists_the_candidates(tmp_path, make, candidates):
    """Two stacks of layers, or two gates in one layer (JetMoE): the index alone does not tell."""
    path = reference_file(tmp_path / "s.pt", (0,))
    with pytest.raises(ProfileError, match=r"layer 0 \(8 experts\).* 2 parameters could be it.*Pass name=") as c:
        SimilarityProfile.from_reference(path, model=make())
    for name in candidates:
        assert name in str(c.value)


@pytest.mark.parametrize("layer", [1, 9])
def test_a_layer_without_a_router_is_an_error_and_not_skipped(tmp_path, layer):
    """Layer 1 is dense (its weights have E rows), layer 9 does not exist; layer 0 alone would resolve."""
    path = reference_file(tmp_path / "s.pt", (0, layer))
    with pytest.raises(ProfileError, match=rf"router of layer {layer} .* 0 parameters could be it: none"):
        SimilarityProfile.from_reference(path, model=stack(ListMoe(), nn.Linear(H, E)))


def test_an_expert_number_is_not_taken_for_a_layer(tmp_path):
    """`blocks.0.ffn.experts.3.weight` contains `.3.`, but has no experts below it."""
    path = reference_file(tmp_path / "s.pt", (3,))
    with pytest.raises(ProfileError, match=r"router of layer 3 .* 0 parameters"):
        SimilarityProfile.from_reference(path, model=stack(ListMoe()))


def test_two_entries_for_one_router_are_an_error(tmp_path):
    """With a model that nests lists two indices can lead to one router; neither may win silently."""
    model = nn.Module()
    model.groups = nn.ModuleList([nn.Module()])
    model.groups[0].blocks = nn.ModuleList([nn.Module(), nn.Module()])
    model.groups[0].blocks[1].ffn = ListMoe()
    path = reference_file(tmp_path / "s.pt", (0, 1))
    with pytest.raises(ProfileError, match=r"0 and 1 both map to the router groups\.0\.blocks\.1\.ffn\.router\.weight"):
        SimilarityProfile.from_reference(path, model=model)


def test_attach_to_a_reference_file_end_to_end(tmp_path, model):
    """From the authors' file to the router weights."""
    path = reference_file(tmp_path / "similarity_matrices.pt")
    attach(model, SimilarityProfile.from_reference(path, model=model))
    entry = binding.lookup(model.get_parameter(GATES[2]))
    assert torch.equal(entry.matrix, matrix(2))
    assert entry.source == "profile (similarity_matrices.pt)"
