"""A run's state from its execution and its files, decided without either."""

import datetime
from typing import Any

import pytest

from g4kit.cloud.base import Execution, ExecutionState, Task
from g4kit.following import describe, exit_code, worth_another_execution
from g4kit.runs import RunView, combine

START = datetime.datetime(2026, 1, 1, 12, 0, tzinfo=datetime.UTC)
RECIPE = {
    "recipe": {"name": "tiny", "model": {"id": "m"}, "data": {"dataset": "d"}},
    "target": "local",
    "created_at": START.isoformat(),
}
FAILED = {"exit_code": 3, "reason": "out of GPU memory", "remedy": "write model.max_soft_tokens = 140"}
RESULTS = {"baseline": {"accuracy": 0.1}, "final": {"accuracy": 0.95}, "artifacts": {"a": {}}}


def execution(state: ExecutionState, code: int | None = None, message: str = "") -> Execution:
    return Execution("run-a", "run", "a", state, START, START, None, (Task(0, state, 0, code),), message)


def status(state: str, seconds: float = 1, **more: Any) -> dict[str, Any]:
    """seconds: of the heartbeat, after the execution's start."""
    return {"state": state, "heartbeat": (START + datetime.timedelta(seconds=seconds)).isoformat(), **more}


def view(
    execution: Execution | None,
    status: dict[str, Any] | None = None,
    failed: dict[str, Any] | None = None,
    results: dict[str, Any] | None = None,
    after_s: float = 2,
) -> RunView:
    return combine("run", RECIPE, execution, status, failed, results, START + datetime.timedelta(seconds=after_s))


RUNNING, PENDING = execution(ExecutionState.RUNNING), execution(ExecutionState.PENDING)


@pytest.mark.parametrize(
    ("found", "state", "live"),
    [
        (view(None), "pending", False),
        (view(PENDING), "pending", True),
        (view(RUNNING), "loading", True),
        (view(RUNNING, status("loading")), "loading", True),
        (view(RUNNING, status("running")), "running", True),
        (view(RUNNING, status("interrupted")), "interrupted", True),
        (view(RUNNING, status("failed")), "interrupted", True),  # a retry follows
        (view(RUNNING, status("running", seconds=-1)), "loading", True),  # of an earlier execution
        (view(RUNNING, status("succeeded", seconds=-1)), "loading", True),
        (view(RUNNING, status("failed"), FAILED), "failed", False),  # further attempts cannot help
        (view(RUNNING, status("succeeded"), results=RESULTS), "succeeded", False),
        (view(execution(ExecutionState.SUCCEEDED, 0), status("succeeded"), results=RESULTS), "succeeded", False),
        (view(execution(ExecutionState.CANCELLED, 75), status("interrupted")), "cancelled", False),
        (view(execution(ExecutionState.CANCELLED, 75), status("succeeded"), results=RESULTS), "succeeded", False),
        (view(execution(ExecutionState.FAILED, 75), status("interrupted")), "interrupted", False),
        (view(execution(ExecutionState.FAILED, None), status("running")), "interrupted", False),
        (view(execution(ExecutionState.FAILED, None)), "failed", False),
        (view(execution(ExecutionState.FAILED, 1), status("interrupted")), "failed", False),
        (view(execution(ExecutionState.FAILED, 1), status("running")), "failed", False),
        (view(execution(ExecutionState.FAILED, 3), status("failed"), FAILED), "failed", False),
        (view(execution(ExecutionState.SUCCEEDED, 0), status("running")), "failed", False),
    ],
)
def test_states(found: RunView, state: str, live: bool) -> None:
    assert (found.state, found.live) == (state, live)


def test_messages() -> None:
    assert view(None).message == "never started; write: g4kit resume run"
    assert view(execution(ExecutionState.FAILED, 1, "ended with exit code 1")).message == "ended with exit code 1"
    assert "wrote no results.json" in view(execution(ExecutionState.SUCCEEDED, 0)).message
    assert view(RUNNING, status("running"), after_s=100).message == ""
    assert view(RUNNING, status("running"), after_s=500).message == "no heartbeat for 499 s"
    assert view(RUNNING, status("running", message="halved the micro-batch")).message == "halved the micro-batch"


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (view(RUNNING, results=RESULTS), 0),
        (view(execution(ExecutionState.FAILED, 1)), 1),
        (view(execution(ExecutionState.FAILED, 2), None, FAILED | {"exit_code": 2}), 2),
        (view(execution(ExecutionState.FAILED, 1), None, FAILED), 3),
        (view(execution(ExecutionState.FAILED, 75)), 75),
        (view(execution(ExecutionState.FAILED, 130)), 130),
        (view(execution(ExecutionState.FAILED, 137)), 1),
        (view(execution(ExecutionState.FAILED, None)), 1),
        (view(execution(ExecutionState.CANCELLED, 75)), 75),
        (view(execution(ExecutionState.SUCCEEDED, 0)), 1),  # no results
    ],
)
def test_exit_codes_of_wait(found: RunView, code: int) -> None:
    assert exit_code(found) == code


@pytest.mark.parametrize(
    ("found", "furthest", "worth"),
    [
        (view(execution(ExecutionState.FAILED, 75), status("interrupted", step=5)), 4, True),
        (view(execution(ExecutionState.FAILED, 1), status("running", step=5)), 0, True),
        (view(execution(ExecutionState.FAILED, 75), status("interrupted", step=5)), 5, False),
        (view(execution(ExecutionState.FAILED, 1), None), 0, False),
        (view(execution(ExecutionState.FAILED, 3), status("failed", step=5), FAILED), 0, False),
        (view(execution(ExecutionState.CANCELLED, 75), status("interrupted", step=5)), 0, False),
        (view(RUNNING, status("running", step=5), results=RESULTS), 0, False),
    ],
)
def test_another_execution_is_started_only_while_there_is_progress(found: RunView, furthest: int, worth: bool) -> None:
    assert worth_another_execution(found, furthest) is worth


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (view(PENDING), "pending"),
        (
            view(
                RUNNING,
                status(
                    "running",
                    phase="train",
                    step=120,
                    total_steps=350,
                    loss=0.34561,
                    samples_per_second=57.26,
                    eta_s=80,
                ),
            ),
            "running · train · step 120/350 · loss 0.3456 · 57.3 samples/s · 1 min 20 s left",
        ),
        (
            view(RUNNING, status("running", phase="baseline", step=0, progress={"done": 32, "total": 397}, eta_s=3700)),
            "running · baseline · 32/397 images · 1 h 1 min left",
        ),
        (view(execution(ExecutionState.FAILED, 3), None, FAILED), "failed · out of GPU memory"),
        (view(RUNNING, results=RESULTS), "succeeded · accuracy 0.1000 -> 0.9500"),
        (view(RUNNING, results=RESULTS | {"baseline": None}), "succeeded · accuracy 0.9500"),
        (view(RUNNING, results={"state": "succeeded", "final": {"accuracy": None}}), "succeeded"),
        (view(execution(ExecutionState.FAILED, 1, "ended with exit code 1")), "failed · ended with exit code 1"),
    ],
)
def test_the_line_that_is_shown(found: RunView, line: str) -> None:
    assert describe(found) == line
