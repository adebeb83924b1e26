"""When an attempt stops, decided without a clock of its own: the start is placed in the past."""

import os
import signal
import subprocess
import sys
import time

import pytest

from g4trainer.deadline import CLOSING_S, Deadline
from g4trainer.exits import ExitCode, Interrupted


def after(elapsed_s: float, timeout_s: float | None) -> Deadline:
    return Deadline(timeout_s, started=time.monotonic() - elapsed_s)


def test_without_a_limit_it_never_stops() -> None:
    deadline = after(1e6, None)
    deadline.reserve("step", 1e6)
    deadline.check()
    assert deadline.reason() is None
    assert deadline.closing_s() == float("inf")


@pytest.mark.parametrize(
    ("elapsed_s", "reserved_s", "stops"),
    [(0, 0, False), (3500, 0, False), (3571, 0, True), (3500, 60, False), (3500, 80, True), (3700, 0, True)],
)
def test_it_stops_while_what_is_reserved_still_fits(elapsed_s: float, reserved_s: float, stops: bool) -> None:
    deadline = after(elapsed_s, 3600)
    deadline.reserve("step", reserved_s / 2)
    deadline.reserve("checkpoint", reserved_s / 2)
    assert (deadline.reason() is not None) == stops


def test_short_limits_keep_a_tenth_free() -> None:
    assert after(53, 60).reason() is None
    assert after(54.5, 60).reason() == "the attempt's limit of 60 s is near"


def test_a_new_phase_forgets_what_the_last_one_reserved() -> None:
    deadline = after(0, 100)
    deadline.reserve("validation", 95)
    assert deadline.reason() is not None
    deadline.release()
    assert deadline.reason() is None


def test_check_raises_the_end_that_resumes() -> None:
    with pytest.raises(Interrupted, match="the attempt's limit of 60 s is near; the next attempt goes on") as caught:
        after(59, 60).check()
    assert caught.value.code is ExitCode.INTERRUPTED


def test_the_end_waits_no_longer_than_there_is_time() -> None:
    assert after(3590, 3600).closing_s() == pytest.approx(5, abs=0.1)
    assert after(3700, 3600).closing_s() == 0
    assert CLOSING_S < 10, "Cloud Run kills 10 s after SIGTERM"


def test_the_limit_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("G4KIT_ATTEMPT_TIMEOUT_S", "100")
    assert Deadline.from_environment(time.monotonic()).left_s() == pytest.approx(100, abs=0.5)
    monkeypatch.setenv("G4KIT_ATTEMPT_STARTED", str(time.monotonic() - 60))
    late = Deadline.from_environment(time.monotonic())
    assert late.left_s() == pytest.approx(40, abs=0.5), "the processes of torchrun begin when all hosts are there"
    monkeypatch.delenv("G4KIT_ATTEMPT_STARTED")
    monkeypatch.delenv("G4KIT_ATTEMPT_TIMEOUT_S")
    assert Deadline.from_environment(time.monotonic()).left_s() == float("inf")


LOADER = """
import signal
from torch.utils.data import DataLoader
from g4trainer.deadline import Deadline

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
deadline = Deadline(None)
deadline.listen()
loader = DataLoader(range(40), num_workers=2, persistent_workers=True)
for number in loader:
    if number == 0:
        print("loading", flush=True)
        signal.sigtimedwait([signal.SIGUSR1], 60)
print(deadline.reason(), flush=True)
"""


def test_workers_outlive_a_signal_to_the_group_and_end_with_the_trainer() -> None:
    """At its exit, a process waits for its workers: one that SIGTERM does not end would keep it for ever."""
    with subprocess.Popen(
        [sys.executable, "-c", LOADER], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "loading\n"
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(0.5)
            os.kill(process.pid, signal.SIGUSR1)
            printed, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (printed, process.returncode) == ("SIGTERM was received\n", 0)
