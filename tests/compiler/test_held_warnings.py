"""Warnings that one thread holds back are its own, and nothing of the process is changed afterwards."""

import logging
import threading
import warnings

import pytest

from sere_compile.compiler.held_warnings import held_warnings, in_trial


@pytest.fixture(autouse=True)
def given():
    """What is shown, of any thread."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        yield shown


def texts(found):
    return [str(one.message) for one in found]


def in_thread(do):
    thread = threading.Thread(target=do)
    thread.start()
    return thread


def test_they_are_held_and_not_shown(given):
    before = warnings.showwarning
    with held_warnings() as held:
        warnings.warn("one", FutureWarning, stacklevel=1)
    assert (texts(held), held[0].category, held[0].filename) == (["one"], FutureWarning, __file__)
    assert not given
    assert warnings.showwarning is before


def test_those_of_a_call_in_a_call_are_its_own(given):
    with held_warnings() as outer:
        with held_warnings() as inner:
            warnings.warn("inner", stacklevel=1)
        warnings.warn("outer", stacklevel=1)
    assert (texts(inner), texts(outer), texts(given)) == (["inner"], ["outer"], [])


def test_calls_of_threads_that_overlap(given):
    """The thread that leaves last puts back what was in place before any of them."""
    before, entered, left = warnings.showwarning, threading.Event(), threading.Event()
    found = []

    def other():
        with held_warnings() as held:
            entered.set()
            assert left.wait(10)
            warnings.warn("of the other thread", stacklevel=1)
            found.extend(held)

    with held_warnings() as held:
        thread = in_thread(other)
        assert entered.wait(10)
        warnings.warn("of this one", stacklevel=1)
    warnings.warn("shown", stacklevel=1)
    left.set()
    thread.join()
    assert warnings.showwarning is before
    assert (texts(held), texts(found), texts(given)) == (["of this one"], ["of the other thread"], ["shown"])


def test_who_shows_warnings_otherwise_meanwhile_goes_on(given):
    """As `logging.captureWarnings` does, which keeps what was in place and puts it back at any time."""
    with held_warnings():
        kept = warnings.showwarning
        warnings.showwarning = lambda *shown: kept(*shown)
    warnings.warn("passed on", stacklevel=1)
    warnings.showwarning = kept
    with held_warnings() as held:
        warnings.warn("held", stacklevel=1)
    warnings.warn("shown", stacklevel=1)
    assert (texts(held), texts(given)) == (["held"], ["passed on", "shown"])


def test_code_that_was_tried_warns_when_it_runs(given):
    """Python gives a warning of one line once, unless it is told to."""
    warnings.simplefilter("default")

    def program():
        warnings.warn("of the program", stacklevel=1)

    for _ in range(2):
        with in_trial():
            program()
    assert not given
    for _ in range(2):
        program()
    assert texts(given) == ["of the program"]


def test_an_error_ends_it(given):
    before = warnings.showwarning
    with pytest.raises(ValueError, match="here"), held_warnings():
        raise ValueError("here")
    with pytest.raises(ValueError, match="here"), in_trial():
        raise ValueError("here")
    assert warnings.showwarning is before
    warnings.warn("shown", stacklevel=1)
    assert texts(given) == ["shown"]


def test_what_torch_logs_of_inputs_that_do_not_fit(caplog):
    """In a trial they are made up, and say nothing of the program."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    with in_trial():
        logger.error("of a trial")
    assert caplog.messages == []
    logger.error("of the program")
    assert caplog.messages == ["of the program"]
