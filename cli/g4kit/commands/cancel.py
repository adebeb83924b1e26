import time

import click

from g4kit.errors import FailedError, UserError
from g4kit.options import run_id_argument, target_option
from g4kit.output import print_data, say
from g4kit.targets import open_cloud

PATIENCE_S = 60.0
"""A process has 10 s between SIGTERM and SIGKILL; what is not over long after that needs a look."""
POLL_S = 0.2


@click.command("cancel", short_help="End a run that is going on.")
@run_id_argument
@target_option
def command(run_id: str, target: str | None) -> None:
    """End a run that is going on. It can be resumed later from its last checkpoint.

    \b
    Example:
      g4kit cancel digits-tiny-20260101-120000-0a1b
    """
    from g4kit.runs import read_run

    cloud = open_cloud(target)
    view = read_run(cloud, run_id)
    active = [execution.name for execution in cloud.jobs.find(run_id) if execution.active]
    if not active and view.state == "cancelled":
        say(f"run {run_id}: was cancelled before")
        return
    if not active:
        raise UserError(f"run {run_id}: is {view.state}, nothing is going on; write: g4kit runs {run_id}")
    for name in active:
        cloud.jobs.cancel(name)
    say(f"run {run_id}: ending; it has 10 s to write a checkpoint")
    deadline = time.monotonic() + PATIENCE_S
    while any(cloud.jobs.get(name).active for name in active):
        if time.monotonic() > deadline:
            raise FailedError(f"run {run_id}: still going on after {PATIENCE_S:.0f} s; write: g4kit runs {run_id}")
        time.sleep(POLL_S)
    state = read_run(cloud, run_id).state
    say(f"run {run_id}: {state}" + ("" if state == "succeeded" else f"; to go on later: g4kit resume {run_id}"))
    print_data(run_id)
