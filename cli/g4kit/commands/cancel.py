import signal
import time
from collections.abc import Callable

import click

from g4kit.cloud.base import Cloud, Execution
from g4kit.errors import FailedError, UserError
from g4kit.options import run_id_argument, target_option
from g4kit.output import print_data, say
from g4kit.targets import open_cloud

PATIENCE_S = 60.0
"""A process has 10 s between SIGTERM and SIGKILL; what is not over long after that needs a look."""
POLL_S = 0.2
KILLED = 128 + signal.SIGKILL


@click.command("cancel", short_help="End a run that is going on.")
@run_id_argument
@target_option
def command(run_id: str, target: str | None) -> None:
    """End a run that is going on. It can be resumed later from its last checkpoint.

    \b
    Example:
      g4kit cancel digits-tiny-20260101-120000-0a1b
    """
    from g4kit.runs import evaluation_id, executions_of, read_run, require_here
    from g4kit.sweeps import is_sweep, read_sweep

    cloud = open_cloud(target)
    evaluations = cloud.jobs.find(evaluation_id(run_id))
    if not evaluations:
        require_here(cloud, run_id)
    if is_sweep(cloud, run_id):
        _cancel(cloud, f"sweep {run_id}", run_id, _of_sweep(cloud, run_id), lambda: read_sweep(cloud, run_id).state)
        return
    executions = executions_of(cloud, run_id)
    for execution in executions:
        if execution.active and execution.only_task is not None:
            sweep_id = read_run(cloud, run_id).sweep
            raise UserError(
                f"run {run_id}: is one task of a whole sweep's execution; to end all of it: g4kit cancel {sweep_id}"
            )
    _cancel(cloud, f"run {run_id}", run_id, [*executions, *evaluations], lambda: read_run(cloud, run_id).state)


def _of_sweep(cloud: Cloud, sweep_id: str) -> list[Execution]:
    """Those of the sweep, and those that its points got of their own."""
    from g4kit.sweeps import point_id, require_sweep

    points = {point_id(sweep_id, task) for task in range(len(require_sweep(cloud, sweep_id)["points"]))}
    return [execution for execution in cloud.jobs.find() if execution.run_id in {sweep_id, *points}]


def _cancel(cloud: Cloud, what: str, some_id: str, executions: list[Execution], state_now: Callable[[], str]) -> None:
    """what: the run or sweep in words. state_now: asks for its state."""
    active = [execution.name for execution in executions if execution.active]
    state = state_now()
    if not active and state == "cancelled":
        say(f"{what}: was cancelled before")
        return
    if not active:
        raise UserError(f"{what}: is {state}, nothing is going on; write: g4kit runs {some_id}")
    for name in active:
        cloud.jobs.cancel(name)
    say(f"{what}: ending; it has 10 s to write a checkpoint")
    deadline = time.monotonic() + PATIENCE_S
    while any(cloud.jobs.get(name).active for name in active):
        if time.monotonic() > deadline:
            raise FailedError(f"{what}: still going on after {PATIENCE_S:.0f} s; write: g4kit runs {some_id}")
        time.sleep(POLL_S)
    if any(cloud.jobs.get(name).exit_code == KILLED for name in active):
        say(f"{what}: was killed, for it had not stopped within 10 s; what came after its last checkpoint is lost")
    state = state_now()
    say(f"{what}: {state}" + ("" if state == "succeeded" else f"; to go on later: g4kit resume {some_id}"))
    print_data(some_id)
