import datetime
import re
from collections.abc import Callable, Iterator

import click

from g4kit.cloud.base import Cloud, Execution, LogLine, now
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
@click.option("--task", type=click.IntRange(min=0), metavar="POINT", help="Of a sweep, the lines of one point only.")
@target_option
def command(run_id: str, follow: bool, since: str | None, task: int | None, target: str | None) -> None:
    """Print what a run's process wrote, over all of its executions and attempts; of a sweep, its points' numbers before
    their lines.

    \b
    Examples:
      g4kit logs digits-tiny-20260101-120000-0a1b -f
      g4kit logs digits-tiny-20260101-120000-0a1b --task 2
      g4kit logs digits-tiny-20260101-120000-0a1b --since 10m
    """
    begin = parse_since(since, now()) if since else None
    cloud = open_cloud(target)
    try:
        for text in _texts(cloud, run_id, task, follow, begin):
            print_data(text)
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


def _texts(cloud: Cloud, run_id: str, task: int | None, follow: bool, since: datetime.datetime | None) -> Iterator[str]:
    from g4kit.runs import evaluation_id, executions_of, require_here
    from g4kit.sweeps import is_sweep, point_id, require_sweep

    if not cloud.jobs.find(evaluation_id(run_id)):
        require_here(cloud, run_id)
    if not is_sweep(cloud, run_id):
        if task is not None:
            raise UserError(f"--task: got {task}, and {run_id} is no sweep; leave it out.")
        found = _lines(
            cloud, lambda: [*executions_of(cloud, run_id), *cloud.jobs.find(evaluation_id(run_id))], follow, since
        )
        yield from (line.text for _, line in found)
        return
    count = len(require_sweep(cloud, run_id)["points"])
    if task is None:
        points = _points_by_execution(cloud, run_id)
        for execution, line in _lines(cloud, lambda: cloud.jobs.find(run_id), follow, since):
            yield f"[{points(execution, line.task)}] {line.text}"
        return
    if task >= count:
        raise UserError(f"--task: got {task}, and sweep {run_id} has points 0 to {count - 1}.")
    point = point_id(run_id, task)
    yield from (line.text for _, line in _lines(cloud, lambda: executions_of(cloud, point), follow, since))


def _lines(
    cloud: Cloud, find: Callable[[], list[Execution]], follow: bool, since: datetime.datetime | None
) -> Iterator[tuple[Execution, LogLine]]:
    """The lines of one execution after the other; one that starts while these are read included.

    Of an execution of which only one task is meant, that task's.
    """
    seen: set[str] = set()
    while True:
        found = [execution for execution in find() if execution.name not in seen]
        if not found:
            return
        for execution in found:
            read = cloud.logs.follow if follow else cloud.logs.read
            for line in read(execution.name, since=since):
                if execution.only_task in (None, line.task):
                    yield execution, line
            seen.add(execution.name)


def _points_by_execution(cloud: Cloud, sweep_id: str) -> Callable[[Execution, int], int]:
    """Which point of a sweep a task of an execution runs."""
    from g4kit.launches import read_launches
    from g4kit.runs import sweep_folder

    tasks: dict[str, tuple[int, ...]] = {}

    def point(execution: Execution, task: int) -> int:
        if execution.launch_id not in tasks:
            launches = read_launches(cloud.bucket, sweep_folder(sweep_id))
            tasks.update((launch.launch_id, launch.tasks or ()) for launch in launches)
        return tasks[execution.launch_id][task]

    return point
