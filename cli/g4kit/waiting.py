"""What `launch` and `resume` do once a run has been started."""

import dataclasses
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from g4kit import following
from g4kit.billing import Bill, settle
from g4kit.billing import describe as describe_bill
from g4kit.cloud.base import Cloud
from g4kit.following import exit_code, follow_to_the_end
from g4kit.output import print_data, print_json, say
from g4kit.progress import open_progress
from g4kit.runs import RunView, read_run

Result = TypeVar("Result")

LEFT = 130
"""Exit code of a command that was left by Ctrl-C."""
ENDING_S = 60.0
"""How long a process may take to end once its run is done."""
LAST_LINES = 12
"""Of the log, shown where nothing else says why a run failed."""


def commands_for(run_id: str) -> dict[str, str]:
    """The exact commands for a run, by what they do."""
    return {
        "follow": f"g4kit runs {run_id} --watch",
        "logs": f"g4kit logs {run_id} -f",
        "cancel": f"g4kit cancel {run_id}",
        "fetch": f"g4kit fetch {run_id}",
    }


def print_started(cloud: Cloud, run_id: str, as_json: bool) -> None:
    view = read_run(cloud, run_id)
    if view.live:
        for what, text in commands_for(run_id).items():
            say(f"  {what:<7} {text}")
    else:
        say(next_step(view))
    _print_view(view, as_json)


def wait_and_exit(cloud: Cloud, run_id: str, as_json: bool) -> NoReturn:
    """Follows to the end, prints the run and exits with the trainer's code; Ctrl-C leaves the run going."""

    def follow() -> RunView:
        with open_progress() as progress:
            return follow_to_the_end(cloud, run_id, progress.show, say)

    view = or_leave(
        follow, f"the run goes on. To come back: g4kit runs {run_id} --watch; to end it: g4kit cancel {run_id}"
    )
    if view.execution and view.state == "failed" and not view.reason:
        for line in deque(cloud.logs.read(view.execution), maxlen=LAST_LINES):
            say(f"  | {line.text}")
    bill = _settle_when_ended(cloud, run_id)
    say(next_step(view))
    if bill.billed:
        say(f"  cost: {describe_bill(bill)}")
    _print_view(view, as_json, {"cost": bill.to_json()})
    sys.exit(exit_code(view))


def or_leave(work: Callable[[], Result], then: str) -> Result:
    """What the work returns. Ctrl-C ends the command. then: what stays, and how to come back to it."""
    try:
        return work()
    except KeyboardInterrupt:
        say(f"\nleft; {then}")
        sys.exit(LEFT)


def or_leave_beginning(work: Callable[[], Result], some_id: str, again: str) -> Result:
    """`or_leave` for what begins a run or a sweep: nobody knows then whether it had begun. again: what begins it."""
    return or_leave(
        work,
        f"{some_id} may have begun. To see: g4kit runs {some_id}; to end it: g4kit cancel {some_id}; to begin it: "
        f"{again}",
    )


def next_step(view: RunView) -> str:
    """What the user can do with a run that has ended."""
    if view.state == "succeeded":
        steps = {"look": "report", "take it home": "fetch", "serve it": "export"}
        told = (f"  {what:<12}  g4kit {verb} {view.run_id}" for what, verb in steps.items())
        return "\n".join([f"run {view.run_id}: succeeded", *told])
    lines = [
        f"run {view.run_id}: {view.state}" + (f": {view.reason or view.message}" if view.reason or view.message else "")
    ]
    if view.remedy:
        lines.append(f"  {view.remedy}")
    lines.append(f"  its log: g4kit logs {view.run_id}; to go on from its last checkpoint: g4kit resume {view.run_id}")
    return "\n".join(lines)


def _settle_when_ended(cloud: Cloud, run_id: str) -> Bill:
    """The bill; where it bills, a moment after the results are there, when their process has ended too."""
    deadline = time.monotonic() + ENDING_S
    while not (bill := settle(cloud, run_id, say)).final and bill.billed and time.monotonic() < deadline:
        time.sleep(following.INTERVAL_S)
    return bill


def _print_view(view: RunView, as_json: bool, more: Mapping[str, Any] | None = None) -> None:
    if as_json:
        print_json(dataclasses.asdict(view) | {"commands": commands_for(view.run_id)} | dict(more or {}))
    else:
        print_data(view.run_id)
