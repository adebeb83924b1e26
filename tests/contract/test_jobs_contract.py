"""What every target's jobs do. What a job does is written in its arguments, see task.py."""

import datetime
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from contract.conftest import ACCELERATORS, ALL_AT_ONCE
from contract.waiting import wait, wait_until
from g4kit.cloud.base import Cloud, Execution, ExecutionNotFoundError, ExecutionState, JobRequest, ObjectNameError, Task
from g4trainer.exits import FINAL

Start = Callable[..., Execution]


def logged(cloud: Cloud, execution: Execution) -> list[str]:
    """What the attempts themselves wrote."""
    return [line.text for line in cloud.logs.read(execution.name) if not line.text.startswith("g4kit:")]


def test_a_job_succeeds(cloud: Cloud, start: Start) -> None:
    before = datetime.datetime.now(datetime.UTC)
    started = start("print:hello", run_id="run-a", launch_id="0a1b")
    assert (started.run_id, started.launch_id) == ("run-a", "0a1b")
    ended = wait(cloud, started.name)
    assert ended.state is ExecutionState.SUCCEEDED
    assert ended.tasks == (Task(0, ExecutionState.SUCCEEDED, 0, 0),)
    assert (ended.exit_code, ended.attempt, ended.message) == (0, 0, "")
    assert ended.started_at is not None
    assert ended.finished_at is not None
    assert before <= ended.created_at <= ended.started_at <= ended.finished_at
    assert logged(cloud, ended) == ["hello"]


def test_the_times_of_a_task_are_those_of_its_attempts(cloud: Cloud, start: Start) -> None:
    started = start("sleep:0.2", "exit-at:0=1", task_count=2, max_attempts=2)
    running = wait_until(lambda: cloud.jobs.get(started.name), lambda found: found.state is ExecutionState.RUNNING)
    assert running.tasks[0].finished_at is None
    ended = wait(cloud, started.name)
    assert [found.tasks for found in cloud.jobs.find(started.run_id)] == [ended.tasks]
    first, second = cloud.jobs.find(started.run_id)[0].tasks
    for task in (first, second):
        assert task.started_at is not None
        assert task.finished_at is not None
        assert 0.4 <= (task.finished_at - task.started_at).total_seconds() < 10
        assert ended.created_at <= task.started_at
    if cloud.target not in ALL_AT_ONCE:
        assert first.finished_at <= second.started_at  # type: ignore[operator]


def test_a_task_that_never_ran_has_no_times(cloud: Cloud, start: Start) -> None:
    started = start("on-term:75", "print:up", "sleep:60", task_count=2)
    wait_until(lambda: logged(cloud, started), bool)
    cloud.jobs.cancel(started.name)
    wait(cloud, started.name)
    first, second = cloud.jobs.get(started.name).tasks
    assert first.finished_at is not None
    if cloud.target not in ALL_AT_ONCE:
        assert (second.started_at, second.finished_at) == (None, None)


def test_run_returns_while_the_job_goes_on(cloud: Cloud, start: Start) -> None:
    begun = time.monotonic()
    started = start("print:up", "sleep:30")
    assert time.monotonic() - begun < 5
    assert started.active
    running = wait_until(lambda: cloud.jobs.get(started.name), lambda found: found.state is ExecutionState.RUNNING)
    assert running.tasks[0].exit_code is None
    assert running.finished_at is None


def test_the_environment_is_cloud_runs(cloud: Cloud, start: Start) -> None:
    names = [
        "CLOUD_RUN_JOB",
        "CLOUD_RUN_EXECUTION",
        "CLOUD_RUN_TASK_INDEX",
        "CLOUD_RUN_TASK_COUNT",
        "CLOUD_RUN_TASK_ATTEMPT",
        "G4KIT_ATTEMPT_TIMEOUT_S",
        "SECRET",
    ]
    started = start(*[f"env:{name}" for name in names], timeout_s=61, env={"SECRET": "s3cr3t"})
    ended = wait(cloud, started.name)
    found = dict(line.split("=", 1) for line in logged(cloud, ended))
    assert found.pop("CLOUD_RUN_JOB")
    assert found == {
        "CLOUD_RUN_EXECUTION": started.name,
        "CLOUD_RUN_TASK_INDEX": "0",
        "CLOUD_RUN_TASK_COUNT": "1",
        "CLOUD_RUN_TASK_ATTEMPT": "0",
        "G4KIT_ATTEMPT_TIMEOUT_S": "61",
        "SECRET": "s3cr3t",
    }


def test_the_job_sees_the_bucket_by_its_path(cloud: Cloud, start: Start) -> None:
    cloud.bucket.write("runs/run-1/recipe.json", b"{}")
    path = cloud.bucket.job_path("runs/run-1")
    wait(cloud, start(f"write:{path}/result=done").name)
    assert cloud.bucket.read("runs/run-1/result") == b"done"


def test_every_failed_attempt_is_retried(cloud: Cloud, start: Start) -> None:
    started = start("env:CLOUD_RUN_TASK_ATTEMPT", "exit-at:0=75", "exit-at:1=1", max_attempts=5)
    ended = wait(cloud, started.name)
    assert ended.tasks == (Task(0, ExecutionState.SUCCEEDED, 2, 0),)
    assert logged(cloud, ended) == [f"CLOUD_RUN_TASK_ATTEMPT={attempt}" for attempt in range(3)]


@pytest.mark.parametrize("code", [1, 75])
def test_retries_are_used_up(cloud: Cloud, start: Start, code: int) -> None:
    ended = wait(cloud, start("print:try", f"exit:{code}", max_attempts=3).name)
    assert ended.state is ExecutionState.FAILED
    assert (ended.exit_code, ended.attempt) == (code, 2)
    assert str(code) in ended.message
    assert logged(cloud, ended) == ["try"] * 3


def test_where_no_retry_can_help_none_is_made(cloud: Cloud, start: Start) -> None:
    """Cloud Run alone knows of no such code, and tries again: an attempt then ends at once."""
    code = min(FINAL)
    ended = wait(cloud, start("print:try", f"exit:{code:d}", max_attempts=2).name)
    assert (ended.state, ended.exit_code) == (ExecutionState.FAILED, code)
    assert logged(cloud, ended) == ["try"] * (2 if cloud.target == "cloudrun" else 1)


def test_an_attempt_killed_by_a_signal_is_retried(cloud: Cloud, start: Start) -> None:
    ended = wait(cloud, start("print:up", f"kill:{signal.SIGKILL:d}", max_attempts=2).name)
    assert ended.state is ExecutionState.FAILED
    assert ended.exit_code == 137
    assert logged(cloud, ended) == ["up", "up"]


def test_the_time_limit_holds_for_each_attempt(cloud: Cloud, start: Start) -> None:
    begun = time.monotonic()
    ended = wait(cloud, start("on-term:75", "print:up", "sleep:60", timeout_s=1, max_attempts=2).name)
    assert 2 <= time.monotonic() - begun < 12
    assert ended.state is ExecutionState.FAILED
    assert (ended.exit_code, ended.attempt) == (75, 1)
    assert logged(cloud, ended) == ["up", "stopping"] * 2


def test_an_attempt_that_ignores_its_time_limit_is_killed(cloud: Cloud, start: Start) -> None:
    ended = wait(cloud, start("ignore-term:", "print:up", "sleep:60", timeout_s=1).name)
    assert ended.exit_code == 137
    assert "timed out" in ended.message


def test_cancelling_lets_the_attempt_stop_itself(cloud: Cloud, start: Start) -> None:
    started = start("on-term:75", "print:up", "sleep:60", max_attempts=5)
    wait_until(lambda: logged(cloud, started), lambda lines: lines == ["up"])
    cloud.jobs.cancel(started.name)
    ended = wait(cloud, started.name)
    assert ended.state is ExecutionState.CANCELLED
    assert (ended.exit_code, ended.attempt) == (75, 0)
    assert logged(cloud, ended) == ["up", "stopping"]


def test_cancelling_kills_what_does_not_stop_and_all_that_it_started(cloud: Cloud, start: Start) -> None:
    started = start("ignore-term:", "child:60", "sleep:60")
    child = int(wait_until(lambda: logged(cloud, started), bool)[0].removeprefix("child "))
    cloud.jobs.cancel(started.name)
    ended = wait(cloud, started.name)
    assert (ended.state, ended.exit_code) == (ExecutionState.CANCELLED, 137)
    wait_until(lambda: is_alive(child), lambda alive: not alive)


def test_what_an_ended_attempt_left_running_is_killed(cloud: Cloud, start: Start) -> None:
    started = start("child:60")
    ended = wait(cloud, started.name)
    assert ended.state is ExecutionState.SUCCEEDED
    child = int(logged(cloud, ended)[0].removeprefix("child "))
    wait_until(lambda: is_alive(child), lambda alive: not alive)


def test_cancelling_what_has_ended_changes_nothing(cloud: Cloud, start: Start) -> None:
    ended = wait(cloud, start("exit:0").name)
    cloud.jobs.cancel(ended.name)
    assert cloud.jobs.get(ended.name) == ended


def test_one_launch_id_is_one_execution(cloud: Cloud, start: Start) -> None:
    first = start("print:once", "sleep:1", launch_id="same")
    second = start("print:once", "sleep:1", launch_id="same")
    assert second.name == first.name
    ended = wait(cloud, first.name)
    third = start("print:once", launch_id="same")
    assert third == ended
    assert logged(cloud, ended) == ["once"]
    assert [execution.name for execution in cloud.jobs.find()] == [first.name]


def test_executions_are_found_by_run_oldest_first(cloud: Cloud, start: Start) -> None:
    names = [start("exit:0", run_id=run_id).name for run_id in ("run-1", "run-2", "run-1", "run-1-more")]
    assert [execution.name for execution in cloud.jobs.find()] == names
    assert [execution.name for execution in cloud.jobs.find("run-1")] == [names[0], names[2]]
    assert cloud.jobs.find("run-3") == []


def test_several_tasks(cloud: Cloud, start: Start) -> None:
    started = start("env:CLOUD_RUN_TASK_INDEX", "env:CLOUD_RUN_TASK_COUNT", "exit-at:0=9", task_count=3, max_attempts=2)
    ended = wait(cloud, started.name)
    assert ended.tasks == tuple(Task(index, ExecutionState.SUCCEEDED, 1, 0) for index in range(3))
    counts = [line for line in logged(cloud, ended) if line == "CLOUD_RUN_TASK_COUNT=3"]
    assert len(counts) == 6
    assert {(line.task, line.attempt) for line in cloud.logs.read(started.name)} == {
        (task, attempt) for task in range(3) for attempt in range(2)
    }
    assert [found.name for found in cloud.jobs.find(started.run_id)] == [started.name]


def test_a_task_that_fails_stops_no_other(cloud: Cloud, start: Start) -> None:
    started = start("exit-task:1=3", "print:done", task_count=3)
    ended = wait(cloud, started.name)
    assert ended.state is ExecutionState.FAILED
    assert [task.exit_code for task in ended.tasks] == [0, 3, 0]
    assert ended.exit_code == 3
    assert ended.message.startswith("task 1 ended with exit code 3")


def test_cancelling_ends_every_task(cloud: Cloud, start: Start) -> None:
    started = start("on-term:75", "print:up", "sleep:60", task_count=2)
    wait_until(lambda: logged(cloud, started), bool)
    cloud.jobs.cancel(started.name)
    ended = wait(cloud, started.name)
    assert (ended.state, ended.exit_code) == (ExecutionState.CANCELLED, 75)


@pytest.mark.parametrize("name", ["no-such", "../../x", "a/b"])
def test_an_unknown_execution(cloud: Cloud, name: str) -> None:
    for use in (cloud.jobs.get, cloud.jobs.cancel, lambda name: list(cloud.logs.read(name))):
        with pytest.raises((ExecutionNotFoundError, ObjectNameError)):
            use(name)


def test_a_job_that_can_run_has_no_problems(cloud: Cloud) -> None:
    assert cloud.jobs.problems(JobRequest("run-1", "a", (), 60, 1, ACCELERATORS[cloud.target])) == []


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits to be collected does not."""
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_what_a_target_has_for_an_accelerator_and_without_one(cloud: Cloud) -> None:
    """The image is frozen into recipe.json; the job without a GPU stages from a model hub."""
    image, tools = cloud.jobs.image("nvidia-l4"), cloud.jobs.tools()
    assert (image is None) == (cloud.target == "local")
    assert image is None or "@sha256:" in image
    assert (tools is not None) == (cloud.target == "cloudrun")
    assert tools is None or (tools.timeout_s, tools.hub_token) == (3600, False)
