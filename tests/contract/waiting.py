"""Waiting in tests: for what is wanted, and never for long."""

import time
from collections.abc import Callable
from typing import TypeVar

from g4kit.cloud.base import Cloud, Execution

Found = TypeVar("Found")


def wait(cloud: Cloud, name: str, timeout_s: float = 30) -> Execution:
    """The execution once it has ended."""
    return wait_until(lambda: cloud.jobs.get(name), lambda execution: not execution.active, timeout_s)


def wait_until(read: Callable[[], Found], wanted: Callable[[Found], bool], timeout_s: float = 30) -> Found:
    deadline = time.monotonic() + timeout_s
    while not wanted(found := read()):
        assert time.monotonic() < deadline, f"still {found} after {timeout_s} s"
        time.sleep(0.05)
    return found
