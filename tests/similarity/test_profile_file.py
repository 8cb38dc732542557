"""Files of profiles: round trips, interrupted writes, and what is no profile."""

from __future__ import annotations

import os
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sere_compile.errors import ProfileError
from sere_compile.similarity import profile_file
from sere_compile.similarity.profile import SimilarityProfile

from .made import GATES, NAME, changed, coefficients, matrices, matrix


def test_save_and_load_keep_every_bit_and_the_metadata(tmp_path):
    """A round trip is the identity, subnormals and signed zeros included."""
    extreme = changed(1e-45)
    extreme[2, 1], extreme[0, 0] = 1e-45, -0.0
    metadata = {"method": "cosine", "tokens": "512", "model_type": "mixtral"}
    names = [NAME.format(layer=layer) for layer in (0, 2, 10)]
    profile = SimilarityProfile({**matrices(names), names[1]: extreme}, metadata)
    profile.save(tmp_path / "p.safetensors")
    loaded = SimilarityProfile.load(str(tmp_path / "p.safetensors"))
    assert loaded == profile
    assert loaded.metadata == metadata
    assert list(loaded) == names


def test_the_file_says_what_it_is(tmp_path):
    """Other tools can read the format, its version and the library's from the header."""
    SimilarityProfile(matrices(), {"method": "cka"}).save(tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", framework="pt") as file:
        header = file.metadata()
        assert sorted(file.keys()) == GATES
    assert header.pop("library_version")
    assert header == {"format": "sere_compile.similarity", "format_version": "1", "method": "cka"}


def test_an_interrupted_save_leaves_the_old_file_alone(tmp_path, monkeypatch):
    """The rename is the last step: when it does not happen the earlier profile is whole, with no litter."""
    path = tmp_path / "p.safetensors"
    old = SimilarityProfile(matrices())
    old.save(path)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SimilarityProfile({"a": matrix(9)}).save(path)
    assert SimilarityProfile.load(path) == old
    assert os.listdir(tmp_path) == ["p.safetensors"]


def test_save_replaces_and_follows_links(tmp_path):
    """Saving again replaces the contents; through a symbolic link it replaces the file, not the link."""
    path, link = tmp_path / "p.safetensors", tmp_path / "link"
    SimilarityProfile(matrices()).save(path)
    link.symlink_to(path)
    SimilarityProfile({"a": matrix(9)}).save(link)
    assert link.is_symlink()
    assert list(SimilarityProfile.load(path)) == ["a"]


def test_a_saved_file_has_ordinary_permissions(tmp_path):
    """Temporary files of the standard library are private; the profile must be readable like any new file."""
    (tmp_path / "plain").touch()
    SimilarityProfile(matrices()).save(tmp_path / "p")
    assert (tmp_path / "p").stat().st_mode == (tmp_path / "plain").stat().st_mode


def write_profile(path, **header):
    """A profile file with some header entries replaced."""
    full = {"format": "sere_compile.similarity", "format_version": "1", "library_version": "9.9"}
    save_file(matrices(), path, metadata=full | header)


def test_load_of_a_missing_file(tmp_path):
    with pytest.raises(ProfileError, match=r"there is no file .*none\.safetensors"):
        SimilarityProfile.load(tmp_path / "none.safetensors")


def test_load_of_a_folder_points_to_from_reference(tmp_path):
    with pytest.raises(ProfileError, match=r"is a folder; .*from_reference"):
        SimilarityProfile.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello" * 20])
def test_load_of_something_else(tmp_path, content):
    """Neither safetensors nor torch."""
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ProfileError, match=r"x\.safetensors is not a readable safetensors file"):
        SimilarityProfile.load(tmp_path / "x.safetensors")


def test_load_of_a_truncated_profile(tmp_path):
    """Half a download is refused as a whole."""
    path = tmp_path / "p.safetensors"
    SimilarityProfile(matrices()).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ProfileError, match="not a readable safetensors file"):
        SimilarityProfile.load(path)


def test_load_of_a_model_says_what_it_saw_and_what_to_do(tmp_path):
    """A checkpoint is safetensors as well; its first tensors show the user which file it was."""
    save_file({f"model.w{i}": torch.ones(1) for i in range(7)}, tmp_path / "m.safetensors", {"format": "pt"})
    with pytest.raises(ProfileError) as caught:
        SimilarityProfile.load(tmp_path / "m.safetensors")
    assert re.search(r"not a similarity profile.*model\.w0, .*model\.w4, \.\.\. \(7 in all\)", str(caught.value))
    assert "from_reference" in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_load_of_a_torch_file_names_from_reference(tmp_path, suffix, zipped):
    """By suffix or by contents, in torch's new and old format."""
    path = tmp_path / f"similarity_matrices{suffix}"
    torch.save({0: matrix()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ProfileError, match=r"torch\.save file.*SimilarityProfile\.from_reference\(path\)"):
        SimilarityProfile.load(path)


def test_load_of_a_newer_format(tmp_path):
    """A later library's file is refused with the version that wrote it, not misread."""
    write_profile(tmp_path / "p", format_version="3")
    with pytest.raises(ProfileError, match=r"version 3, written by sere-compile 9\.9.*reads up to 2: upgrade"):
        SimilarityProfile.load(tmp_path / "p")


def test_load_of_a_damaged_version(tmp_path):
    write_profile(tmp_path / "p", format_version="one")
    with pytest.raises(ProfileError, match="format version 'one' is not a number"):
        SimilarityProfile.load(tmp_path / "p")


def test_load_validates_the_matrices(tmp_path):
    """A file with the right mark may still hold wrong matrices."""
    header = {"format": "sere_compile.similarity", "format_version": "1"}
    save_file({"a": torch.ones(2, 3)}, tmp_path / "p", metadata=header)
    with pytest.raises(ProfileError, match=r"a: a similarity matrix is square"):
        SimilarityProfile.load(tmp_path / "p")


def test_library_version_has_a_fallback(monkeypatch):
    """A checkout that was never installed can save profiles too."""

    def missing(name):
        raise profile_file.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(profile_file.importlib.metadata, "version", missing)
    assert profile_file.library_version() == "unknown"


def test_a_profile_without_projections_is_read_by_earlier_versions(tmp_path):
    """Only a file that they would misread has the newer format."""
    SimilarityProfile(matrices()).save(tmp_path / "plain")
    SimilarityProfile(matrices(), None, coefficients()).save(tmp_path / "both")
    versions = []
    for name in ("plain", "both"):
        with safe_open(tmp_path / name, framework="pt") as file:
            versions.append(file.metadata()["format_version"])
    assert versions == ["1", "2"]
    assert SimilarityProfile.load(tmp_path / "plain").projections is None
