"""Custom jobs of Vertex AI, through google-cloud-aiplatform's generated client: the high-level one takes three times as
long to load.

Every job carries its run and its launch as labels, by which it is found (see google_starting). A launch of several
tasks is a job for each, which go on at the same time as far as the quota allows. There is no dry run, so everything
that can be asked without starting anything is asked before.
"""

import json
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from google.api_core.exceptions import NotFound
from google.auth.transport.requests import AuthorizedSession
from google.cloud import aiplatform_v1
from google.cloud.aiplatform_v1.services.job_service.transports import JobServiceRestTransport

from g4kit.cloud.base import (
    Bucket,
    Execution,
    ExecutionNotFoundError,
    JobRequest,
    JobStartError,
    ObjectNotFoundError,
    Tools,
)
from g4kit.cloud.google_client import Access, unless_ended
from g4kit.cloud.google_starting import Starter
from g4kit.cloud.vertex_executions import (
    ARRAY,
    LAUNCH_LABEL,
    RUN_LABEL,
    attempts_name,
    custom_job,
    describe,
    executions,
    label,
    request_problems,
    short_name,
    task_of,
    together,
)
from g4kit.errors import UserError
from g4kit.transfer import in_parallel

JOB_NAME = re.compile(r"\d+")
PERMISSIONS = tuple(f"aiplatform.customJobs.{verb}" for verb in ("create", "get", "list", "cancel"))
ACT_AS = "iam.serviceAccounts.actAs"
READERS = 8
"""Jobs whose attempts are read at a time."""
PAGE = 100


class VertexJobs:
    def __init__(self, access: Access, bucket: Bucket, image: Callable[[], str]) -> None:
        """image: reads the address of the deployed image; raises UserError where none was built."""
        self._access = access
        self._deployment = access.deployment
        self._bucket = bucket
        self._image = image
        self._starter = Starter(access, bucket)
        self._client = aiplatform_v1.JobServiceClient(transport=_transport(access))
        self._again = {"retry": access.retry(), "timeout": access.patience.timeout_s}

    def problems(self, request: JobRequest) -> list[str]:
        """What the request itself says, whether there is an image, and whether the caller may start it."""
        problems = request_problems(request, self._deployment)
        for ask in (self._image, self.missing_permissions):
            try:
                missing = ask()
            except UserError as error:
                problems.append(str(error))
            else:
                problems += [] if isinstance(missing, str) else missing
        return problems

    def missing_permissions(self) -> list[str]:
        """What the caller may not do, one sentence each with the role that allows it."""
        project, account = self._deployment.project, self._deployment.service_accounts.runtime
        asked = (
            ("cloudresourcemanager", f"projects/{project}", PERMISSIONS, f"projects add-iam-policy-binding {project}"),
            (
                "iam",
                f"projects/-/serviceAccounts/{account}",
                (ACT_AS,),
                f"iam service-accounts add-iam-policy-binding {account} --project={project}",
            ),
        )
        roles = {"cloudresourcemanager": "roles/aiplatform.user", "iam": "roles/iam.serviceAccountUser"}
        found = []
        for service, resource, permissions, binding in asked:
            allowed = self._test_permissions(service, resource, permissions)
            missing = [one for one in permissions if one not in allowed]
            if missing:
                found.append(
                    f"{resource}: {', '.join(missing)} not allowed; write: gcloud {binding} --member=user:YOU "
                    f"--role={roles[service]}"
                )
        return found

    def probe(self) -> int:
        """How many of this deployment's jobs go on. Raises UserError where Vertex AI cannot be asked."""
        return sum(describe(job, ()).active for job in self._list(f"labels.{LAUNCH_LABEL}:*"))

    def image(self, accelerator: str) -> str | None:
        return self._image()

    def tools(self) -> Tools | None:
        """The deployment's is a job of Cloud Run."""
        return None

    def run(self, request: JobRequest) -> Execution:
        try:
            return self._starter.run(
                request,
                where=f"{self._deployment.location}/customJobs",
                find=lambda _: self._launched(request),
                start=lambda: self._start(request),
            )
        except UserError as error:
            begun = len(self._jobs_of_launch(request.launch_id)) if request.task_count > 1 else 0
            if not begun:
                raise
            raise JobStartError(
                f"{error}\n{begun} of {request.task_count} tasks were started and go on; the same command starts the "
                "others, `g4kit cancel` ends all."
            ) from error

    def get(self, name: str) -> Execution:
        jobs = self._read_all(name)
        parts = [(job, self._describe(job)) for job in jobs]
        return together(parts) if ARRAY.fullmatch(name) else parts[0][1]

    def find(self, run_id: str | None = None) -> list[Execution]:
        """Of all runs, without what would have to be read for each one: the attempts."""
        if run_id is None:
            return executions(self._list(f"labels.{LAUNCH_LABEL}:*"), lambda job: describe(job, ()))
        jobs = list(self._list(f'labels.{RUN_LABEL}="{label(run_id)}"'))
        with ThreadPoolExecutor(READERS) as pool:
            described = dict(zip(map(short_name, jobs), pool.map(self._describe, jobs), strict=True))
        return executions(jobs, lambda job: described[short_name(job)])

    def cancel(self, name: str) -> None:
        for job in self._read_all(name):
            if describe(job, ()).active:
                with self._access.errors(name), unless_ended(partial(self._goes_on, short_name(job))):
                    self._client.cancel_custom_job(name=job.name, **self._again)

    def _goes_on(self, job: str) -> bool:
        return describe(self._read(job), ()).active

    def jobs_of(self, name: str) -> dict[str, int]:
        """The numbers of an execution's jobs, and the task that each is. Raises ExecutionNotFoundError."""
        return {short_name(job): task_of(job)[0] for job in self._read_all(name)}

    def attempts(self, name: str) -> list[dict[str, Any]]:
        """What a job noted of its attempts. Raises ExecutionNotFoundError."""
        return self._attempts(self._read(name))

    def _start(self, request: JobRequest) -> Execution:
        """Of several tasks those that no earlier try has started."""
        image, many = self._image(), request.task_count > 1
        there = self._jobs_of_launch(request.launch_id) if many else []
        started = {task_of(job)[0] for job in there}

        def create(index: int) -> Any:
            asked = json.dumps(custom_job(request, self._deployment, image, index))
            return self._client.create_custom_job(
                parent=self._deployment.location,
                custom_job=aiplatform_v1.CustomJob.from_json(asked),
                retry=None,
                timeout=self._access.patience.timeout_s,
            )

        jobs = [*there, *in_parallel(create, [one for one in range(request.task_count) if one not in started])]
        parts = [(job, describe(job, ())) for job in jobs]
        return together(parts) if many else parts[0][1]

    def _launched(self, request: JobRequest) -> Execution | None:
        """None as long as one of its tasks is missing."""
        parts = [(job, self._describe(job)) for job in self._jobs_of_launch(request.launch_id)]
        if len({task_of(job)[0] for job, _ in parts}) < request.task_count:
            return None
        return together(parts) if request.task_count > 1 else parts[0][1]

    def _jobs_of_launch(self, launch_id: str) -> list[Any]:
        return list(self._list(f'labels.{LAUNCH_LABEL}="{label(launch_id)}"'))

    def _list(self, filters: str) -> Iterable[Any]:
        """Newest first, as Vertex AI lists them."""
        parent = self._deployment.location
        with self._access.errors(f"{parent}/customJobs"):
            asked = aiplatform_v1.ListCustomJobsRequest(parent=parent, filter=filters, page_size=PAGE)
            yield from self._client.list_custom_jobs(asked, **self._again)

    def _read_all(self, name: str) -> list[Any]:
        """The jobs of an execution. Raises ExecutionNotFoundError."""
        array = ARRAY.fullmatch(name)
        if array is None:
            return [self._read(name)]
        found = list(self._list(f'labels.{LAUNCH_LABEL}="{array["launch_label"]}"'))
        if not found:
            raise ExecutionNotFoundError(name)
        return found

    def _read(self, name: str) -> Any:
        """Raises ExecutionNotFoundError."""
        if not JOB_NAME.fullmatch(name):
            raise ExecutionNotFoundError(name)
        path = f"{self._deployment.location}/customJobs/{name}"
        with self._access.errors(path):
            try:
                return self._client.get_custom_job(name=path, **self._again)
            except NotFound:
                raise ExecutionNotFoundError(name) from None

    def _describe(self, job: Any) -> Execution:
        return describe(job, self._attempts(job))

    def _attempts(self, job: Any) -> list[dict[str, Any]]:
        name = attempts_name(job, self._deployment.vertex.mount_path) if self._deployment.vertex else None
        if name is None:
            return []
        try:
            return list(json.loads(self._bucket.read(name))["attempts"])
        except ObjectNotFoundError:
            return []

    def _test_permissions(self, service: str, resource: str, permissions: tuple[str, ...]) -> list[str]:
        host = self._access.emulator or f"https://{service}.googleapis.com"
        session = AuthorizedSession(self._access.credentials)
        with self._access.errors(resource):
            answer = session.post(
                f"{host}/v1/{resource}:testIamPermissions",
                json={"permissions": list(permissions)},
                timeout=self._access.patience.timeout_s,
            )
            if not answer.ok:
                raise UserError(f"{resource}: cannot ask what is allowed ({answer.status_code} {answer.reason}).")
            return list(answer.json().get("permissions", []))


def _transport(access: Access) -> Any:
    if access.emulator is None:
        host = f"{access.deployment.region}-aiplatform.googleapis.com"
        return JobServiceRestTransport(host=host, credentials=access.credentials)
    scheme, _, _ = access.emulator.partition(":")
    return JobServiceRestTransport(host=access.emulator, url_scheme=scheme, credentials=access.credentials)
