"""Long lists of cases: the default suite takes some, the lane `slow` the others."""

import pytest


def thinned(cases, keep):
    """The cases as parameters (a tuple: of several names), those whose place is not in `keep` marked `slow`."""
    cases = list(cases)
    assert set(keep) < set(range(len(cases))), "keeps what is not there, or everything"
    several = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=() if place in keep else pytest.mark.slow) for place, case in enumerate(several)]
