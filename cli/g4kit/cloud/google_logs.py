"""Cloud Logging: what an execution's processes wrote, through google-cloud-logging."""

import datetime
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

from google.cloud import logging

from g4kit.cloud.base import Jobs, LogLine, now
from g4kit.cloud.google_client import Access

LABEL = "run.googleapis.com"
STREAMS = ("stdout", "stderr", "varlog%2Fsystem")
SYSTEM = "varlog%2Fsystem"
EXIT = re.compile(r"Container called exit\((\d+)\)\.")
PAGE = 1000


class GoogleLogs:
    """Lines arrive late and out of order: they are held back for a moment, and each look goes back as far as lines may
    lag and knows those it has told."""

    def __init__(self, access: Access, jobs: Jobs) -> None:
        self._access = access
        self._project = access.deployment.project
        self._jobs = jobs
        self._client = logging.Client(
            project=self._project,
            credentials=access.credentials,
            _use_grpc=False,
            client_options={"api_endpoint": access.emulator} if access.emulator else None,
        )

    def read(self, execution: str, *, since: datetime.datetime | None = None) -> Iterator[LogLine]:
        found = self._jobs.get(execution)
        if found.finished_at is not None:  # its last lines may still be on their way
            age_s = (now() - found.finished_at).total_seconds()
            time.sleep(min(max(0.0, self._access.patience.settle_s - age_s), self._access.patience.settle_s))
        return (line for _, line in self._entries(execution, max(since or found.created_at, found.created_at)))

    def follow(self, execution: str, *, since: datetime.datetime | None = None) -> Iterator[LogLine]:
        begun = self._jobs.get(execution).created_at
        return self._follow(execution, max(since or begun, begun))

    def _follow(self, execution: str, since: datetime.datetime) -> Iterator[LogLine]:
        patience = self._access.patience
        lag = datetime.timedelta(seconds=patience.settle_s)
        hold = datetime.timedelta(seconds=patience.hold_s)
        told: dict[str, datetime.datetime] = {}
        ended_at: float | None = None
        while True:
            if ended_at is None and not self._jobs.get(execution).active:
                ended_at = time.monotonic()
            last = ended_at is not None and time.monotonic() - ended_at >= patience.settle_s
            before = now()
            for name, line in self._entries(execution, since):
                if name not in told and (last or line.time <= before - hold):
                    told[name] = line.time
                    yield line
            if last:
                return
            since = max(since, before - 2 * lag)
            told = {name: at for name, at in told.items() if at >= since}
            time.sleep(patience.poll_s)

    def _entries(self, execution: str, since: datetime.datetime) -> Iterator[tuple[str, LogLine]]:
        """Insert id and line, oldest first."""
        with self._access.errors(f"logs of {execution}"):
            found = self._access.retry()(self._list)(execution, since)
        lines = self._lines(execution, found)
        yield from zip((entry.insert_id for entry in found), lines, strict=True)

    def _list(self, execution: str, since: datetime.datetime) -> list[Any]:
        stamp = since.astimezone(datetime.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        filters = " AND ".join((*self._filters(execution), f'timestamp>="{stamp}"'))
        return list(self._client.list_entries(filter_=filters, order_by="timestamp asc", page_size=PAGE))

    def _filters(self, execution: str) -> Sequence[str]:
        """What tells an execution's entries from others."""
        streams = " OR ".join(f'"projects/{self._project}/logs/{LABEL}%2F{stream}"' for stream in STREAMS)
        return (
            'resource.type="cloud_run_job"',
            f'labels."{LABEL}/execution_name"="{execution}"',
            f"logName=({streams})",
        )

    def _lines(self, execution: str, entries: Sequence[Any]) -> list[LogLine]:
        return [_line(entry) for entry in entries]


def _line(entry: Any) -> LogLine:
    labels = entry.labels or {}
    attempt = int(labels.get(f"{LABEL}/task_attempt", 0))
    text = entry.payload if isinstance(entry.payload, str) else "" if entry.payload is None else str(entry.payload)
    if entry.log_name.endswith(SYSTEM):
        ended = EXIT.match(text)
        text = f"g4kit: attempt {attempt + 1} ended with exit code {ended[1]}" if ended else f"g4kit: Cloud Run: {text}"
    return LogLine(entry.timestamp, text, int(labels.get(f"{LABEL}/task_index", 0)), attempt)
