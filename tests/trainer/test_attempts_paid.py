"""A cap on the cost pays some of an execution's attempts: the others end before they load anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from g4trainer import deadline


@pytest.mark.parametrize(
    ("paid", "attempt", "works"),
    [(None, "7", True), ("", "7", True), ("3", None, True), ("3", "2", True), ("3", "3", False), ("1", "9", False)],
)
def test_attempts_beyond_the_number_do_not_work(paid: str | None, attempt: str | None, works: bool) -> None:
    stated = {deadline.ATTEMPTS_VARIABLE: paid, "CLOUD_RUN_TASK_ATTEMPT": attempt}
    told = deadline.attempts_used_up({name: value for name, value in stated.items() if value is not None})
    assert (told is None) is works
    assert told is None or f"pays {paid} attempts of this execution, and this is number {int(attempt or 0) + 1}" in told


def test_such_an_attempt_ends_at_once_and_touches_nothing(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x-1"
    run.mkdir(parents=True)
    (run / "recipe.json").write_text("{}")
    environ = os.environ | {deadline.ATTEMPTS_VARIABLE: "2", "CLOUD_RUN_TASK_ATTEMPT": "2"}
    command = [sys.executable, "-X", "importtime", "-m", "g4trainer", "run", str(run)]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 75
    assert "x-1: nothing was done: the cap on the cost pays 2 attempts" in ended.stdout
    assert "g4kit resume x-1 --max-cost USD" in ended.stdout
    assert not [line for line in ended.stderr.splitlines() if line.endswith("| torch")], "it waits for torch"
    assert [path.name for path in run.iterdir()] == ["recipe.json"]
