from collections.abc import Iterator

import click

from g4kit.cloud.base import Cloud, LogLine
from g4kit.options import run_id_argument, target_option
from g4kit.output import print_data, say
from g4kit.targets import open_cloud


@click.command("logs", short_help="Print what a run's process wrote.")
@run_id_argument
@click.option("--follow", "-f", is_flag=True, help="Go on until the run has ended.")
@target_option
def command(run_id: str, follow: bool, target: str | None) -> None:
    """Print what a run's process wrote, over all of its executions and attempts.

    \b
    Example:
      g4kit logs digits-tiny-20260101-120000-0a1b -f
    """
    cloud = open_cloud(target)
    try:
        for line in _lines(cloud, run_id, follow):
            print_data(line.text)
    except KeyboardInterrupt:
        say(f"\nleft; the run is as it was. To come back: g4kit logs {run_id} -f")


def _lines(cloud: Cloud, run_id: str, follow: bool) -> Iterator[LogLine]:
    """The lines of one execution after the other; one that starts while these are read included."""
    from g4kit.runs import require_run

    require_run(cloud, run_id)
    seen: set[str] = set()
    while True:
        names = [execution.name for execution in cloud.jobs.find(run_id) if execution.name not in seen]
        if not names:
            return
        for name in names:
            yield from cloud.logs.follow(name) if follow else cloud.logs.read(name)
        seen.update(names)
