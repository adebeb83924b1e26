"""Cloud Run jobs, through google-cloud-run.

Every execution carries its launch id in its environment, by which it is found (see google_starting).
"""

import contextlib
import datetime
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from google.api_core.exceptions import NotFound
from google.cloud import run_v2
from google.cloud.run_v2.services.executions.transports import ExecutionsRestTransport
from google.cloud.run_v2.services.jobs.transports import JobsRestTransport
from google.cloud.run_v2.services.tasks.transports import TasksRestTransport

from g4kit.cloud.base import (
    Bucket,
    Execution,
    ExecutionNotFoundError,
    JobRequest,
    Tools,
)
from g4kit.cloud.google_client import Access, unless_ended
from g4kit.cloud.google_executions import describe, environment, tasks_without_asking
from g4kit.cloud.google_starting import Starter
from g4kit.errors import UserError
from g4trainer.deadline import TIMEOUT_VARIABLE

RUN_ID, LAUNCH_ID = "G4KIT_RUN_ID", "G4KIT_LAUNCH_ID"
EXECUTION_NAME = re.compile(r"(?P<job>[a-z][a-z0-9-]*)-[a-z0-9]{5}")
CLOCKS_DIFFER = datetime.timedelta(minutes=5)
"""At most: this machine's, which dates claims, and Google's, which dates executions."""
READERS = 8
"""Executions whose tasks are read at a time."""
PAGE = 100


@dataclass(frozen=True)
class Known:
    """The executions of one run, as this process has last seen them."""

    listed_at: float
    """On the monotonic clock."""
    executions: list[Execution]

    @property
    def active(self) -> list[Execution]:
        return [execution for execution in self.executions if execution.active]

    @property
    def ended(self) -> dict[str, Execution]:
        """By name. They do not change any more."""
        return {execution.name: execution for execution in self.executions if not execution.active}

    def believed(self, relist_s: float) -> bool:
        """Whether no other execution need be looked for: while one goes on, none is started beside it."""
        return bool(self.active) and time.monotonic() - self.listed_at < relist_s


class GoogleJobs:
    def __init__(self, access: Access, bucket: Bucket) -> None:
        self._access = access
        self._deployment = access.deployment
        self._starter = Starter(access, bucket)
        self._jobs = run_v2.JobsClient(transport=_transport(JobsRestTransport, access))
        self._executions = run_v2.ExecutionsClient(transport=_transport(ExecutionsRestTransport, access))
        self._tasks = run_v2.TasksClient(transport=_transport(TasksRestTransport, access))
        self._again = {"retry": access.retry(), "timeout": access.patience.timeout_s}
        self._known: dict[str, Known] = {}

    def problems(self, request: JobRequest) -> list[str]:
        """Asks Cloud Run itself, which starts nothing."""
        fitting = self._deployment.jobs_with(request.accelerator)
        if not fitting:
            there = ", ".join(sorted({job.accelerator for job in self._deployment.jobs.values()})) or "none"
            problem = (
                f'job.accelerator: got "{request.accelerator}", and the deployment has jobs with: {there}; '
                "write one of these, or add it to `jobs` in terraform.tfvars and apply."
            )
            return [problem]
        asked = self._start_request(request, validate_only=True)
        try:
            with self._access.errors(asked.name):
                try:
                    self._jobs.run_job(asked, **self._again)
                except NotFound:
                    return [f"{asked.name}: not there, though Terraform made it; write: terraform apply"]
        except UserError as error:
            return [str(error)]
        return []

    def read_job(self, name: str) -> Any:
        """The job as Cloud Run has it; None where it is not there."""
        path = f"{self._deployment.location}/jobs/{name}"
        with self._access.errors(path):
            try:
                return self._jobs.get_job(name=path, **self._again)
            except NotFound:
                return None

    def image(self, accelerator: str) -> str | None:
        """None where the job does not name a digest, as before the first build."""
        jobs = self._deployment.jobs_with(accelerator)
        job = self.read_job(jobs[0].name) if jobs else None
        image = str(job.template.template.containers[0].image) if job else ""
        return image if "@sha256:" in image else None

    def tools(self) -> Tools | None:
        return Tools(self._deployment.tools_job.timeout_s, self._deployment.hub_token_secret is not None)

    def run(self, request: JobRequest) -> Execution:
        self._known.pop(request.run_id, None)
        return self._starter.run(
            request,
            where=self._start_request(request, validate_only=False).name,
            find=lambda since: self._launched(request, since),
            start=lambda: self._start(request),
        )

    def get(self, name: str) -> Execution:
        return self._describe(self._read(name))

    def find(self, run_id: str | None = None) -> list[Execution]:
        """Lists every execution of the jobs for it, which Cloud Run cannot filter. Of one run, the list is believed for
        a while: only what is still going on is asked for again."""
        known = self._known.get(run_id) if run_id else None
        if known is None or not known.believed(self._access.patience.relist_s):
            known = Known(time.monotonic(), self._find_all(run_id, known.ended if known else {}))
        else:
            known = Known(known.listed_at, [*known.ended.values(), *self._again_of(known.active)])
        if run_id:
            self._known[run_id] = known
        return sorted(known.executions, key=lambda execution: (execution.created_at, execution.name))

    def cancel(self, name: str) -> None:
        execution = self._read(name)
        if self._describe(execution).active:
            with self._access.errors(name), unless_ended(lambda: self._describe(self._read(name)).active):
                self._executions.cancel_execution(name=execution.name, **self._again)

    def _find_all(self, run_id: str | None, ended: Mapping[str, Execution]) -> list[Execution]:
        """ended: executions that are known, and will never change."""
        jobs = self._deployment.job_names if run_id else [job.name for job in self._deployment.jobs.values()]
        raw = [one for job in jobs for one in self._list(job)]
        wanted = [one for one in raw if RUN_ID in environment(one) and run_id in (None, environment(one)[RUN_ID])]
        describe_one = self._describe if run_id else self._describe_briefly

        def look(one: Any) -> Execution:
            return ended.get(short_name(one)) or describe_one(one)

        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(look, wanted))

    def _again_of(self, executions: Iterable[Execution]) -> Iterable[Execution]:
        for execution in executions:
            with contextlib.suppress(ExecutionNotFoundError):  # deleted since
                yield self.get(execution.name)

    def _start(self, request: JobRequest) -> Execution:
        asked = self._start_request(request, validate_only=False)
        operation = self._jobs.run_job(asked, retry=None, timeout=self._access.patience.timeout_s)
        return self._describe(operation.metadata)

    def _start_request(self, request: JobRequest, *, validate_only: bool) -> Any:
        job = self._jobs_for(request)[0]
        own = {RUN_ID: request.run_id, LAUNCH_ID: request.launch_id, TIMEOUT_VARIABLE: str(request.timeout_s)}
        container = run_v2.RunJobRequest.Overrides.ContainerOverride(
            args=list(request.args),
            env=[run_v2.EnvVar(name=name, value=value) for name, value in (own | dict(request.env)).items()],
        )
        overrides = run_v2.RunJobRequest.Overrides(
            container_overrides=[container], task_count=request.task_count, timeout=f"{request.timeout_s}s"
        )
        name = f"{self._deployment.location}/jobs/{job}"
        return run_v2.RunJobRequest(name=name, overrides=overrides, validate_only=validate_only)

    def _jobs_for(self, request: JobRequest) -> list[str]:
        """Names of the jobs that can do it, the one to start first."""
        if not request.accelerator:
            return [self._deployment.tools_job.name]
        return [job.name for job in self._deployment.jobs_with(request.accelerator)]

    def _launched(self, request: JobRequest, since: datetime.datetime | None) -> Execution | None:
        """The execution of this launch, if there is one. Those from before it was claimed are not looked at."""
        for job in self._jobs_for(request):
            for one in self._list(job):
                if since and one.create_time < since - CLOCKS_DIFFER:
                    break
                if environment(one).get(LAUNCH_ID) == request.launch_id:
                    return self._describe(one)
        return None

    def _list(self, job: str) -> Iterable[Any]:
        """Newest first, as Cloud Run lists them."""
        parent = f"{self._deployment.location}/jobs/{job}"
        with self._access.errors(parent):
            asked = run_v2.ListExecutionsRequest(parent=parent, page_size=PAGE)
            yield from self._executions.list_executions(asked, **self._again)

    def _read(self, name: str) -> Any:
        """Raises ExecutionNotFoundError."""
        found = EXECUTION_NAME.fullmatch(name)
        if found is None or found["job"] not in self._deployment.job_names:
            raise ExecutionNotFoundError(name)
        path = f"{self._deployment.location}/jobs/{found['job']}/executions/{name}"
        with self._access.errors(path):
            try:
                return self._executions.get_execution(name=path, **self._again)
            except NotFound:
                raise ExecutionNotFoundError(name) from None

    def _describe_briefly(self, execution: Any) -> Execution:
        """The same without the tasks' times where that saves a request: a list has many executions."""
        return self._describe(execution, tasks_without_asking(execution))

    def _describe(self, execution: Any, tasks: list[Any] | None = None) -> Execution:
        """tasks: asked for where they are not given."""
        if tasks is None:
            with self._access.errors(execution.name):
                tasks = list(self._tasks.list_tasks(parent=execution.name, **self._again))
        found = environment(execution)
        return describe(execution, tasks, found.get(RUN_ID, ""), found.get(LAUNCH_ID, ""))


def short_name(execution: Any) -> str:
    return str(execution.name).rpartition("/")[2]


def _transport(kind: Any, access: Access) -> Any:
    if access.emulator is None:
        return kind(credentials=access.credentials)
    scheme, _, _ = access.emulator.partition(":")
    return kind(host=access.emulator, url_scheme=scheme, credentials=access.credentials)
