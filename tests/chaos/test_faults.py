"""What goes wrong ends with the right exit code, a reason where people look, and a run that can go on."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.attempts import Server, assert_same_result, committed_steps, copy_of, new_run, recipe
from g4trainer.rundir import RunDir, read_json


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for two checkpoints."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100k", "tmpfs", folder], check=False)  # noqa: S607
    if mounted.returncode:
        pytest.skip("this machine does not let tests mount")
    yield folder
    subprocess.run(["umount", folder], check=True)  # noqa: S607


def test_a_full_disk_stops_the_attempt_and_room_lets_it_go_on(
    server: Server, undisturbed: RunDir, small_disk: Path
) -> None:
    run = new_run(small_disk, "full")
    stopped = server.run(run)
    assert stopped.status == 1, stopped.log
    assert "No space left on device" in stopped.log
    assert "make room, and run it again" in stopped.log
    assert not run.failed.exists(), "a retry can help"
    steps = committed_steps(run)  # what says that it is committed is whole
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)  # noqa: S607
    resumed = server.run(run)
    assert resumed.status == 0, resumed.log
    assert not steps or f"resuming from step {steps[-1]}" in resumed.log
    assert_same_result(run, undisturbed)


@pytest.mark.parametrize(
    ("code", "under", "remedy"),
    [
        (errno.EACCES, "checkpoints", "allow writing there"),
        (errno.EROFS, "status.json", "mount it writable"),
        (errno.EDQUOT, "evaluation/baseline.json", "raise the quota"),
    ],
    ids=["permission-lost", "read-only", "over-quota"],
)
def test_a_folder_that_cannot_be_written_stops_the_attempt(
    server: Server, run: RunDir, code: int, under: str, remedy: str
) -> None:
    stopped = server.run(run, layer={"under": under, "fail_at": 1, "errno": code})
    assert stopped.status == 1, stopped.log
    assert os.strerror(code) in stopped.log
    assert f"{remedy}, and run it again" in stopped.log
    assert not run.failed.exists()
    assert not (run.path / under).is_file()


def test_a_clock_that_jumps_changes_nothing(server: Server, undisturbed: RunDir, run: RunDir) -> None:
    stopped = server.run(run, faults={"clock_jumps": [], "signal_at": [2, "SIGTERM"]}, G4KIT_ATTEMPT_TIMEOUT_S="100")
    assert stopped.status == 75, stopped.log
    resumed = server.run(run, faults={"clock_jumps": []}, G4KIT_ATTEMPT_TIMEOUT_S="100")
    assert resumed.status == 0, resumed.log
    assert_same_result(run, undisturbed)


def test_out_of_memory_shrinks_and_goes_on(server: Server, run: RunDir) -> None:
    attempt = server.run(run, faults={"memory_for": [2, 1]})
    assert attempt.status == 0, attempt.log
    plan = read_json(run.plan)
    assert (plan["per_device_train_batch_size"], plan["gradient_accumulation_steps"]) == (2, 4)
    assert plan["evaluation_batch_size"] == 1
    assert read_json(run.training_args)["per_device_train_batch_size"] == 2
    assert "micro-batch 4 becomes 2, activation checkpointing none; the effective batch stays 8" in attempt.log
    assert "evaluation batch 2 becomes 1" in attempt.log
    assert read_json(run.results)["artifacts"]["plan.json"]["size"] == run.plan.stat().st_size


def test_out_of_memory_with_nothing_left_to_shrink_is_final(server: Server, undisturbed: RunDir) -> None:
    run = copy_of(undisturbed, "no-memory", without=("results.json", "adapter", "checkpoints"))
    attempt = server.run(run, faults={"memory_for": [-1, 9]})
    assert attempt.status == 3, attempt.log
    assert read_json(run.plan)["activation_checkpointing"] == "full", "tried before giving up"
    assert read_json(run.status)["state"] == "failed"
    failed = read_json(run.failed)
    assert failed["exit_code"] == 3
    assert "choose a larger accelerator" in failed["remedy"]
    again = server.run(run)
    assert again.status == 3
    assert failed["reason"] in again.log
    assert "phase load" not in again.log, "later attempts end at once"


def test_a_loss_that_is_no_number_is_final_until_resumed(server: Server, undisturbed: RunDir, run: RunDir) -> None:
    attempt = server.run(run, faults={"infinite_loss_at": [3]})
    assert attempt.status == 4, attempt.log
    assert "is nan at step 3" in read_json(run.failed)["reason"]
    assert read_json(run.status)["state"] == "failed"
    assert committed_steps(run) == [1, 2], "the optimizer did not take the step"
    assert server.run(run).status == 4
    run.failed.unlink()  # as `g4kit resume` does
    resumed = server.run(run)
    assert resumed.status == 0, resumed.log
    assert_same_result(run, undisturbed)


def test_an_unexpected_exception_is_seen_and_can_be_retried(server: Server, run: RunDir) -> None:
    attempt = server.run(run, faults={"bug_at": [2]})
    assert attempt.status == 1, attempt.log
    assert "Traceback" in attempt.log
    status = read_json(run.status)
    assert (status["state"], status["message"]) == ("failed", "ZeroDivisionError: a bug")
    assert not run.failed.exists()
    assert committed_steps(run) == [1]


def test_bad_input_is_final(server: Server) -> None:
    run = new_run(server.root, "bad-data", recipe(data={"dataset": "nothing-here"}))
    attempt = server.run(run)
    assert attempt.status == 2, attempt.log
    assert "not staged" in read_json(run.failed)["reason"]
    assert server.run(run).status == 2


def test_a_damaged_failed_json_does_not_stop_the_run(server: Server, undisturbed: RunDir) -> None:
    run = copy_of(undisturbed, "damaged-failed", without=("results.json",))
    run.failed.write_bytes(b'{"exit_code": 3')
    attempt = server.run(run)
    assert attempt.status == 0, attempt.log
    assert "failed.json: damaged" in attempt.log
