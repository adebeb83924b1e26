"""Live progress on stderr: a bar on a terminal, plain lines otherwise."""

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from g4kit.following import describe
from g4kit.output import say, stderr_is_terminal
from g4kit.runs import RunView

if TYPE_CHECKING:
    from rich.progress import TaskID

PLAIN_INTERVAL_S = 10.0
"""Between two plain lines of one phase."""


class PlainProgress:
    """A line when the state or the phase changes, and every 10 s in between if anything moved."""

    def __init__(self) -> None:
        self._last = ""
        self._stage: tuple[str, str | None] | None = None
        self._said_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, view: RunView) -> None:
        line, stage = describe(view), (view.state, view.phase)
        due = time.monotonic() - self._said_at >= PLAIN_INTERVAL_S
        if line != self._last and (due or stage != self._stage or not view.live):
            say(line)
            self._last, self._stage, self._said_at = line, stage, time.monotonic()


class LiveProgress:
    """One line that is drawn again, with a bar for what is being counted."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar: Progress = Progress(
            BarColumn(bar_width=24), TextColumn("{task.description}", markup=False), console=Console(stderr=True)
        )
        self._task: TaskID = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, view: RunView) -> None:
        done, total = counted(view)
        self._bar.update(self._task, description=describe(view), completed=done, total=total)


def counted(view: RunView) -> tuple[int, int | None]:
    """What a bar shows: images within an evaluation, else steps."""
    if view.state == "succeeded":
        return 1, 1
    if view.progress:
        return view.progress["done"], view.progress["total"]
    return view.step or 0, view.total_steps


def open_progress() -> PlainProgress | LiveProgress:
    return LiveProgress() if stderr_is_terminal() else PlainProgress()
