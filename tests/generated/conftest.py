"""The fresh seed of a run, which every process of it shares, and which the header prints."""

import os
import random

FRESH = "SERE_GENERATED_SEED"


def pytest_configure(config):
    """Draw the seed, unless the environment names one to run again."""
    os.environ.setdefault(FRESH, str(random.SystemRandom().randrange(10**6, 10**9)))


def pytest_report_header(config):
    """How to run the same fresh programs again."""
    return f"generated programs: {FRESH}={os.environ[FRESH]}"
