"""What a run tells while it goes on: status.json, segments of metrics, TensorBoard.

The bucket may be a mount where every write replaces an object, and an object takes about one write a second. So files
that change often are kept in memory and published whole, each at most once an interval, by one background thread.
"""

import datetime
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from g4trainer.rundir import RunDir, to_json, write_bytes

DEFAULT_INTERVAL_S = 15.0


def status_interval_s() -> float:
    """Seconds between two writes of one file: `$G4KIT_STATUS_INTERVAL_S`, else 15."""
    return float(os.environ.get("G4KIT_STATUS_INTERVAL_S") or DEFAULT_INTERVAL_S)


class Publisher:
    """Writes files whole, each at most once an interval; the latest content wins. Use it as a context."""

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        self._pending: dict[Path, Callable[[], bytes]] = {}
        self._written: dict[Path, float] = {}
        self._condition = threading.Condition()
        self._closing = False
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Writes what is pending, each file no sooner than an interval after its last write."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()
        if error is None:
            self._raise_failure()

    def publish(self, path: Path, content: Callable[[], bytes]) -> None:
        """Has `content()` written to `path` soon. Raises the OSError that an earlier write met."""
        self._raise_failure()
        with self._condition:
            self._pending[path] = content
            self._condition.notify()

    def remove(self, path: Path) -> None:
        """Deletes a published file, and forgets what was still to be written to it."""
        with self._condition:
            self._pending.pop(path, None)
        path.unlink(missing_ok=True)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._pending and not self._closing:
                    self._condition.wait()
                if not self._pending:
                    return
                path = min(self._pending, key=self._due)
                wait_s = self._due(path) - time.monotonic()
                if wait_s > 0:
                    self._condition.wait(wait_s)
                    continue
                content = self._pending.pop(path)
            self._written[path] = time.monotonic()
            try:
                write_bytes(path, content())
            except OSError as error:
                self._failure = error
                return

    def _due(self, path: Path) -> float:
        return self._written.get(path, -self.interval_s) + self.interval_s


class Status:
    """status.json: what the run is doing now. A heartbeat keeps it fresh while a long phase says nothing."""

    def __init__(self, path: Path, publisher: Publisher, *, attempt: int) -> None:
        self._path = path
        self._publisher = publisher
        self._lock = threading.Lock()
        self._document: dict[str, Any] = {
            "state": "loading",
            "phase": "load",
            "step": 0,
            "total_steps": None,
            "loss": None,
            "learning_rate": None,
            "samples_per_second": None,
            "eta_s": None,
            "progress": None,
            "attempt": attempt,
            "heartbeat": now(),
            "message": "",
        }
        self._stopped = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        self.update()
        self._heart.start()

    def stop(self) -> None:
        """Ends the heartbeat; the last update is still published."""
        self._stopped.set()

    def update(self, **fields: Any) -> None:
        """Changes some fields; unknown names are a programming error and raise KeyError."""
        with self._lock:
            for name, value in fields.items():
                if name not in self._document:
                    raise KeyError(name)
                self._document[name] = value
        self._publisher.publish(self._path, self._render)

    def _render(self) -> bytes:
        with self._lock:
            self._document["heartbeat"] = now()
            return to_json(self._document)

    def _beat(self) -> None:
        while not self._stopped.wait(self._publisher.interval_s):
            self._publisher.publish(self._path, self._render)


class MetricsLog:
    """metrics/NNNN.jsonl and TensorBoard's event file: one segment an attempt, each published whole."""

    def __init__(self, run: RunDir, publisher: Publisher, *, attempt: int) -> None:
        self._publisher = publisher
        self._segment = run.metrics / f"{attempt:04d}.jsonl"
        self._events = run.tensorboard / f"{attempt:04d}" / f"events.out.tfevents.{int(time.time())}.g4trainer"
        self._lines: list[bytes] = []
        self._event_bytes = _GrowingFile()
        self._records = RecordWriter(self._event_bytes)
        self._record(file_version="brain.Event:2")

    def add(self, kind: str, step: int, **values: float | None) -> None:
        """One line: its kind (`train` or `eval`), the optimizer step, and numbers by name (None is left out)."""
        numbers = {name: value for name, value in values.items() if value is not None}
        line = {"kind": kind, "step": step, **numbers, "time": now()}
        self._lines.append(json.dumps(line, allow_nan=False).encode() + b"\n")
        summary = Summary(
            value=[Summary.Value(tag=f"{kind}/{name}", simple_value=value) for name, value in numbers.items()]
        )
        self._record(step=step, summary=summary)
        self._publisher.publish(self._segment, lambda: b"".join(self._lines))
        self._publisher.publish(self._events, self._event_bytes.content)

    def _record(self, **fields: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())


class _GrowingFile:
    """The file that TensorBoard's record writer writes to, in memory."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []

    def write(self, data: bytes) -> None:
        self._blocks.append(bytes(data))

    def content(self) -> bytes:
        return b"".join(self._blocks)


def read_metrics(run: RunDir) -> list[dict[str, Any]]:
    """All lines of all segments in order. Steps that one attempt lost and the next one repeated count once."""
    lines: list[dict[str, Any]] = []
    for segment in sorted(run.metrics.glob("*.jsonl")):
        fresh = [json.loads(line) for line in segment.read_bytes().splitlines()]
        if fresh:
            first = min(line["step"] for line in fresh)
            lines = [line for line in lines if line["step"] < first] + fresh
    return lines


def now() -> str:
    """The time in UTC, ISO 8601, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
