"""What is recorded for a router weight, and where it lies."""

import gc

import pytest
import torch
from torch import nn

from sere_compile.errors import ProfileError
from sere_compile.passes import COUNTED
from sere_compile.similarity import binding
from sere_compile.similarity.threshold import matrix_in_graph

from .made import E, H, matrix

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def weight():
    return nn.Parameter(torch.zeros(E, H))


def test_what_is_assigned_is_a_copy_of_its_own(weight):
    """In float32, contiguous, usable where gradients are recorded, and nothing that the user changes later."""
    given, coefficients = matrix().double().T, torch.full((E, E), 0.5).half()
    with torch.inference_mode():
        binding.assign(weight, "gate", given, "a file", projection=coefficients)
    given[0, 0], coefficients[0, 1] = 7, 7
    entry = binding.lookup(weight)
    assert (entry.name, entry.source, entry.from_profile, entry.counts) == ("gate", "a file", True, None)
    for value in (entry.matrix, entry.projection):
        assert value.dtype == torch.float32
        assert value.is_contiguous()
        assert not value.is_inference()
        assert not value.requires_grad
    assert torch.equal(entry.matrix, matrix().T)
    # An expert that stays keeps its weight.
    assert torch.equal(entry.projection, torch.full((E, E), 0.5).fill_diagonal_(1.0))


def test_the_users_own_matrix_is_not_taken(weight):
    """Nor are its coefficients written to: they are copied where nothing has to be converted, too."""
    given, coefficients = matrix(), torch.zeros(E, E)
    binding.assign(weight, "gate", given, "", projection=coefficients)
    entry = binding.lookup(weight)
    assert entry.matrix.data_ptr() != given.data_ptr()
    assert entry.projection.data_ptr() != coefficients.data_ptr()
    assert not coefficients.any()


def test_a_weight_without_data_gets_a_matrix_with_data():
    weight = nn.Parameter(torch.zeros(E, H, device="meta"))
    binding.assign(weight, "gate", matrix(), "")
    assert binding.lookup(weight).matrix.device == CPU


def test_counters_outlive_the_matrix(weight):
    """Attaching again changes what is re-routed, not what was counted; a recorded graph goes on adding to it."""
    binding.assign(weight, "gate", matrix(), "", from_profile=False)
    assert not binding.lookup(weight).from_profile
    counts = binding.lookup(weight).counts_on(CPU)
    assert (counts.dtype, counts.tolist()) == (torch.int64, [0] * len(COUNTED))
    assert not counts.is_inference()
    assert binding.lookup(weight).counts_on(CPU) is counts
    binding.assign(weight, "gate", matrix(1), "")
    assert binding.lookup(weight).counts is counts
    assert torch.equal(binding.lookup(weight).matrix, matrix(1))
    assert binding.lookup(weight).counts_on(META).device == META


def test_every_change_has_a_version_of_its_own(weight):
    """Graphs that remember what they bound ask again when it differs."""
    versions = [binding.version()]
    binding.assign(weight, "gate", matrix(), "")
    versions.append(binding.version())
    binding.assign(weight, "gate", matrix(), "")
    versions.append(binding.version())
    assert binding.forget(weight)
    versions.append(binding.version())
    assert versions == sorted(set(versions))
    assert not binding.forget(weight)
    assert binding.lookup(weight) is None


def test_a_name_makes_an_entry_once(weight):
    """Without a matrix; a name that is known already stays."""
    version = binding.version()
    entry = binding.name(weight, "first")
    assert (entry.name, entry.matrix, entry.projection) == ("first", None, None)
    assert binding.name(weight, "second") is entry
    assert binding.lookup(weight) is entry
    assert entry.name == "first"
    assert binding.version() == version
    with pytest.raises(AssertionError, match="no matrix bound for first"):
        entry.matrix_on(CPU)
    with pytest.raises(ProfileError, match="none for first"):
        entry.projection_on(CPU)


def test_matrices_keep_their_address(weight):
    """A recorded graph reads them there; ranks are counted once for each threshold."""
    binding.assign(weight, "gate", matrix(), "", projection=torch.zeros(E, E))
    entry = binding.lookup(weight)
    bound = entry.matrix
    assert entry.matrix_on(CPU) is bound
    assert entry.matrix_on(CPU, 0.3) is bound
    few, many = entry.matrix_on(CPU, "q0.1"), entry.matrix_on(CPU, "q0.5")
    assert entry.matrix_on(CPU, "q0.1") is few
    assert entry.matrix_on(CPU, "q0.5") is many
    assert torch.equal(few, matrix_in_graph(matrix(), "q0.1"))
    assert torch.equal(many, matrix_in_graph(matrix(), "q0.5"))
    assert entry.projection_on(CPU) is entry.projection


def test_matrices_move_to_another_device(weight):
    """And stay there."""
    binding.assign(weight, "gate", matrix(), "", projection=torch.zeros(E, E))
    entry = binding.lookup(weight)
    with torch.inference_mode():
        moved = entry.matrix_on(META), entry.projection_on(META), entry.counts_on(META)
    assert {value.device for value in moved} == {META}
    assert not any(value.is_inference() for value in moved)
    assert entry.matrix is moved[0]
    assert entry.projection_on(META) is moved[1]
    assert entry.counts_on(META) is moved[2]


def test_a_weight_is_not_kept_alive():
    gc.collect()  # weights of other tests
    weight = nn.Parameter(torch.zeros(E, H))
    binding.assign(weight, "gate", matrix(), "")
    number = len(binding._entries)
    del weight
    gc.collect()
    assert len(binding._entries) == number - 1


def test_why_nothing_is_counted_is_remembered():
    weight, other = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(2))
    binding.note_uncounted(weight, "no room")
    assert (binding.uncounted(weight), binding.uncounted(other)) == ("no room", "")
