"""Objects are told apart for good."""

import torch

from sere_compile.passes.graph.identity import identity


def test_of_one_object_it_stays():
    for value in (lambda x: x, slice(2), torch.ones(2), torch.nn.Linear(2, 2), [1]):
        assert identity(value) == identity(value)


def test_no_other_object_gets_it():
    """Also where it is equal, or stands at the address of one that is gone."""
    found = [identity(torch.ones(2)), identity(torch.ones(2)), *(identity(slice(number)) for number in range(20))]
    for _ in range(20):
        found.append(identity(lambda x: x))
        found.append(identity(object()))
    assert len(set(found)) == len(found)
