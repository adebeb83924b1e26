"""A live fake of Cloud Run's Admin API v2 for jobs: executions are real processes that see the bucket as a folder.

Attempts, time limits and signals are the local supervisor's, which has tests of its own; this file speaks the protocol.
Reference: https://cloud.google.com/run/docs/reference/rest/v2/projects.locations.jobs
"""

import datetime
import json
import os
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fakes.container import CONTAINER
from fakes.server import Answer, Request, error, ok
from g4kit.cloud import base
from g4kit.cloud.base import ExecutionState, JobRequest
from g4kit.cloud.local import LocalCloud

PARENT = r"/v2/(?P<location>projects/[^/]+/locations/[^/]+)"
JOBS = re.compile(PARENT + r"/jobs$")
JOB = re.compile(PARENT + r"/jobs/(?P<job>[^/:]+)(?P<verb>:run)?$")
EXECUTIONS = re.compile(PARENT + r"/jobs/(?P<job>[^/:]+)/executions$")
EXECUTION = re.compile(PARENT + r"/jobs/(?P<job>[^/:]+)/executions/(?P<execution>[^/:]+)(?P<verb>:cancel)?$")
TASKS = re.compile(PARENT + r"/jobs/(?P<job>[^/:]+)/executions/(?P<execution>[^/:]+)/tasks$")
OPERATION = re.compile(PARENT + r"/operations/(?P<operation>[^/:]+)$")
START = (sys.executable, str(Path(__file__).with_name("container.py")))
SUFFIX_LETTERS = "abcdefghjkmnpqrstvwxyz23456789"
TYPE = "type.googleapis.com/google.cloud.run.v2.Execution"
TIMEOUT = "The configured timeout was reached."
FAILURE = "The container exited with an error."
KILLED_AFTER_S = 10
"""SIGKILL follows SIGTERM."""


@dataclass
class Job:
    """What Terraform sets, and executions cannot override but for args, env, task count and timeout."""

    name: str
    max_retries: int = 3
    timeout_s: int = 3600
    image: str = "europe-west4-docker.pkg.dev/test-project/g4kit/g4kit@sha256:" + "0" * 64
    service_account: str = "g4kit-runtime@test-project.iam.gserviceaccount.com"
    accelerator: str = ""
    hidden: dict[str, str] = field(default_factory=dict)
    """Environment variables whose values no document shows, as those from Secret Manager."""


@dataclass
class Started:
    """One execution as it was asked for."""

    name: str
    job: Job
    template: dict[str, Any]
    task_count: int
    created_at: datetime.datetime
    request: JobRequest
    cancelled: bool = False
    """Before its first attempt."""


class FakeRun:
    """A service in one region.

    pending_s: how long an execution waits for a GPU.
    life_s: how long it says that an attempt lived, by its number over all executions, each of one task, its number in
    its own, from 0, and its environment; none is told longer than its limit and the grace after it. None tells the
    real times.
    """

    def __init__(self, folder: Path, mount: Path, location: str, command: tuple[str, ...], *, grace_s: float) -> None:
        self.jobs: dict[str, Job] = {}
        self.image_s = 0.0
        self.pending_s = 0.0
        self.life_s: Callable[[int, int, Mapping[str, str]], float] | None = None
        self.forgotten: set[str] = set()
        self.denied: set[str] = set()
        self.refusal: Answer | None = None
        """In place of every answer, as where the API is off."""
        self.engine = LocalCloud(folder, command=START, grace_s=grace_s, final_codes=())
        self._mount = mount
        self._location = location
        self._command = command
        self._started: dict[str, Started] = {}
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Answer | None:
        routes = (
            (JOBS, self._list_jobs),
            (JOB, self._job),
            (EXECUTIONS, self._list_executions),
            (EXECUTION, self._execution),
            (TASKS, self._list_tasks),
            (OPERATION, self._operation),
        )
        for pattern, answer in routes:
            found = pattern.match(request.path)
            if found and self.refusal:
                return self.refusal
            if found and found["location"] == self._location:
                return answer(request, found.groupdict())
        return None

    @property
    def names(self) -> list[str]:
        """Of all executions, oldest first."""
        return list(self._started)

    def state(self, started: Started) -> base.Execution | None:
        """The execution's processes; None before the first one."""
        found = self.engine.jobs.find(started.request.run_id)
        return next((one for one in found if one.name == started.name), None)

    def started(self, name: str) -> Started | None:
        return self._started.get(name)

    def lose_machine(self, name: str) -> None:
        """Ends the attempt that runs, as the loss of its machine does: at once, with all its processes."""
        state = json.loads(self.engine.jobs.folder(name).state.read_text())
        os.killpg(state["attempt"]["pid"], signal.SIGKILL)

    def wait(self, name: str) -> None:
        """Returns once the execution has ended."""
        while (state := self.state(self._started[name])) is None or state.active:
            time.sleep(0.05)

    def forget(self, name: str) -> None:
        """As an old execution is, of which the service keeps only so many."""
        self.wait(name)
        self.forgotten.add(name)

    def stop(self) -> None:
        """Ends what still runs."""
        for execution in self.engine.jobs.find():
            self.engine.jobs.cancel(execution.name)

    def _list_jobs(self, request: Request, _: Mapping[str, str]) -> Answer:
        return ok({"jobs": [self._job_document(job) for job in self.jobs.values()]})

    def _job(self, request: Request, parts: Mapping[str, str]) -> Answer:
        job = self.jobs.get(parts["job"])
        if job is None:
            return error(404, f"Resource '{parts['job']}' of kind 'JOB' does not exist.")
        if parts["verb"] is None:
            return ok(self._job_document(job))
        if "run.jobs.run" in self.denied:
            return error(403, f"Permission 'run.jobs.run' denied on resource '{self._location}/jobs/{job.name}'.")
        asked = request.json()
        started = self._plan(job, asked.get("overrides", {}))
        if asked.get("validateOnly"):
            return ok({"name": "", "done": True, "metadata": {"@type": TYPE} | self._execution_document(started)})
        with self._lock:
            self._started[started.name] = started
        if self.pending_s:
            timer = threading.Timer(self.pending_s, self._start, [started])
            timer.daemon = True
            timer.start()
        else:
            self._start(started)
        return self._operation_of(started)

    def _plan(self, job: Job, overrides: Mapping[str, Any]) -> Started:
        """Args replace, environment variables merge, timeout and task count replace."""
        container = (overrides.get("containerOverrides") or [{}])[0]
        env = {"G4KIT_ROOT": str(self._mount), "G4KIT_ATTEMPT_TIMEOUT_S": str(job.timeout_s)}
        env |= {item["name"]: item.get("value", "") for item in container.get("env", [])}
        timeout_s = int(overrides.get("timeout", f"{job.timeout_s}s").rstrip("s"))
        task_count = int(overrides.get("taskCount", 0)) or 1
        args = tuple(container.get("args", ["selftest"]))
        suffix = "".join(secrets.choice(SUFFIX_LETTERS) for _ in range(5))
        wrapped = {
            CONTAINER: json.dumps(
                {"command": list(self._command), "env": env | job.hidden | {"CLOUD_RUN_JOB": job.name}}
            )
        }
        request = JobRequest(job.name, suffix, args, timeout_s, job.max_retries + 1, "", wrapped, task_count)
        template = {
            "containers": [
                {
                    "image": job.image,
                    "args": list(args),
                    "env": [{"name": name, "value": value} for name, value in env.items()],
                }
            ],
            "maxRetries": job.max_retries,
            "timeout": f"{timeout_s}s",
        }
        if job.accelerator:
            template["nodeSelector"] = {"accelerator": job.accelerator}
        return Started(f"{job.name}-{suffix}", job, template, task_count, base.now(), request)

    def _start(self, started: Started) -> None:
        if not started.cancelled:
            self.engine.jobs.run(started.request)

    def _list_executions(self, request: Request, parts: Mapping[str, str]) -> Answer:
        """Newest first, as the service lists them, in pages of `pageSize`."""
        there = [one for one in reversed(self._started.values()) if one.name not in self.forgotten]
        mine = [one for one in there if parts["job"] in (one.job.name, "-")]
        begin = int(request.query.get("pageToken") or 0)
        size = min(int(request.query.get("pageSize") or 2), 100)
        page = [self._execution_document(one) for one in mine[begin : begin + size]]
        token = {"nextPageToken": str(begin + size)} if begin + size < len(mine) else {}
        return ok({"executions": page} | token)

    def _execution(self, request: Request, parts: Mapping[str, str]) -> Answer:
        started = self._started.get(parts["execution"])
        if started is None or started.job.name != parts["job"] or started.name in self.forgotten:
            return error(404, f"Resource '{parts['execution']}' of kind 'EXECUTION' does not exist.")
        if parts["verb"] is None:
            return ok(self._execution_document(started))
        found = self.state(started)
        if found is None:
            started.cancelled = True
        elif not found.active:
            return error(400, f"Execution '{started.name}' is completed and cannot be cancelled.")
        else:
            threading.Thread(target=self.engine.jobs.cancel, args=[started.name], daemon=True).start()
        return self._operation_of(started)

    def _list_tasks(self, request: Request, parts: Mapping[str, str]) -> Answer:
        started = self._started.get(parts["execution"])
        if started is None:
            return error(404, f"Resource '{parts['execution']}' of kind 'EXECUTION' does not exist.")
        state = self.state(started)
        tasks = state.tasks if state else ()
        return ok({"tasks": [self._task_document(started, task) for task in tasks]})

    def _operation(self, request: Request, parts: Mapping[str, str]) -> Answer:
        started = self._started.get(parts["operation"])
        return self._operation_of(started) if started else error(404, "no such operation")

    def _operation_of(self, started: Started) -> Answer:
        document = {"@type": TYPE} | self._execution_document(started)
        done = "completionTime" in document
        name = f"{self._location}/operations/{started.name}"
        return ok({"name": name, "metadata": document, "done": done} | ({"response": document} if done else {}))

    def _job_document(self, job: Job) -> dict[str, Any]:
        container = {"image": job.image, "args": ["selftest"]}
        template = {"containers": [container], "maxRetries": job.max_retries, "timeout": f"{job.timeout_s}s"}
        template["serviceAccount"] = job.service_account
        return {"name": f"{self._location}/jobs/{job.name}", "template": {"taskCount": 1, "template": template}}

    def _execution_document(self, started: Started) -> dict[str, Any]:
        state = self.state(started)
        tasks = state.tasks if state else ()
        counts = {kind: sum(task.state is kind for task in tasks) for kind in ExecutionState}
        document = {
            "name": f"{self._location}/jobs/{started.job.name}/executions/{started.name}",
            "job": started.job.name,
            "createTime": _time(started.created_at),
            "taskCount": started.task_count,
            "template": started.template,
            "runningCount": counts[ExecutionState.RUNNING],
            "succeededCount": counts[ExecutionState.SUCCEEDED],
            "failedCount": counts[ExecutionState.FAILED],
            "cancelledCount": counts[ExecutionState.CANCELLED],
            "retriedCount": sum(task.attempt for task in tasks),
            "conditions": [self._condition(started, state), *self._start_conditions(started, state)],
        }
        if state and state.started_at:
            document["startTime"] = _time(state.started_at)
        if state and state.finished_at:
            document["completionTime"] = _time(self._end(started, state.tasks[0]) or state.finished_at)
        elif started.cancelled:
            document["completionTime"] = _time(started.created_at)
        return document

    def _condition(self, started: Started, state: base.Execution | None) -> dict[str, Any]:
        if started.cancelled or (state and state.state is ExecutionState.CANCELLED):
            return _completed("CONDITION_FAILED", "The execution was cancelled.", "CANCELLED")
        if state is None or state.state in (ExecutionState.PENDING, ExecutionState.RUNNING):
            return _completed("CONDITION_RECONCILING", "" if state else "Waiting for execution to start.")
        if state.state is ExecutionState.SUCCEEDED:
            return _completed("CONDITION_SUCCEEDED", "Execution completed successfully.")
        failed = next(task for task in state.tasks if task.state is ExecutionState.FAILED)
        why = TIMEOUT if "timed out" in state.message else FAILURE
        said = f"Task {started.name}-task{failed.index} failed with exit code: {failed.exit_code} and message: {why}"
        return _completed("CONDITION_FAILED", said, "NON_ZERO_EXIT_CODE")

    def _start_conditions(self, started: Started, state: base.Execution | None) -> list[dict[str, Any]]:
        """What comes before the first attempt, each once it has begun."""
        age_s = (base.now() - started.created_at).total_seconds()
        if age_s < self.image_s and state is None:
            return [_condition("ContainerReady", "CONDITION_RECONCILING", "Importing container image.")]
        begun = "CONDITION_RECONCILING" if state is None else "CONDITION_SUCCEEDED"
        return [
            _condition("ContainerReady", "CONDITION_SUCCEEDED", f"Imported container image in {self.image_s:.2f}s."),
            _condition("ResourcesAvailable", "CONDITION_SUCCEEDED", "Provisioned imported containers."),
            _condition("Started", begun, ""),
        ]

    def _task_document(self, started: Started, task: base.Task) -> dict[str, Any]:
        states = {ExecutionState.SUCCEEDED: "CONDITION_SUCCEEDED", ExecutionState.RUNNING: "CONDITION_RECONCILING"}
        state = states.get(task.state, "CONDITION_FAILED")
        if task.state is ExecutionState.PENDING:
            state = "CONDITION_PENDING"
        reason = "CANCELLED" if task.state is ExecutionState.CANCELLED else ""
        document = {
            "name": f"{self._location}/jobs/{started.job.name}/executions/{started.name}/tasks/{task.index}",
            "index": task.index,
            "retried": task.attempt,
            "maxRetries": started.job.max_retries,
            "conditions": [_completed(state, "", reason)],
        }
        if task.started_at:
            document["startTime"] = _time(task.started_at)
        if task.finished_at:
            document["completionTime"] = _time(self._end(started, task) or task.finished_at)
        if task.exit_code is not None:
            killed_by = task.exit_code - 128 if task.exit_code > 128 else 0
            result = {"termSignal": killed_by} if killed_by else {"exitCode": task.exit_code}
            document["lastAttemptResult"] = {"status": {"code": 2 if task.exit_code else 0}, **result}
        return document

    def told_lives_s(self, name: str) -> list[float]:
        """Of an execution's attempts, as the service tells and bills them."""
        if self.life_s is None:
            return []
        started = self._started[name]
        first = sum(self._attempts(one) for one in self._started.values() if one.created_at < started.created_at)
        environment = {item["name"]: item["value"] for item in started.template["containers"][0]["env"]}
        lives = [self.life_s(first + number, number, environment) for number in range(self._attempts(started))]
        return [min(life, started.request.timeout_s + KILLED_AFTER_S) for life in lives]

    def _attempts(self, started: Started) -> int:
        state = self.state(started)
        return sum(task.attempt + 1 for task in state.tasks if task.started_at) if state else 0

    def _end(self, started: Started, task: base.Task) -> datetime.datetime | None:
        """When a task's last attempt ended by the lives that are told; None where none are."""
        lives = self.told_lives_s(started.name)
        return task.started_at + datetime.timedelta(seconds=sum(lives)) if lives and task.started_at else None


def _completed(state: str, message: str, reason: str = "") -> dict[str, Any]:
    return _condition("Completed", state, message) | ({"executionReason": reason} if reason else {})


def _condition(kind: str, state: str, message: str) -> dict[str, Any]:
    return {"type": kind, "state": state, "message": message}


def _time(value: datetime.datetime) -> str:
    return value.isoformat(timespec="microseconds").replace("+00:00", "Z")
