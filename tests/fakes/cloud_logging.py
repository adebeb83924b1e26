"""A small live fake of Cloud Logging's entries.list, over what the processes of the fakes of jobs wrote.

Reference: https://cloud.google.com/logging/docs/reference/v2/rest/v2/entries/list
"""

import re
from typing import Any

from fakes.cloud_run import FakeRun, Started
from fakes.server import Answer, Request, error, ok
from fakes.vertex import FakeVertex
from g4kit.cloud.base import LogLine, now

EXECUTION = re.compile(r'labels\."run\.googleapis\.com/execution_name" ?= ?"([^"]+)"')
VERTEX_JOBS = re.compile(r'resource\.type="ml_job" AND resource\.labels\.job_id=\(("\d+"(?: OR "\d+")*)\)')
SINCE = re.compile(r'timestamp ?>= ?"([^"]+)"')
ENDED = re.compile(r"g4kit: attempt \d+ ended with exit code (\d+)")
SYSTEM = "run.googleapis.com%2Fvarlog%2Fsystem"
STDOUT = "run.googleapis.com%2Fstdout"


class FakeLogging:
    """`delay_s`: how long a line takes until it is listed. Every third one comes at once, so they are out of order."""

    def __init__(self, run: FakeRun, vertex: FakeVertex, project: str, *, page_size: int = 100) -> None:
        self.delay_s = 0.0
        self.page_size = page_size
        self._run = run
        self._vertex = vertex
        self._project = project

    def __call__(self, request: Request) -> Answer | None:
        if request.path != "/v2/entries:list":
            return None
        asked = request.json()
        since = SINCE.search(asked["filter"])
        found, of_vertex = EXECUTION.search(asked["filter"]), VERTEX_JOBS.search(asked["filter"])
        known = found or of_vertex
        if asked["resourceNames"] != [f"projects/{self._project}"] or asked["orderBy"] != "timestamp asc" or not known:
            return error(400, f"this fake cannot answer {asked}")
        if of_vertex:
            ids = of_vertex[1].replace('"', "").split(" OR ")
            entries = sorted(
                (one for job in ids for one in self._vertex_entries(job)), key=lambda one: one["timestamp"]
            )
        else:
            started = self._run.started(known[1])
            entries = self._entries(started) if started else []
        entries = [one for one in entries if since is None or one["timestamp"] >= since[1]]
        begin = int(asked.get("pageToken") or 0)
        token = {"nextPageToken": str(begin + self.page_size)} if begin + self.page_size < len(entries) else {}
        return ok({"entries": entries[begin : begin + self.page_size]} | token)

    def _entries(self, started: Started) -> list[dict[str, Any]]:
        if self._run.state(started) is None:
            return []
        lines = list(self._run.engine.logs.read(started.name))
        shown = self._shown(lines)
        return [self._entry(started, number, line) for number, line in enumerate(lines) if shown[number]]

    def _vertex_entries(self, job_id: str) -> list[dict[str, Any]]:
        """As Vertex AI's agents write them: structured, the replica as the resource's `task_name`."""
        job = self._vertex.jobs.get(job_id)
        lines = list(job.lines) if job else []
        shown = self._shown([line for _, line in lines])
        return [
            {
                "insertId": f"{job_id}-{number:08}",
                "logName": f"projects/{self._project}/logs/{replica}",
                "timestamp": line.time.isoformat(timespec="microseconds").replace("+00:00", "Z"),
                "resource": {"type": "ml_job", "labels": {"job_id": job_id, "task_name": replica}},
                "jsonPayload": {"message": f"{line.text}\n", "levelname": "INFO", "attrs": {"tag": replica}},
            }
            for number, (replica, line) in enumerate(lines)
            if shown[number]
        ]

    def _shown(self, lines: list[LogLine]) -> list[bool]:
        at = now()
        return [
            (at - line.time).total_seconds() >= bool(number % 3) * self.delay_s for number, line in enumerate(lines)
        ]

    def _entry(self, started: Started, number: int, line: LogLine) -> dict[str, Any]:
        ended = ENDED.match(line.text)
        text, log = (f"Container called exit({ended[1]}).", SYSTEM) if ended else (line.text, STDOUT)
        entry = {
            "insertId": f"{started.name}-{number:08}",
            "logName": f"projects/{self._project}/logs/{log}",
            "timestamp": line.time.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "resource": {"type": "cloud_run_job", "labels": {"job_name": started.job.name}},
            "labels": {
                "run.googleapis.com/execution_name": started.name,
                "run.googleapis.com/task_index": str(line.task),
                "run.googleapis.com/task_attempt": str(line.attempt),
            },
        }
        return entry | ({"textPayload": text} if text else {})
