"""SIGKILL at random moments and at every write: nothing committed is lost, nothing half-written is used."""

import itertools
import random
import re
import signal
import time
from collections.abc import Iterator

import pytest

from chaos.attempts import Server, assert_same_result, committed_steps, new_run
from g4trainer.rundir import RunDir

RESUMED = re.compile(r"resuming from step (\d+)")


class Chaos:
    """Kills attempts of one run, and checks after each what must always hold."""

    def __init__(self, server: Server, run: RunDir) -> None:
        self.server, self.run, self.kills = server, run, 0
        self.newest = 0

    def kill_at(self, operation: int, under: str) -> bool:
        """Kills an attempt at that operation below a folder; False where the run ended before it."""
        attempt = self.server.run(self.run, layer={"under": under, "kill_at": operation})
        self._check(attempt.log, attempt.wait())
        return attempt.status == -signal.SIGKILL

    def kill_after(self, seconds: float) -> bool:
        """Kills an attempt some time after it began to load; False where the run ended before that."""
        attempt = self.server.start(self.run)
        attempt.over.wait(seconds)
        if not attempt.over.is_set():
            attempt.send(signal.SIGKILL)
        self._check(attempt.log, attempt.wait())
        return attempt.status == -signal.SIGKILL

    def _check(self, log: str, status: int) -> None:
        assert status in (0, -signal.SIGKILL), log
        self.kills += status == -signal.SIGKILL
        resumed = RESUMED.search(log)
        if resumed:
            assert int(resumed[1]) == self.newest, "resumed from another than the newest committed checkpoint"
        assert "passed over" not in log.replace("not committed", "") or "not committed" in log, log
        steps = committed_steps(self.run)  # fails where one that says it is committed is not whole
        newest = steps[-1] if steps else 0
        assert newest >= self.newest, "a committed checkpoint was lost"
        self.newest = newest


def chaos_runs(server: Server, name: str) -> Iterator[Chaos]:
    for number in itertools.count():
        yield Chaos(server, new_run(server.root, f"{name}-{number}"))


def test_killed_again_and_again(server: Server, undisturbed: RunDir) -> None:
    """A short form of the test below."""
    chaos = Chaos(server, new_run(server.root, "kills"))
    picks = random.Random(7)
    for operation in picks.sample(range(2, 24), 5):
        assert chaos.kill_at(operation, "checkpoints")
    for _ in range(2):
        chaos.kill_after(picks.uniform(0.3, 3))
    final = server.run(chaos.run)
    assert final.status == 0, final.log
    assert chaos.kills >= 5
    assert_same_result(chaos.run, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_kills(server: Server, undisturbed: RunDir) -> None:
    """At every operation of writing and rotating checkpoints, of the adapter and of the rest; then at random."""
    started = time.monotonic()
    kills, runs = 0, 0
    for chaos, under in zip(
        chaos_runs(server, "at-every-write"), ("checkpoints", "adapter", "evaluation"), strict=False
    ):
        for operation in itertools.count(1):
            if not chaos.kill_at(operation, under):
                break
        kills, runs = kills + chaos.kills, runs + 1
        assert_same_result(chaos.run, undisturbed)
    at_writes = kills
    picks = random.Random(time.time_ns())
    for chaos in chaos_runs(server, "at-random"):
        while chaos.kill_after(picks.uniform(0.2, 4)):
            pass
        kills, runs = kills + chaos.kills, runs + 1
        assert_same_result(chaos.run, undisturbed)
        if kills >= 220 and kills - at_writes >= 60:
            break
    print(f"{kills} kills, {at_writes} of them at writes, over {runs} runs in {time.monotonic() - started:.0f} s")
