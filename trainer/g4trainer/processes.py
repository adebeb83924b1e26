"""Ending a process and all that it started. Only the standard library."""

import contextlib
import os
import signal
import subprocess


def end_group(process: "subprocess.Popen[bytes]", grace_s: float) -> None:
    """SIGTERM, a grace period, SIGKILL, for a process that leads its group and all that it started."""
    signal_group(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=grace_s)
        return
    signal_group(process.pid, signal.SIGKILL)
    process.wait()


def signal_group(group: int, number: signal.Signals) -> None:
    """group: the process id of its leader. One that has ended is passed over."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
        os.killpg(group, number)
