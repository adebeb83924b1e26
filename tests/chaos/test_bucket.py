"""On a mounted bucket (simulated, see layer.py): no wrong state, one writer, and no object written too often."""

import itertools
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from chaos.attempts import Attempt, Server, assert_same_result, committed_steps
from g4trainer.claims import BEATS_TO_DEATH
from g4trainer.rundir import RunDir, read_json

AGE_S = 0.5
INTERVAL_S = 0.5
"""A metadata age and a status interval, scaled down from a minute and 15 s."""
ON_A_MOUNT: Any = {"G4KIT_METADATA_AGE_S": str(AGE_S), "G4KIT_STATUS_INTERVAL_S": str(INTERVAL_S)}
TOLERANCE_S = 0.02


def bucket(journal: Path, **options: Any) -> dict[str, Any]:
    return {"bucket": {"age_s": AGE_S, "journal": str(journal), **options}}


def writes(journal: Path) -> dict[str, list[tuple[float, int]]]:
    """Time and process of every write of every object, by its path."""
    found = defaultdict(list)
    for line in journal.read_text().splitlines():
        at, pid, _, path = line.split(maxsplit=3)
        found[path].append((float(at), int(pid)))
    assert found
    return found


def test_killed_and_failing_on_a_bucket_a_run_ends_with_its_result(
    server: Server, undisturbed: RunDir, run: RunDir, journal: Path
) -> None:
    killed = server.run(run, layer=bucket(journal) | {"under": "checkpoints", "kill_at": 46}, **ON_A_MOUNT)
    assert killed.status == -signal.SIGKILL, killed.log
    committed = committed_steps(run)
    assert committed, "killed in the middle of a later checkpoint"
    assert len(list(run.checkpoints.iterdir())) > len(committed), "with a cut object left behind"
    failed = server.run(run, layer=bucket(journal, close_fails=24), **ON_A_MOUNT)
    assert failed.status == 1, failed.log
    assert "close failed" in failed.log
    resumed = server.run(run, layer=bucket(journal), **ON_A_MOUNT)
    assert resumed.status == 0, resumed.log
    assert_same_result(run, undisturbed)
    for path, each in writes(journal).items():
        times = [at for at, _ in each]
        closest = min((later - earlier for earlier, later in itertools.pairwise(times)), default=INTERVAL_S)
        assert closest >= INTERVAL_S - TOLERANCE_S, f"{path} was written twice within {closest:.3f} s"


@pytest.mark.parametrize("mounted", [False, True], ids=["local", "mounted"])
def test_of_processes_started_together_one_goes_on(
    server: Server, undisturbed: RunDir, run: RunDir, journal: Path, mounted: bool
) -> None:
    options: dict[str, Any] = {"layer": bucket(journal), **ON_A_MOUNT} if mounted else {}
    together = [server.start(run, **options) for _ in range(3)]
    codes = [attempt.wait() for attempt in together]
    assert sorted(codes) == [0, 1, 1], [attempt.log for attempt in together]
    for attempt in together:
        gave_way = "is writing this run" in attempt.log or "took over" in attempt.log  # the latter where it was starved
        assert attempt.status == 0 or gave_way, attempt.log
    assert_same_result(run, undisturbed)
    if mounted:
        winner = next(attempt.pid for attempt in together if attempt.status == 0)
        others = {path for path, each in writes(journal).items() for _, pid in each if pid != winner}
        assert all("/claims/" in path for path in others), "who lost wrote nothing but its claim"


@pytest.mark.slow
def test_a_later_process_finds_the_run_taken(server: Server, run: RunDir, journal: Path) -> None:
    first = server.start(run, layer=bucket(journal), faults={"slow_steps": [1.0]}, **ON_A_MOUNT)
    first.wait_for("step 1 of")
    second = server.run(run, layer=bucket(journal), **ON_A_MOUNT)
    assert second.status == 1
    assert "attempt 1 on" in second.log
    first.send(signal.SIGKILL)
    first.wait()


def test_who_stood_still_too_long_gives_way(server: Server, undisturbed: RunDir, run: RunDir, journal: Path) -> None:
    """And how long that takes is measured: the window in which two may write."""
    frozen = server.start(run, layer=bucket(journal), faults={"slow_steps": [0.3]}, **ON_A_MOUNT)
    frozen.wait_for("checkpoint of step 1")
    frozen.send(signal.SIGSTOP)
    stopped = time.monotonic()
    successor = server.start(run, layer=bucket(journal), faults={"slow_steps": [0.3]}, **ON_A_MOUNT)
    successor.wait_for("phase train")
    assert time.monotonic() - stopped >= BEATS_TO_DEATH * INTERVAL_S + AGE_S - INTERVAL_S
    frozen.send(signal.SIGCONT)
    woken = time.monotonic()
    assert frozen.wait() == 1, frozen.log
    assert "took over while this attempt stood still" in frozen.log
    window_s = time.monotonic() - woken
    by_frozen = [(path, at - woken) for path, each in writes(journal).items() for at, pid in each if pid == frozen.pid]
    late = [(path, after_s) for path, after_s in by_frozen if after_s > 0]
    print(f"two processes for {window_s:.2f} s; the frozen one wrote {[Path(path).name for path, _ in late]}")
    assert not any(path.endswith("COMMITTED.json") for path, _ in late), late
    assert sum(path.endswith("status.json") for path, _ in late) <= 1, late
    assert successor.wait() == 0, successor.log
    assert_same_result(run, undisturbed)
    assert read_json(run.results)["attempts"] == 2


def test_another_attempt_that_finished_meanwhile_is_left_alone(
    server: Server, undisturbed: RunDir, run: RunDir, journal: Path
) -> None:
    first = server.start(run, layer=bucket(journal), **ON_A_MOUNT)
    first.wait_for("phase final")
    late: Attempt = server.start(run, layer=bucket(journal), **ON_A_MOUNT)
    assert first.wait() == 0
    assert late.wait() in (0, 1), late.log
    assert "phase baseline" not in late.log
    assert_same_result(run, undisturbed)
    assert read_json(run.status)["state"] == "succeeded"
