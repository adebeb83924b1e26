"""Custom jobs of Vertex AI: what is asked for, and what they are in the Cloud protocol's words. No call is made here.

Vertex AI knows no task arrays: an execution of several tasks is as many custom jobs, which share the launch id.

Reference: https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.customJobs
"""

import dataclasses
import datetime
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from g4kit.cloud.base import Execution, ExecutionState, JobRequest, Task
from g4kit.deployment import Deployment
from g4trainer.deadline import TIMEOUT_VARIABLE
from g4trainer.limits import ACCELERATORS, VERTEX_TIMEOUT_MAX_S, machine_type

RUN_LABEL, LAUNCH_LABEL = "g4kit_run", "g4kit_launch"
"""Labels hold no slash, and 63 characters at most: jobs are listed by them, and the environment says the whole ids."""
RUN_ID, LAUNCH_ID = "G4KIT_RUN_ID", "G4KIT_LAUNCH_ID"
TASK_INDEX, TASK_COUNT = "CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT"
LABEL_VALUE = re.compile(r"[a-z0-9_-]{0,63}")
MAX_DISPLAY_NAME = 128
ARRAY = re.compile(r"tasks-(?P<launch_label>[a-z0-9_-]+)")
"""Name of an execution of several jobs; one of a single job has the job's own number."""
ATTEMPTS_FILE = "G4KIT_ATTEMPTS_FILE"
"""Where g4trainer.vertex notes its attempts, as the job sees it."""
COMMAND = ("python", "-m", "g4trainer.vertex")
STRATEGIES: Mapping[str, str] = {"on-demand": "STANDARD", "spot": "SPOT", "flex-start": "FLEX_START"}
SLACK_S = 60
"""Added to each attempt's limit: what lies between two of them."""
STATES: Mapping[str, ExecutionState] = {
    "JOB_STATE_QUEUED": ExecutionState.PENDING,
    "JOB_STATE_PENDING": ExecutionState.PENDING,
    "JOB_STATE_SUCCEEDED": ExecutionState.SUCCEEDED,
    "JOB_STATE_PARTIALLY_SUCCEEDED": ExecutionState.SUCCEEDED,
    "JOB_STATE_FAILED": ExecutionState.FAILED,
    "JOB_STATE_EXPIRED": ExecutionState.FAILED,
    "JOB_STATE_CANCELLED": ExecutionState.CANCELLED,
}
"""Any other state is one in which machines are held."""
WAITING: Mapping[str, str] = {
    "JOB_STATE_QUEUED": "queued, for longer where the quota is used up",
    "JOB_STATE_PENDING": "waiting for its machines, or for the image",
}
EXITED = re.compile(r"exited with a non-zero status of (\d+)")


def custom_job(request: JobRequest, deployment: Deployment, image: str, index: int = 0) -> dict[str, Any]:
    """The CustomJob of one task of a request that `request_problems` finds nothing wrong with, as the REST API takes
    it."""
    vertex = deployment.vertex
    machine = machine_type(request.accelerator, request.gpus // request.hosts)
    if vertex is None or machine is None:
        raise ValueError("\n".join(request_problems(request, deployment)))
    many = request.task_count > 1
    own_id = f"{request.launch_id}-{index}" if many else request.launch_id
    environment = {
        "G4KIT_ROOT": vertex.mount_path,
        RUN_ID: request.run_id,
        LAUNCH_ID: request.launch_id,
        TIMEOUT_VARIABLE: str(request.timeout_s),
        ATTEMPTS_FILE: f"{vertex.mount_path}/{request.launches}/{own_id}.attempts.json",
        **({TASK_INDEX: str(index), TASK_COUNT: str(request.task_count)} if many else {}),
        **request.env,
    }
    pool = {
        "machineSpec": {
            "machineType": machine.name,
            "acceleratorType": ACCELERATORS[request.accelerator].vertex_type,
            "acceleratorCount": machine.gpus,
        },
        "containerSpec": {
            "imageUri": image,
            "command": list(COMMAND),
            "args": ["--attempts", str(request.max_attempts), *request.args],
            "env": [{"name": name, "value": value} for name, value in environment.items()],
        },
    }
    pools = [pool | {"replicaCount": "1"}]  # the chief: with it the job ends
    if request.hosts > 1:
        pools.append(pool | {"replicaCount": str(request.hosts - 1)})
    return {
        "displayName": f"{deployment.prefix}-{request.run_id}{f'-{index}' if many else ''}"[:MAX_DISPLAY_NAME],
        "labels": deployment.labels | {RUN_LABEL: label(request.run_id), LAUNCH_LABEL: label(request.launch_id)},
        "jobSpec": {
            "workerPoolSpecs": pools,
            "scheduling": _scheduling(request),
            "serviceAccount": deployment.service_accounts.runtime,
        },
    } | ({"encryptionSpec": {"kmsKeyName": vertex.kms_key}} if vertex.kms_key else {})


def request_problems(request: JobRequest, deployment: Deployment) -> list[str]:
    """Why no such job can be asked for, all at once; empty where it can."""
    problems = []
    if deployment.vertex is None:
        problems.append(
            "target: got vertex, and the deployment was made without it; write enable_vertex = true in "
            "terraform.tfvars, apply, and write deployment.json again."
        )
    gpu = ACCELERATORS.get(request.accelerator)
    if gpu is None or not gpu.machine_types:
        names = ", ".join(name for name, one in ACCELERATORS.items() if one.machine_types)
        problems.append(f'job.accelerator: got "{request.accelerator}" for target vertex; write one of {names}.')
    elif request.gpus % request.hosts or machine_type(gpu.name, request.gpus // request.hosts) is None:
        problems.append(
            f"job.gpus: got {request.gpus} on {request.hosts} host{'s' if request.hosts > 1 else ''}, and the machines "
            f"of {gpu.name} are {', '.join(gpu.machine_types)}; write job.gpus as job.hosts times the GPUs of one of "
            "them, the number at its end."
        )
    return problems


def label(some_id: str) -> str:
    """An id as a label's value: itself where it can be one, else its beginning and a digest of all of it."""
    if LABEL_VALUE.fullmatch(some_id):
        return some_id
    begin = re.sub(r"[^a-z0-9_-]+", "-", some_id.lower())[:46]
    return f"{begin}-{hashlib.sha256(some_id.encode()).hexdigest()[:16]}"


def attempts_name(job: Any, mount_path: str) -> str | None:
    """The object in which a job's attempts are noted; None for a job that notes none in this bucket."""
    path = environment(job).get(ATTEMPTS_FILE, "")
    return path.removeprefix(f"{mount_path}/") if path.startswith(f"{mount_path}/") else None


def environment(job: Any) -> dict[str, str]:
    """Of the chief's container."""
    return {item.name: item.value for item in job.job_spec.worker_pool_specs[0].container_spec.env}


def task_of(job: Any) -> tuple[int, int]:
    """Which task of how many a job is."""
    found = environment(job)
    return int(found.get(TASK_INDEX, 0)), int(found.get(TASK_COUNT, 1))


def short_name(job: Any) -> str:
    """The job's number."""
    return str(job.name).rpartition("/")[2]


def executions(jobs: Iterable[Any], describe_one: Callable[[Any], Execution]) -> list[Execution]:
    """One of each launch, oldest first: of a launch of several tasks its jobs together.

    describe_one: reads what a job needs besides.
    """
    found: list[Execution] = []
    parts: dict[str, list[tuple[Any, Execution]]] = {}
    for job in jobs:
        one = describe_one(job)
        if task_of(job)[1] > 1:
            parts.setdefault(one.launch_id, []).append((job, one))
        else:
            found.append(one)
    found += [together(of_launch) for of_launch in parts.values()]
    return sorted(found, key=lambda execution: (execution.created_at, execution.name))


def together(parts: Sequence[tuple[Any, Execution]]) -> Execution:
    """The execution of several tasks from their jobs; those whose start failed are missing."""
    count = task_of(parts[0][0])[1]
    jobs: dict[int, Execution] = {}
    for job, one in sorted(parts, key=lambda part: part[1].created_at):
        jobs.setdefault(task_of(job)[0], one)
    states = {one.state for one in jobs.values()}
    ended = not states & {ExecutionState.PENDING, ExecutionState.RUNNING}
    if not ended:
        state = ExecutionState.PENDING if states == {ExecutionState.PENDING} else ExecutionState.RUNNING
    else:
        worst = (ExecutionState.CANCELLED, ExecutionState.FAILED)
        missing = ExecutionState.FAILED if len(jobs) < count else ExecutionState.SUCCEEDED
        state = next((one for one in worst if one in states), missing)
    begun = [one.started_at for one in jobs.values() if one.started_at]
    finished = [one.finished_at for one in jobs.values() if one.finished_at]
    some = parts[0][1]
    return Execution(
        name=f"tasks-{label(some.launch_id)}",
        run_id=some.run_id,
        launch_id=some.launch_id,
        state=state,
        created_at=min(one.created_at for one in jobs.values()),
        started_at=min(begun, default=None),
        finished_at=max(finished, default=None) if ended else None,
        tasks=tuple(
            dataclasses.replace(one.tasks[0], index=index) if one.tasks else Task(index, one.state, 0, None)
            for index, one in sorted(jobs.items())
        ),
        message=_message_of_many(jobs, count, state),
    )


def _message_of_many(jobs: Mapping[int, Execution], count: int, state: ExecutionState) -> str:
    if state is ExecutionState.PENDING:
        return next((one.message for one in jobs.values() if one.message), "")
    if state is not ExecutionState.FAILED:
        return ""
    failed = next((index for index, one in sorted(jobs.items()) if one.state is ExecutionState.FAILED), None)
    return f"{len(jobs)} of {count} tasks were started" if failed is None else f"task {failed} {jobs[failed].message}"


def describe(job: Any, attempts: Sequence[Mapping[str, Any]]) -> Execution:
    """One job. attempts: as g4trainer.vertex noted them; empty where they were not read, or none has begun."""
    state = STATES.get(job.state.name, ExecutionState.RUNNING)
    ended = state not in (ExecutionState.PENDING, ExecutionState.RUNNING)
    told = environment(job)
    return Execution(
        name=short_name(job),
        run_id=told.get(RUN_ID, ""),
        launch_id=told.get(LAUNCH_ID, ""),
        state=state,
        created_at=job.create_time,
        started_at=job.start_time or None,
        finished_at=(job.end_time or None) if ended else None,
        tasks=() if state is ExecutionState.PENDING else (_task(job, state, attempts, ended=ended),),
        message=_message(job, state, attempts),
    )


def _task(job: Any, state: ExecutionState, attempts: Sequence[Mapping[str, Any]], *, ended: bool) -> Task:
    return Task(
        index=0,
        state=state,
        attempt=max(0, len(attempts) - 1),
        exit_code=_exit_code(job, attempts, ended=ended),
        started_at=job.start_time or None,
        finished_at=(job.end_time or None) if ended and job.start_time else None,
    )


def _exit_code(job: Any, attempts: Sequence[Mapping[str, Any]], *, ended: bool) -> int | None:
    """None where the last attempt did not live to say it: its machine is gone."""
    if ended and attempts:
        code = attempts[-1]["exit_code"]
        return None if code is None else int(code)
    if ended:
        said = EXITED.search(job.error.message)
        return int(said[1]) if said else 0 if job.state.name == "JOB_STATE_SUCCEEDED" else None
    return next((int(one["exit_code"]) for one in reversed(attempts) if one["exit_code"] is not None), None)


def _message(job: Any, state: ExecutionState, attempts: Sequence[Mapping[str, Any]]) -> str:
    if state is ExecutionState.PENDING:
        return WAITING.get(job.state.name, "")
    if state is not ExecutionState.FAILED:
        return ""
    last = attempts[-1] if attempts else None
    if last is None or last["exit_code"] is None:
        said = str(job.error.message).strip()
        return f"Vertex AI: {said.splitlines()[0]}" if said else "Vertex AI gave no reason"
    why = f" ({last['ended_by']})" if last["ended_by"] else ""
    return f"ended with exit code {last['exit_code']}{why} in attempt {len(attempts)}"


def _scheduling(request: JobRequest) -> dict[str, Any]:
    """One host may come back by itself; several begin again together, since torchrun's chief holds their meeting."""
    once = request.max_attempts == 1
    longest_s = min(request.max_attempts * (request.timeout_s + SLACK_S), VERTEX_TIMEOUT_MAX_S)
    scheduling = {
        "timeout": f"{longest_s}s",
        "strategy": STRATEGIES[request.provisioning],
        "restartJobOnWorkerRestart": request.hosts > 1 and not once,
        "disableRetries": once,
    }
    return scheduling | ({"maxWaitDuration": f"{request.max_wait_s}s"} if request.provisioning == "flex-start" else {})


def attempt_at(attempts: Sequence[Mapping[str, Any]], at: datetime.datetime) -> int:
    """The number of the attempt that ran at a time."""
    begun = sum(datetime.datetime.fromisoformat(one["started_at"]) <= at for one in attempts)
    return max(0, begun - 1)
