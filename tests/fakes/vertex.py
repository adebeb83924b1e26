"""A live fake of Vertex AI's custom jobs: each replica is a real process that sees the bucket as a folder.

What a container may count on is what Google's pages say: CLUSTER_SPEC and CLOUD_ML_JOB_ID in its environment, the job
over with its chief, over too where any replica fails, and started again where the code is that of a crash. Cancelling
tells the processes before it kills them: that is assumed.
Reference: https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.customJobs
"""

import contextlib
import datetime
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil  # type: ignore[import-untyped]
from google.cloud import aiplatform_v1
from google.protobuf.json_format import ParseError

from fakes.container import OF_THE_MACHINE
from fakes.server import Answer, Request, error, ok
from g4kit.cloud.base import LogLine, now

NUMBER = "123456789012"
"""The project's, under which Vertex AI names its resources."""
JOBS = re.compile(r"/v1/projects/[^/]+/locations/(?P<region>[^/]+)/customJobs$")
JOB = re.compile(r"/v1/projects/[^/]+/locations/(?P<region>[^/]+)/customJobs/(?P<job>[^/:]+)(?P<verb>:cancel)?$")
ALLOWED = re.compile(r"/v1/projects/.+:testIamPermissions$")
LABEL = re.compile(r'labels\.(?P<key>[a-z0-9_-]+)(?:="(?P<value>[^"]*)"|:\*)$')
LABEL_KEY, LABEL_VALUE = re.compile(r"[a-z][a-z0-9_-]{0,62}"), re.compile(r"[a-z0-9_-]{0,63}")
TRANSIENT = {6, 11, 134, 139}
"""Exit codes of SIGABRT and SIGSEGV: the job is started again, up to three times."""
RESTARTS = 3
SEE_LOGS = "To find out more about why your job exited please check the logs: https://console.cloud.google.com/logs"
POLL_S = 0.02
ACTIVE = ("JOB_STATE_QUEUED", "JOB_STATE_PENDING", "JOB_STATE_RUNNING", "JOB_STATE_CANCELLING")


@dataclass
class Replica:
    name: str
    process: "subprocess.Popen[bytes]"
    pumps: list[threading.Thread]


@dataclass
class Job:
    id: str
    asked: dict[str, Any]
    created_at: datetime.datetime
    state: str = "JOB_STATE_QUEUED"
    started_at: datetime.datetime | None = None
    ended_at: datetime.datetime | None = None
    error: str = ""
    starts: int = 0
    """Of its replicas, all together."""
    lost: bool = False
    """Its machines are to go away."""
    replicas: list[Replica] = field(default_factory=list)
    lines: list[tuple[str, LogLine]] = field(default_factory=list)
    """Replica, and what it wrote."""


class FakeVertex:
    """`pending_s`: how long a job waits for its machines. `denied`: permissions that nobody has. `off`: the API is."""

    def __init__(self, mount: Path, project: str, region: str, command: tuple[str, ...], *, grace_s: float) -> None:
        self.pending_s = 0.0
        self.denied: set[str] = set()
        self.off = False
        self.exhausted = ""
        """A quota that creating a job exceeds."""
        self.room = 0
        """Jobs that fit it."""
        self.jobs: dict[str, Job] = {}
        self._mount, self._project, self._region = mount, project, region
        self._command, self._grace_s = command, grace_s
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Answer | None:
        if ALLOWED.match(request.path):
            return ok({"permissions": [one for one in request.json()["permissions"] if one not in self.denied]})
        found = JOBS.match(request.path) or JOB.match(request.path)
        if found is None:
            return None
        if self.off:
            service = "aiplatform.googleapis.com"
            said = f"Vertex AI API ({service}) has not been used in project {NUMBER} before or it is disabled."
            return error(
                403, said, [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "SERVICE_DISABLED"}]
            )
        if found["region"] != self._region:
            return error(404, f"no such location: {found['region']}")
        if "job" not in found.groupdict():
            return self._create(request) if request.method == "POST" else self._list(request)
        job = self.jobs.get(found["job"])
        if job is None:
            return error(404, f"The CustomJob {found['job']} does not exist.")
        return self._cancel(job) if found["verb"] else ok(self._document(job))

    def lose_machines(self, job_id: str) -> None:
        """The machines go away without a word; Vertex AI gets others and starts the job's containers again."""
        job = self.jobs[job_id]
        starts, job.lost = job.starts, True
        _wait_until(lambda: job.starts > starts or job.state not in ACTIVE)

    def stop(self) -> None:
        """Ends what still runs."""
        for job in self.jobs.values():
            if job.state in ACTIVE:
                job.state = "JOB_STATE_CANCELLING"
        _wait_until(lambda: all(job.state not in ACTIVE for job in self.jobs.values()))

    def _create(self, request: Request) -> Answer:
        if "aiplatform.customJobs.create" in self.denied:
            return error(403, f"Permission 'aiplatform.customJobs.create' denied on resource '{self._project}'.")
        asked = request.json()
        wrong = _wrong(asked)
        if wrong:
            return error(400, wrong)
        with self._lock:
            if self.exhausted and len(self.jobs) >= self.room:
                return error(429, f"The following quota metrics exceed quota limits: {self.exhausted}")
            job = Job(str(7_000_000_000_000_000_000 + len(self.jobs)), asked, now())
            self.jobs[job.id] = job
        threading.Thread(target=self._run, args=[job], daemon=True).start()
        return ok(self._document(job))

    def _list(self, request: Request) -> Answer:
        """Newest first, in pages of `pageSize`."""
        wanted = LABEL.match(request.query.get("filter", ""))
        if wanted is None:
            return error(400, f"this fake cannot answer {request.query}")
        key, value = wanted["key"], wanted["value"]
        labels = [(job, job.asked.get("labels", {})) for job in reversed(self.jobs.values())]
        found = [job for job, own in labels if key in own and value in (None, own[key])]
        begin, size = int(request.query.get("pageToken") or 0), int(request.query.get("pageSize") or 2)
        token = {"nextPageToken": str(begin + size)} if begin + size < len(found) else {}
        return ok({"customJobs": [self._document(job) for job in found[begin : begin + size]]} | token)

    def _cancel(self, job: Job) -> Answer:
        if job.state not in ACTIVE:
            return error(400, f"CustomJob {job.id} is in state {job.state} and cannot be cancelled.")
        job.state = "JOB_STATE_CANCELLING"
        return ok({})

    def _document(self, job: Job) -> dict[str, Any]:
        times = {"createTime": job.created_at, "startTime": job.started_at, "endTime": job.ended_at}
        return {
            **job.asked,
            "name": f"projects/{NUMBER}/locations/{self._region}/customJobs/{job.id}",
            "state": job.state,
            **{name: _time(value) for name, value in times.items() if value},
            **({"error": {"code": 3, "message": job.error}} if job.error else {}),
        }

    def _run(self, job: Job) -> None:
        """From the queue to the end."""
        ready = time.monotonic() + self.pending_s
        while time.monotonic() < ready and job.state != "JOB_STATE_CANCELLING":
            job.state = "JOB_STATE_PENDING"
            time.sleep(POLL_S)
        state, crashes = "", 0
        while not state:
            if job.state == "JOB_STATE_CANCELLING":
                state = "JOB_STATE_CANCELLED"
                break
            self._start(job)
            state, crashes = self._watch(job, crashes)
            self._end(job, cancelled=state == "JOB_STATE_CANCELLED")
        job.ended_at = now()
        job.state = state

    def _start(self, job: Job) -> None:
        names, port = _replica_names(job), _free_port()
        pools: dict[str, list[str]] = {}
        for number, name in enumerate(names):
            pools.setdefault(name.rpartition("-")[0], []).append(f"127.0.0.{number + 1}:{port}")
        job.lost = False
        job.replicas = [self._replica(job, name, pools) for name in names]
        job.starts += 1
        job.started_at = job.started_at or now()
        if job.state != "JOB_STATE_CANCELLING":
            job.state = "JOB_STATE_RUNNING"

    def _replica(self, job: Job, name: str, pools: Mapping[str, list[str]]) -> Replica:
        pool, _, index = name.rpartition("-")
        container = job.asked["jobSpec"]["workerPoolSpecs"][int(pool[-1])]["containerSpec"]
        spec = {"cluster": pools, "environment": "cloud", "task": {"type": pool, "index": int(index), "trial": ""}}
        environment = {key: value for key, value in os.environ.items() if key not in OF_THE_MACHINE}
        environment |= {
            "PYTHONUNBUFFERED": "1",
            "G4KIT_TRAINER": shlex.join(self._command),
            "G4KIT_GRACE_S": str(self._grace_s),
            **{one["name"]: one.get("value", "") for one in container["env"]},
            "CLOUD_ML_JOB_ID": job.id,
            "CLUSTER_SPEC": json.dumps(spec | {"job": job.asked["jobSpec"]}),
        }
        command = [sys.executable if part == "python" else part for part in container["command"][:1]]
        process = subprocess.Popen(
            [*command, *container["command"][1:], *container["args"]],
            env=environment,
            cwd=self._mount,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        pump = threading.Thread(target=_pump, args=[job, name, process.stdout], daemon=True)
        pump.start()
        return Replica(name, process, [pump])

    def _watch(self, job: Job, crashes: int) -> tuple[str, int]:
        """The state in which the job ends, empty where it begins again, and how often it has crashed."""
        while True:
            if job.state == "JOB_STATE_CANCELLING":
                return "JOB_STATE_CANCELLED", crashes
            if job.lost:
                return "", crashes
            for replica in job.replicas:
                code = replica.process.poll()
                if code == 0 and replica is job.replicas[0]:
                    return "JOB_STATE_SUCCEEDED", crashes
                if code:
                    code = code if code > 0 else 128 - code
                    if code in TRANSIENT and crashes < RESTARTS:
                        return "", crashes + 1
                    job.error = f"The replica {replica.name} exited with a non-zero status of {code}. {SEE_LOGS}"
                    return "JOB_STATE_FAILED", crashes
            time.sleep(POLL_S)

    def _end(self, job: Job, *, cancelled: bool) -> None:
        """Ends the containers with all their processes: told of it before where the job was cancelled."""
        for replica in job.replicas:
            if cancelled and replica.process.poll() is None:
                replica.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 3 * self._grace_s
        for replica in job.replicas:
            if cancelled and replica.process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    replica.process.wait(max(0.0, deadline - time.monotonic()))
            _kill_all(replica.process)
            for pump in replica.pumps:
                pump.join(2.0)


def _wrong(asked: Mapping[str, Any]) -> str:
    """Why Vertex AI would refuse a job; empty where it would not."""
    try:
        aiplatform_v1.CustomJob.from_json(json.dumps(asked))
    except ParseError as problem:
        return f"Invalid JSON payload received. {problem}"
    labels = asked.get("labels", {}).items()
    if not all(LABEL_KEY.fullmatch(key) and LABEL_VALUE.fullmatch(value) for key, value in labels):
        return f"Invalid labels: {dict(labels)}"
    pools = asked["jobSpec"]["workerPoolSpecs"]
    if int(pools[0]["replicaCount"]) != 1:
        return "The first worker pool must have exactly one replica."
    if any(not pool["machineSpec"].get("machineType") or not pool["containerSpec"].get("imageUri") for pool in pools):
        return "machineType and imageUri are required."
    return ""


def _replica_names(job: Job) -> list[str]:
    pools = job.asked["jobSpec"]["workerPoolSpecs"]
    return [
        f"workerpool{number}-{index}" for number, pool in enumerate(pools) for index in range(int(pool["replicaCount"]))
    ]


def _pump(job: Job, name: str, stream: IO[bytes]) -> None:
    for line in stream:
        text = line.decode(errors="replace").rstrip("\n")
        pool, _, index = name.rpartition("-")
        host = int(pool[-1]) and 1 + int(index)
        job.lines.append((name, LogLine(now(), text, host, 0)))


def _kill_all(process: "subprocess.Popen[bytes]") -> None:
    """The process and what it started, also in sessions of their own."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until(done: Any, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError("the fake's jobs do not come to an end")
        time.sleep(POLL_S)


def _time(value: datetime.datetime) -> str:
    return value.isoformat(timespec="microseconds").replace("+00:00", "Z")
