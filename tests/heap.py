"""The heap of a test process, which grows with what torch remembers of every test."""

import gc

MANY = 300_000


def set_aside():
    """What tests before left behind, once it is much, is never collected nor scanned again.

    Finding a weight's owner scans the heap for modules. No model may live longer than the test or file before this.
    """
    if len(gc.get_objects()) > MANY:
        gc.collect()
        gc.freeze()
