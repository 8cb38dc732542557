"""python -m tests.mutation.sample: the drawn sample that CI judges, with a bound that only rises."""

from __future__ import annotations

import sys

from . import run, server

COUNT, SEED = 40, 15
# Mutants of the sample that their tests kill, at least. When tests are added, raise it to what the lane prints.
AT_LEAST = 20


def main() -> int:
    """Judges the sample."""
    drawn = run.draw(run.population(), COUNT, SEED)
    server.prepare()
    verdicts = run.judge(drawn, jobs=2)
    alive = [str(mutant) for mutant, verdict in verdicts.items() if not verdict.killed]
    killed = len(verdicts) - len(alive)
    print("\n== alive", *alive, "", run.table(verdicts), sep="\n")
    print(f"{killed} of {len(verdicts)} killed, at least {AT_LEAST} asked for (tests/mutation/sample.py)")
    return int(killed < AT_LEAST)


if __name__ == "__main__":
    sys.exit(main())
