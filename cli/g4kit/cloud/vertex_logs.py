"""Cloud Logging: what the containers of a custom job wrote.

Reference: https://cloud.google.com/vertex-ai/docs/training/monitor-jobs
"""

import re
from collections.abc import Sequence
from typing import Any

from g4kit.cloud.base import LogLine
from g4kit.cloud.google_client import Access
from g4kit.cloud.google_logs import GoogleLogs
from g4kit.cloud.vertex_executions import attempt_at
from g4kit.cloud.vertex_jobs import VertexJobs

REPLICA = re.compile(r"workerpool(?P<pool>\d)-(?P<index>\d+)")


class VertexLogs(GoogleLogs):
    """Of a job alone a line's task is its host, the chief's is 0; of several tasks it is the task, of whatever host.
    Entries know no attempts, so those are told by their times."""

    def __init__(self, access: Access, jobs: VertexJobs) -> None:
        super().__init__(access, jobs)
        self._vertex_jobs = jobs
        self._known: dict[str, dict[str, int]] = {}

    def _filters(self, execution: str) -> Sequence[str]:
        jobs = self._jobs_of(execution)
        ids = " OR ".join(f'"{job}"' for job in jobs)
        return ('resource.type="ml_job"', f"resource.labels.job_id=({ids})")

    def _lines(self, execution: str, entries: Sequence[Any]) -> list[LogLine]:
        jobs = self._jobs_of(execution) if entries else {}
        attempts = {job: self._vertex_jobs.attempts(job) for job in {_job(entry) for entry in entries}}
        return [
            LogLine(
                entry.timestamp,
                _text(entry),
                jobs[_job(entry)] if len(jobs) > 1 else _host(entry),
                attempt_at(attempts[_job(entry)], entry.timestamp),
            )
            for entry in entries
        ]

    def _jobs_of(self, execution: str) -> dict[str, int]:
        """They stay the same for as long as the execution lives: asked for once."""
        if execution not in self._known:
            self._known[execution] = self._vertex_jobs.jobs_of(execution)
        return self._known[execution]


def _text(entry: Any) -> str:
    payload = entry.payload
    text = payload.get("message", "") if isinstance(payload, dict) else payload or ""
    replica = REPLICA.fullmatch(_task_name(entry))
    return str(text).rstrip("\n") if replica else f"g4kit: Vertex AI: {text}"


def _host(entry: Any) -> int:
    replica = REPLICA.fullmatch(_task_name(entry))
    return int(replica["pool"]) and 1 + int(replica["index"]) if replica else 0


def _task_name(entry: Any) -> str:
    return _resource_label(entry, "task_name")


def _job(entry: Any) -> str:
    return _resource_label(entry, "job_id")


def _resource_label(entry: Any, name: str) -> str:
    return str((entry.resource.labels if entry.resource else {}).get(name, ""))
