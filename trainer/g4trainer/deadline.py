"""When an attempt has to stop: before its time is up, or when it is told to.

Nothing relies on a grace period after the limit: the trainer knows the limit and stops itself in time to commit.
"""

import os
import signal
import time
from types import FrameType

from g4trainer.exits import ExitCode, Interrupted

TIMEOUT_VARIABLE = "G4KIT_ATTEMPT_TIMEOUT_S"
SAFETY_S = 30.0
"""Kept free for what cannot be measured: the container's start, which counts too, and the end of the process."""
SAFETY_SHARE = 0.1
"""The same for short limits: never more than this share of the limit."""


class Deadline:
    """The end of this attempt. `reserve` tells it how long stopping takes; `check` raises when it is time."""

    def __init__(self, timeout_s: float | None, *, started: float | None = None) -> None:
        """
        timeout_s: wall-clock limit of the attempt; None sets none.
        started: `time.monotonic()` at the start of the process.
        """
        self._started = time.monotonic() if started is None else started
        self._timeout_s = timeout_s
        self._reserved: dict[str, float] = {}
        self._signal: str | None = None

    @classmethod
    def from_environment(cls, started: float) -> "Deadline":
        """The limit that `$G4KIT_ATTEMPT_TIMEOUT_S` gives, in seconds; none where it is unset."""
        stated = os.environ.get(TIMEOUT_VARIABLE)
        return cls(float(stated) if stated else None, started=started)

    def listen(self) -> None:
        """From now on SIGTERM and a first SIGINT stop at the next step; a second SIGINT ends the process at once."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def reserve(self, what: str, seconds: float) -> None:
        """Notes how long something takes that must still fit: a step, a checkpoint, a batch. The longest counts."""
        self._reserved[what] = max(seconds, self._reserved.get(what, 0.0))

    def elapsed_s(self) -> float:
        """Seconds since the start of the process."""
        return time.monotonic() - self._started

    def remaining_s(self) -> float:
        """Seconds until stopping must begin; infinite without a limit."""
        if self._timeout_s is None:
            return float("inf")
        safety = min(SAFETY_S, SAFETY_SHARE * self._timeout_s)
        return self._timeout_s - self.elapsed_s() - sum(self._reserved.values()) - safety

    def reason(self) -> str | None:
        """Why to stop now; None to go on."""
        if self._signal:
            return f"{self._signal} was received"
        if self.remaining_s() <= 0:
            return f"the attempt's limit of {self._timeout_s:g} s is near"
        return None

    def check(self) -> None:
        """Raises Interrupted when it is time to stop. Call it where everything done so far is written down."""
        reason = self.reason()
        if reason:
            raise Interrupted(f"stopped: {reason}; the next attempt goes on from here.")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self._signal == name:
            os._exit(ExitCode.KILLED)
        self._signal = name
