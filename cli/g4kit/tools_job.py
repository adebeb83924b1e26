"""Work on the bucket that is an execution: of the deployment's job without a GPU, or of a process on this machine."""

import hashlib
from collections.abc import Callable

from g4kit.cloud.base import Cloud, Execution, ExecutionState, JobRequest
from g4kit.errors import FailedError
from g4kit.sources import StageError
from g4kit.staging import Staged, read_marker, staged_problems, summary

Say = Callable[[str], None]


def run_tool(cloud: Cloud, folder: str, args: tuple[str, ...], *, timeout_s: int, asked: str, say: Say) -> Execution:
    """Starts the trainer with `args`, or joins what is at it, and returns the execution once it has ended.

    folder: what it makes, for example `models/NAME`; asked: what tells one wish for this folder from another. Two
    callers at once get the same execution. Raises StageError where what is at the folder was asked for otherwise.
    """
    verb = args[0]
    tool_id = f"{verb}-{folder.replace('/', '-')}"
    earlier = cloud.jobs.find(tool_id)
    going_on = [execution for execution in earlier if execution.active]
    wish = hashlib.sha256(asked.encode()).hexdigest()[:8]
    if going_on:
        execution = going_on[-1]
        if execution.launch_id.partition("-")[0] != wish:
            raise StageError(
                f"{folder}: got {asked}, and execution {execution.name} is making the folder from something else; wait "
                "until it has ended, then write this again, or write another --name."
            )
    else:
        request = JobRequest(
            run_id=tool_id,
            launch_id=f"{wish}-{len(earlier)}",
            args=args,
            timeout_s=timeout_s,
            max_attempts=1,
            accelerator="",
            folder=f"staging/{folder}",
        )
        execution = cloud.jobs.run(request)
    say(f"execution {execution.name} makes {folder}; Ctrl-C leaves it going, and the same command comes back to it")
    for line in cloud.logs.follow(execution.name):
        say(f"  | {line.text}")
    return cloud.jobs.get(execution.name)


def result_of(cloud: Cloud, folder: str, execution: Execution) -> Staged:
    """What an ended execution has put into the folder. Raises StageError for what no retry mends, else FailedError."""
    if execution.state is not ExecutionState.SUCCEEDED:
        if execution.exit_code == StageError.exit_code:
            raise StageError(f"{folder}: the job refused it; its last lines above say why.")
        why = execution.message or str(execution.state)
        raise FailedError(f"{folder}: execution {execution.name} {why}; the same command stages what is missing.")
    listing = read_marker(cloud.bucket, folder)
    problems = staged_problems(cloud.bucket, folder)
    if listing is None or problems:
        raise FailedError(f"{folder}: the job ended, and {problems[0]}; the same command stages what is missing.")
    return summary(folder, listing, already=False)
