"""Every model class without experts through the backend, and what became of each.

python -m tests.zoo.plain.run                                   # all: a line each, 35 minutes of one core
python -m tests.zoo.plain.run BertForSequenceClassification     # these only
"""

from __future__ import annotations

import argparse
import collections
import gc
import logging
import sys
import warnings

import torch

from .discover import ModelClass, model_classes
from .topped import NotSmallError, build, judge

TORCH_FAILS = "torch fails"


def outcome(made: ModelClass) -> tuple[str, str]:
    """What became of a class, in a word, and in detail.

    "untouched", "touched", "error" (only with this library), "not small" (no try builds or runs it), or "torch fails"
    (without this library as well).
    """
    try:
        case = build(made)
    except (NotSmallError, ImportError) as error:
        return "not small", " ".join(str(error).split())
    torch._dynamo.reset()
    try:
        verdict = judge(case)
    except Exception as error:  # noqa: BLE001 (whatever it raises is the finding)
        return _failed(case, error)
    finally:
        torch._dynamo.reset()
    if not verdict.untouched:
        return "touched", str(verdict)
    return "untouched", f"{case.number} as {case.kind}, top {case.model.top_k}"


def _failed(case, error: Exception) -> tuple[str, str]:
    """Whether torch compiles the model without this library."""
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(case.model, backend="eager")(**case.call)
    except Exception as own:  # noqa: BLE001 (what Dynamo raises has no common class)
        return TORCH_FAILS, f"{type(own).__name__}: {' '.join(str(own).split())[:160]}"
    return "error", f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status is 1 where a class was touched or stopped by an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="classes, by default all")
    names = parser.parse_args(arguments).names or list(model_classes())
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for logger in ("torch", "transformers"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    gc.collect()
    gc.freeze()
    words: collections.Counter[str] = collections.Counter()
    for name in names:
        made = model_classes()[name]
        word, detail = outcome(made)
        words[word] += 1
        print(f"{name}\t{made.task}\t{word}\t{detail}", flush=True)
    print(", ".join(f"{count} {word}" for word, count in words.most_common()))
    return int(words["touched"] + words["error"] > 0)


if __name__ == "__main__":
    sys.exit(main())
