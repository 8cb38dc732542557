"""The lanes of .ci/run: each is defined, and the workflow runs every one of them."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
SCRIPT = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_lane_is_defined_and_run_by_the_workflow():
    lanes = re.findall(r"^(?:\[.*\] && )?lane (\w+) (\w+)$", SCRIPT, re.MULTILINE)
    assert {"readme", "lint"} < {name for name, _ in lanes}
    assert [command for _, command in lanes if not re.search(rf"^{command}\(\) {{", SCRIPT, re.MULTILINE)] == []

    run = [lane for job in WORKFLOW["jobs"].values() for lane in job["strategy"]["matrix"]["lane"]]
    assert sorted(run) == sorted(name for name, _ in lanes)
    for job in WORKFLOW["jobs"].values():
        assert job["steps"][-1]["run"] == ".ci/run ${{ matrix.lane }}"


def test_hooks_are_what_the_lanes_run():
    """A commit that the hooks let through is not refused by the lanes `lint` and `types` for the same reason."""
    (repository,) = HOOKS["repos"]
    commands = [hook["entry"].removesuffix(" --force-exclude") for hook in repository["hooks"]]
    assert len(commands) == 4
    assert [command for command in commands if command not in SCRIPT] == []


def test_tools_that_change_a_verdict_are_pinned():
    constraints = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8")
    pinned = re.findall(r"^(\w+)==[\d.]+$", constraints, re.MULTILINE)
    assert set(pinned) == {"torch", "ruff", "mypy", "codespell"}
