"""Following a run to its end, through interrupted attempts and, when they are used up, further executions."""

import time
from collections.abc import Callable

from g4kit.cloud.base import Cloud
from g4kit.errors import FAILED
from g4kit.output import duration
from g4kit.runs import INTERRUPTED, RunView, read_run

INTERVAL_S = 1.0
PASSED_ON = {0, 1, 2, 3, 4, INTERRUPTED, 130}
"""The trainer's exit codes; any other, such as a signal's, is a failure."""

Show = Callable[[RunView], None]


def follow(cloud: Cloud, run_id: str, show: Show) -> RunView:
    """Shows the run until its execution has ended. Returns the last view."""
    while True:
        view = read_run(cloud, run_id)
        show(view)
        if not view.live:
            return view
        time.sleep(INTERVAL_S)


def follow_to_the_end(cloud: Cloud, run_id: str, show: Show, say: Callable[[str], None]) -> RunView:
    """Follows, and starts the next execution when one has used up its attempts while the run made progress.

    It ends, and says why, where a cap on the cost leaves too little for another one.
    """
    from g4kit.budget import BudgetError
    from g4kit.launching import resume

    furthest = 0
    while True:
        view = follow(cloud, run_id, show)
        if not worth_another_execution(view, furthest):
            return view
        furthest = view.step or 0
        say(f"run {run_id}: {view.state} at step {furthest}, and it made progress: starting it again")
        try:
            resume(cloud, run_id, say=say)
        except BudgetError as error:
            say(str(error))
            return view


def worth_another_execution(view: RunView, furthest: int) -> bool:
    """furthest: the step that earlier executions reached."""
    return view.state in ("interrupted", "failed") and view.reason is None and (view.step or 0) > furthest


def exit_code(view: RunView) -> int:
    """What `--wait` exits with."""
    if view.state == "succeeded":
        return 0
    code = view.exit_code or FAILED
    return code if code in PASSED_ON else FAILED


def describe(view: RunView) -> str:
    """One line: `running · train · step 120/350 · loss 0.3456 · 57.3 samples/s · 1 min 20 s left`."""
    parts = [view.state]
    if view.state in ("running", "interrupted") and view.phase:
        parts.append(view.phase)
    if view.state != "succeeded":
        parts += _figures(view)
    if view.message and not (view.live and view.state == "running"):
        parts.append(view.message)
    if view.state == "succeeded":
        parts += _accuracies(view)
    if view.reason:
        parts.append(view.reason)
    return " · ".join(parts)


def _figures(view: RunView) -> list[str]:
    figures = []
    if view.progress and view.progress.get("total"):
        figures.append(f"{view.progress['done']}/{view.progress['total']} images")
    if view.step:
        figures.append(f"step {view.step}/{view.total_steps}" if view.total_steps else f"step {view.step}")
    if view.phase == "train" and view.loss is not None:
        figures.append(f"loss {view.loss:.4f}")
    if view.state == "running" and view.samples_per_second is not None:
        figures.append(f"{view.samples_per_second:.1f} samples/s")
    if view.state == "running" and view.eta_s is not None:
        figures.append(f"{duration(view.eta_s)} left")
    return figures


def _accuracies(view: RunView) -> list[str]:
    before, after = view.accuracy("baseline"), view.accuracy("final")
    if after is None:
        return []
    return [f"accuracy {after:.4f}" if before is None else f"accuracy {before:.4f} -> {after:.4f}"]
