"""Following a sweep to its end, and what its commands say once it has been started."""

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from g4kit.cloud.base import Cloud
from g4kit.following import INTERVAL_S, exit_code
from g4kit.output import print_data, print_json, say
from g4kit.progress import PLAIN_INTERVAL_S
from g4kit.sweep_text import progress_line, sweep_text
from g4kit.sweeps import SweepView, read_sweep
from g4kit.waiting import or_leave

Show = Callable[[SweepView], None]


def commands_for(view: SweepView) -> dict[str, str]:
    """The exact commands for a sweep, by what they do: for one that is over, those for its best point."""
    report = {"report": f"g4kit report {view.sweep_id}"}
    if view.state == "succeeded":
        best = view.best.run_id if view.best else view.points[0].run.run_id
        return report | {"fetch": f"g4kit fetch {best}", "try": f"g4kit predict {best} IMAGE..."}
    return {
        "follow": f"g4kit runs {view.sweep_id} --watch",
        "logs": f"g4kit logs {view.sweep_id} -f --task 0",
        "cancel": f"g4kit cancel {view.sweep_id}",
    } | report


def print_started(cloud: Cloud, sweep_id: str, as_json: bool) -> None:
    view = read_sweep(cloud, sweep_id)
    _say_commands(view)
    _print(view, as_json)


def wait_and_exit(cloud: Cloud, sweep_id: str, as_json: bool) -> NoReturn:
    """Follows to the end, prints the table and exits with 0, or the code of the first point that did not succeed."""
    view = or_leave(
        lambda: follow_to_the_end(cloud, sweep_id, Progress().show),
        f"the sweep goes on. To come back: g4kit runs {sweep_id} --watch; to end it: g4kit cancel {sweep_id}",
    )
    say(sweep_text(view))
    if view.state == "succeeded":
        _say_commands(view)
    else:
        say(f"sweep {sweep_id}: {view.state}; to go on with what is left: g4kit resume {sweep_id}")
    _print(view, as_json)
    unfinished = [point.run for point in view.points if point.run.state != "succeeded"]
    sys.exit(exit_code(unfinished[0]) if unfinished else 0)


def follow(cloud: Cloud, sweep_id: str, show: Show) -> SweepView:
    """Shows the sweep until nothing of it goes on. Returns the last view."""
    view = None
    while True:
        view = read_sweep(cloud, sweep_id, view)
        show(view)
        if not view.live:
            return view
        time.sleep(INTERVAL_S)


def follow_to_the_end(cloud: Cloud, sweep_id: str, show: Show) -> SweepView:
    """Follows, and starts what is left again when attempts are used up while points made progress."""
    from g4kit.budget import BudgetError
    from g4kit.sweeping import resume_sweep

    furthest = (0, 0)
    while True:
        view = follow(cloud, sweep_id, show)
        left = worth_another_execution(view)
        if not left or progress(view) <= furthest:
            return view
        furthest = progress(view)
        say(f"sweep {sweep_id}: there was progress: starting what is left again, points {', '.join(map(str, left))}")
        while any(execution.active for execution in cloud.jobs.find(sweep_id)):  # its last task is ending
            time.sleep(INTERVAL_S)
        try:
            resume_sweep(cloud, sweep_id, left)
        except BudgetError as error:
            say(str(error))
            return view


def worth_another_execution(view: SweepView) -> list[int]:
    """Points that a retry may help."""
    wanted = ("interrupted", "failed")
    return [point.task for point in view.points if point.run.state in wanted and point.run.reason is None]


def progress(view: SweepView) -> tuple[int, int]:
    """Grows while points finish or make steps."""
    return view.count("succeeded"), sum(point.run.step or 0 for point in view.points)


class Progress:
    """A line whenever a point's state or phase changes, and every 10 s in between if anything moved."""

    def __init__(self) -> None:
        self._last = ""
        self._stage: list[tuple[str, str | None]] = []
        self._said_at = 0.0

    def show(self, view: SweepView) -> None:
        line = progress_line(view)
        stage = [(point.run.state, point.run.phase) for point in view.points]
        due = time.monotonic() - self._said_at >= PLAIN_INTERVAL_S
        if line != self._last and (due or stage != self._stage or not view.live):
            say(line)
            self._last, self._stage, self._said_at = line, stage, time.monotonic()


def _say_commands(view: SweepView) -> None:
    for what, text in commands_for(view).items():
        say(f"  {what:<7} {text}")


def _print(view: SweepView, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(view) | {"commands": commands_for(view)})
    else:
        print_data(view.sweep_id)
