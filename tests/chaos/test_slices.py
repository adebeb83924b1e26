"""Stopping in time: a run cut into slices by its deadline, signals in every phase."""

import os
import signal
import time

import pytest

from chaos.attempts import STEPS, Server, assert_same_result, committed_steps, losses_of
from g4trainer.claims import attempts
from g4trainer.rundir import RunDir, read_json

LIMIT_S = 9.0
MICRO_BATCH_S = 1.8
"""One step of two micro-batches fits into the limit beside loading, two do not."""
NOISE_S = 2.0
"""What a busy machine may add to a step that was foreseen."""


def test_a_run_in_slices_ends_with_the_undisturbed_result(server: Server, undisturbed: RunDir, run: RunDir) -> None:
    codes = []
    while not run.results.exists():
        attempt = server.run(run, faults={"slow_steps": [MICRO_BATCH_S]}, G4KIT_ATTEMPT_TIMEOUT_S=str(LIMIT_S))
        codes.append(attempt.status)
        assert len(codes) < 30, attempt.log
    assert codes[-1] == 0
    assert set(codes[:-1]) == {75}
    assert len(codes) >= 5
    assert_same_result(run, undisturbed)
    noted = attempts(run)
    assert max(attempt["seconds"]["total"] for attempt in noted) < LIMIT_S + NOISE_S
    seconds, once = read_json(run.results)["seconds"], read_json(undisturbed.results)["seconds"]
    slept = STEPS * 2 * MICRO_BATCH_S
    overhead = seconds["total"] - slept - once["total"]
    print(f"{len(codes)} slices: {overhead:.1f} s more than at once, {overhead / (len(codes) - 1):.1f} s a slice")
    assert overhead / (len(codes) - 1) < LIMIT_S


def test_a_checkpoint_that_would_not_fit_is_not_begun(server: Server, run: RunDir) -> None:
    attempt = server.run(run, faults={"slow_steps": [2.0], "checkpoints_take": [60.0]}, G4KIT_ATTEMPT_TIMEOUT_S="8")
    assert attempt.status == 75, attempt.log
    assert "no checkpoint of step 1: it takes about 60 s" in attempt.log
    assert committed_steps(run) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_loading_ends_the_attempt(server: Server, run: RunDir, name: str) -> None:
    attempt = server.run(run, faults={"signal_in": ["load", name]})
    assert attempt.status == 75, attempt.log
    assert f"{name} was received" in attempt.log
    assert read_json(run.status)["state"] == "interrupted"
    assert not run.plan.exists()


def test_a_second_interrupt_ends_the_process_at_once(server: Server, run: RunDir) -> None:
    attempt = server.start(run, faults={"hang_in_load": []})
    attempt.wait_for("hanging")
    attempt.send(signal.SIGINT)
    time.sleep(0.5)
    assert not attempt.over.is_set(), "the first one waits for the next step"
    started = time.monotonic()
    attempt.send(signal.SIGINT)
    assert attempt.wait() == 130
    assert time.monotonic() - started < 2


def test_a_signal_to_the_whole_group_spares_the_data_loaders(server: Server, undisturbed: RunDir, run: RunDir) -> None:
    attempt = server.start(run, faults={"data_workers": [1], "slow_steps": [0.2]})
    attempt.wait_for("step 1 of")
    os.killpg(attempt.pid, signal.SIGTERM)
    assert attempt.wait() == 75, attempt.log
    assert losses_of(undisturbed)[: committed_steps(run)[-1]]
    resumed = server.run(run, faults={"data_workers": [1]})
    assert resumed.status == 0, resumed.log
    assert_same_result(run, undisturbed)
