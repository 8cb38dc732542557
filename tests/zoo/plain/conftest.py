"""The seed of the freshly drawn classes, which every process of a run shares, and which the header prints."""

import os
import random

FRESH = "SERE_PLAIN_SEED"


def pytest_configure(config):
    """Draw the seed, unless the environment names one to run again."""
    os.environ.setdefault(FRESH, str(random.SystemRandom().randrange(10**6)))


def pytest_report_header(config):
    """How to run the same classes again."""
    return f"model classes without experts: {FRESH}={os.environ[FRESH]}"
