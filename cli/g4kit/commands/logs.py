import datetime
import re
from collections.abc import Iterator

import click

from g4kit.cloud.base import Cloud, LogLine, now
from g4kit.errors import UserError
from g4kit.options import run_id_argument, target_option
from g4kit.output import print_data, say
from g4kit.targets import open_cloud

AGE = re.compile(r"(\d{1,9})([smhd])")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@click.command("logs", short_help="Print what a run's process wrote.")
@run_id_argument
@click.option("--follow", "-f", is_flag=True, help="Go on until the run has ended.")
@click.option("--since", metavar="AGE|TIME", help="Lines from then on only: 30s, 10m, 2h, 1d, 2026-01-01T12:00:00Z.")
@target_option
def command(run_id: str, follow: bool, since: str | None, target: str | None) -> None:
    """Print what a run's process wrote, over all of its executions and attempts.

    \b
    Examples:
      g4kit logs digits-tiny-20260101-120000-0a1b -f
      g4kit logs digits-tiny-20260101-120000-0a1b --since 10m
    """
    begin = parse_since(since, now()) if since else None
    cloud = open_cloud(target)
    try:
        for line in _lines(cloud, run_id, follow, begin):
            print_data(line.text)
    except KeyboardInterrupt:
        say(f"\nleft; the run is as it was. To come back: g4kit logs {run_id} -f")


def parse_since(text: str, at: datetime.datetime) -> datetime.datetime:
    """A time, or an age before `at`. A time without a zone is UTC. Raises UserError."""
    age = AGE.fullmatch(text)
    try:
        if age:
            return at - datetime.timedelta(seconds=int(age[1]) * SECONDS[age[2]])
        stated = datetime.datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise UserError(f"--since: got {text!r}; write an age such as 10m, or a time: 2026-01-01T12:00:00Z.") from None
    return stated if stated.tzinfo else stated.replace(tzinfo=datetime.UTC)


def _lines(cloud: Cloud, run_id: str, follow: bool, since: datetime.datetime | None) -> Iterator[LogLine]:
    """The lines of one execution after the other; one that starts while these are read included."""
    from g4kit.runs import require_run

    require_run(cloud, run_id)
    seen: set[str] = set()
    while True:
        names = [execution.name for execution in cloud.jobs.find(run_id) if execution.name not in seen]
        if not names:
            return
        for name in names:
            yield from cloud.logs.follow(name, since=since) if follow else cloud.logs.read(name, since=since)
        seen.update(names)
