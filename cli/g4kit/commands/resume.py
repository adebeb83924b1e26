import click

from g4kit.options import json_option, run_id_argument, target_option
from g4kit.output import say
from g4kit.targets import open_cloud


@click.command("resume", short_help="Start an unfinished run again from its last checkpoint.")
@run_id_argument
@click.option("--wait", is_flag=True, help="Follow to the end; exit with the trainer's code.")
@target_option
@json_option
def command(run_id: str, wait: bool, target: str | None, as_json: bool) -> None:
    """Start an unfinished run again from its last checkpoint. A finished run is left as it is.

    \b
    Example:
      g4kit resume digits-tiny-20260101-120000-0a1b --wait
    """
    from g4kit.launching import resume
    from g4kit.runs import read_run
    from g4kit.waiting import print_started, wait_and_exit

    cloud = open_cloud(target)
    if read_run(cloud, run_id).state == "succeeded":
        say(f"run {run_id}: has finished; nothing to resume")
    else:
        execution = resume(cloud, run_id)
        say(f"run {run_id}: {execution.state}, execution {execution.name}")
    if wait:
        wait_and_exit(cloud, run_id, as_json)
    print_started(cloud, run_id, as_json)
