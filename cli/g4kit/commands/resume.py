import click

from g4kit.cloud.base import Cloud
from g4kit.options import json_option, run_id_argument, target_option
from g4kit.output import say
from g4kit.targets import open_cloud


@click.command("resume", short_help="Start an unfinished run again from its last checkpoint.")
@run_id_argument
@click.option("--wait", is_flag=True, help="Follow to the end; exit with the trainer's code.")
@click.option(
    "--max-cost",
    type=click.FloatRange(min=0, min_open=True),
    metavar="USD",
    help="Never spend more on all executions of the run together. Default: what its launch said.",
)
@target_option
@json_option
def command(run_id: str, wait: bool, max_cost: float | None, target: str | None, as_json: bool) -> None:
    """Start an unfinished run again from its last checkpoint. A finished run is left as it is.

    Of a sweep, the points that are not finished are started again.

    \b
    Examples:
      g4kit resume digits-tiny-20260101-120000-0a1b --wait
      g4kit resume oxford-pets-31b-20260101-120000-0a1b --max-cost 20
    """
    from g4kit.launching import resume
    from g4kit.runs import read_run
    from g4kit.sweeps import is_sweep
    from g4kit.waiting import or_leave_beginning, print_started, wait_and_exit

    cloud = open_cloud(target)
    if is_sweep(cloud, run_id):
        if max_cost is not None:
            raise click.UsageError("--max-cost: a sweep's cap holds for each of its runs; write the id of one of them.")
        _resume_sweep(cloud, run_id, wait, as_json)
        return
    if read_run(cloud, run_id).state == "succeeded":
        say(f"run {run_id}: has finished; nothing to resume")
    else:
        execution = or_leave_beginning(
            lambda: resume(cloud, run_id, max_cost=max_cost, say=say), run_id, "the same command"
        )
        say(f"run {run_id}: {execution.state}, execution {execution.name}")
    if wait:
        wait_and_exit(cloud, run_id, as_json)
    print_started(cloud, run_id, as_json)


def _resume_sweep(cloud: Cloud, sweep_id: str, wait: bool, as_json: bool) -> None:
    from g4kit.sweep_waiting import print_started, wait_and_exit
    from g4kit.sweeping import resume_sweep
    from g4kit.sweeps import read_sweep
    from g4kit.waiting import or_leave_beginning

    if read_sweep(cloud, sweep_id).state == "succeeded":
        say(f"sweep {sweep_id}: has finished; nothing to resume")
    else:
        execution = or_leave_beginning(lambda: resume_sweep(cloud, sweep_id), sweep_id, "the same command")
        say(f"sweep {sweep_id}: {execution.state}, execution {execution.name}")
    if wait:
        wait_and_exit(cloud, sweep_id, as_json)
    print_started(cloud, sweep_id, as_json)
