"""When an attempt has to stop: before its time is up, or when it is told to.

Nothing relies on a grace period after the limit: the trainer knows the limit and stops itself in time to commit.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping

from g4trainer.exits import ExitCode, Interrupted

TIMEOUT_VARIABLE = "G4KIT_ATTEMPT_TIMEOUT_S"
"""Wall-clock limit of this attempt, in seconds; launch sets it."""
STARTED_VARIABLE = "G4KIT_ATTEMPT_STARTED"
"""`time.monotonic()` on this host at the attempt's start; set for processes that another one of it starts."""
ATTEMPTS_VARIABLE = "G4KIT_MAX_ATTEMPTS"
"""How many attempts of an execution a cap on the cost pays; the first is attempt 0. Unset, all of them work."""
SAFETY_S = 30.0
"""Kept free for what cannot be measured: the container's start, which counts too, and the end of the process."""
SAFETY_SHARE = 0.1
"""The same for short limits: never more than this share of the limit."""
CLOSING_S = 3.0
"""After a signal, how long the end may wait to publish what changed last: Cloud Run kills 10 s after SIGTERM."""


def attempts_used_up(environ: Mapping[str, str]) -> str | None:
    """Why this attempt must end before it costs anything but its start; None where it may work."""
    stated, attempt = environ.get(ATTEMPTS_VARIABLE), int(environ.get("CLOUD_RUN_TASK_ATTEMPT") or 0)
    if not stated or attempt < int(stated):
        return None
    return f"the cap on the cost pays {stated} attempts of this execution, and this is number {attempt + 1}"


class Deadline:
    """The end of this attempt. `reserve` tells it how long stopping takes; `check` raises when it is time."""

    def __init__(self, timeout_s: float | None, *, started: float | None = None) -> None:
        """
        timeout_s: wall-clock limit of the attempt; None sets none.
        started: `time.monotonic()` at the start of the attempt.
        """
        self._started = time.monotonic() if started is None else started
        self._timeout_s = math.inf if timeout_s is None else timeout_s
        self._reserved: dict[str, float] = {}
        self._signal: signal.Signals | None = None
        self._agree: Callable[[str | None], str | None] = lambda reason: reason

    @classmethod
    def from_environment(cls, started: float) -> "Deadline":
        """The limit that `$G4KIT_ATTEMPT_TIMEOUT_S` gives, in seconds; none where it is unset.

        started: `time.monotonic()` at the start of this process, where `$G4KIT_ATTEMPT_STARTED` does not tell the
        attempt's.
        """
        stated = os.environ.get(TIMEOUT_VARIABLE)
        return cls(float(stated) if stated else None, started=float(os.environ.get(STARTED_VARIABLE) or started))

    def listen(self) -> None:
        """From now on SIGTERM and a first SIGINT stop at the next step; a second SIGINT ends the process at once.

        A thread hears them, so that a second SIGINT works while the main thread is deep in a library. The processes
        that load data leave the group: a signal to all of it must not take them away from a trainer that goes on to its
        next step.
        """
        heard, told = os.pipe()
        os.set_blocking(told, False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(heard,), name="signals", daemon=True).start()
        os.register_at_fork(after_in_child=_be_no_trainer)

    def agree_by(self, agree: Callable[[str | None], str | None]) -> None:
        """From now on several processes stop together. agree: given this one's reason, returns that of all."""
        self._agree = agree

    def reserve(self, what: str, seconds: float) -> None:
        """Notes how long something takes that must still fit before the limit: a step, a checkpoint, a batch."""
        self._reserved[what] = seconds

    def release(self) -> None:
        """Forgets what was reserved: another phase begins."""
        self._reserved.clear()

    def elapsed_s(self) -> float:
        """Seconds since the start of the attempt."""
        return time.monotonic() - self._started

    def left_s(self) -> float:
        """Seconds until the limit; infinite without one."""
        return self._timeout_s - self.elapsed_s()

    def remaining_s(self) -> float:
        """Seconds until stopping must begin; infinite without a limit."""
        safety = min(SAFETY_S, SAFETY_SHARE * self._timeout_s)
        return self.left_s() - sum(self._reserved.values()) - safety

    def closing_s(self) -> float:
        """How long the end of the attempt may wait to publish what changed last."""
        if self._signal:
            return CLOSING_S
        return max(0.0, self.left_s() / 2)

    def reason(self) -> str | None:
        """Why to stop now; None to go on. Where several processes stop together, all must ask at the same place."""
        return self._agree(self.own_reason())

    def own_reason(self) -> str | None:
        """Why this process would stop now."""
        if self._signal:
            return f"{self._signal.name} was received"
        if self.remaining_s() <= 0:
            return f"the attempt's limit of {self._timeout_s:g} s is near"
        return None

    def check(self) -> None:
        """Raises Interrupted when it is time to stop. Call it where everything done so far is written down."""
        _stop_for(self.reason())

    def check_alone(self) -> None:
        """The same where the other processes do not ask."""
        _stop_for(self.own_reason())

    def _hear(self, pipe: int) -> None:
        while True:
            for number in os.read(pipe, 1):
                if number == signal.SIGINT and self._signal is signal.SIGINT:
                    os._exit(ExitCode.KILLED)
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._signal = signal.Signals(number)


def _be_no_trainer() -> None:
    """In a forked process: signals are not the trainer's, and SIGTERM ends it, as its parent's exit relies on."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgid(0, 0)


def _stop_for(reason: str | None) -> None:
    if reason:
        raise Interrupted(f"stopped: {reason}; the next attempt goes on from here.")
