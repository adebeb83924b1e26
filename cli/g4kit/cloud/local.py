"""LocalCloud: a directory and supervised processes. The embedded default, with no cloud at all."""

import contextlib
import dataclasses
import datetime
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from g4kit.cloud.base import (
    Execution,
    ExecutionNotFoundError,
    Finding,
    JobRequest,
    JobStartError,
    LogLine,
    Tools,
    check_object_name,
    now,
)
from g4kit.cloud.local_bucket import INTERNAL_FOLDER, LocalBucket, storage_errors
from g4kit.cloud.local_execution import ExecutionFolder, attempt_is_alive, read_execution
from g4kit.locks import is_locked
from g4trainer import rundir
from g4trainer.exits import FINAL

FOLLOW_INTERVAL_S = 0.2
TERMINATION_GRACE_S = 10.0
TRAINER = (sys.executable, "-m", "g4trainer")


def trainer_command(environ: Mapping[str, str]) -> tuple[str, ...]:
    """`python -m g4trainer`, or what `$G4KIT_TRAINER` says, for example a container that has it."""
    return tuple(shlex.split(environ.get("G4KIT_TRAINER", ""))) or TRAINER


def trainer_problems(command: tuple[str, ...]) -> list[str]:
    """Why the trainer cannot be started on this machine; empty where it can."""
    if command == TRAINER and importlib.util.find_spec("torch") is None:
        return ["trainer: got a Python without torch; write: pip install 'g4kit[train]'"]
    return []


class LocalCloud:
    target = "local"

    def __init__(
        self,
        root: Path,
        *,
        command: tuple[str, ...] = TRAINER,
        grace_s: float = TERMINATION_GRACE_S,
        final_codes: Collection[int] = FINAL,
    ) -> None:
        """final_codes: exit codes after which no other attempt is made."""
        self.bucket = LocalBucket(root)
        self.jobs = LocalJobs(self.bucket, command, grace_s, final_codes)
        self.logs = LocalLogs(self.jobs)
        self._command = command

    def findings(self) -> list[Finding]:
        problems = trainer_problems(self._command)
        return [
            Finding("trainer", not problems, shlex.join(self._command), problems[0] if problems else ""),
            self._bucket_finding(),
        ]

    def _bucket_finding(self) -> Finding:
        """The folder that is to be written in: the root, or what will hold it."""
        root = self.bucket.root
        folder = next(path for path in (root, *root.parents) if path.exists())
        ok = folder.is_dir() and os.access(folder, os.W_OK)
        mend = "" if ok else f"{folder}: set G4KIT_ROOT to a folder that can be written"
        return Finding("bucket", ok, self.bucket.url, mend)


class LocalJobs:
    """Executions are folders below `root/local/executions`, named `<run id>-<launch id>`."""

    def __init__(
        self, bucket: LocalBucket, command: tuple[str, ...], grace_s: float, final_codes: Collection[int]
    ) -> None:
        self._bucket = bucket
        self._command = command
        self._grace_s = grace_s
        self._final_codes = final_codes
        self._folder = bucket.root / INTERNAL_FOLDER / "executions"

    def problems(self, request: JobRequest) -> list[str]:
        return trainer_problems(self._command)

    def image(self, accelerator: str) -> str | None:
        return None

    def tools(self) -> Tools | None:
        return None

    def run(self, request: JobRequest) -> Execution:
        folder = self.folder(f"{request.run_id}-{request.launch_id}", must_exist=False)
        with storage_errors(folder.path):
            # Asked again with the same launch id, the first request stands.
            with contextlib.suppress(FileExistsError):
                rundir.create_json(folder.request, self._document(request))
            if not folder.state.exists() and not is_locked(folder.supervisor_lock):
                self._start_supervisor(folder, request.env)
        return self.get(folder.name)

    def get(self, name: str) -> Execution:
        folder = self.folder(name)
        with storage_errors(folder.path):
            return read_execution(folder, now())

    def find(self, run_id: str | None = None) -> list[Execution]:
        with storage_errors(self._folder):
            names = [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []
        candidates = [name for name in names if run_id is None or name.startswith(f"{run_id}-")]
        folders = [folder for folder in map(self._at, candidates) if folder.request.exists()]
        executions = [self.get(folder.name) for folder in folders]
        return sorted(
            (one for one in executions if run_id is None or one.run_id == run_id),
            key=lambda execution: (execution.created_at, execution.name),
        )

    def cancel(self, name: str) -> None:
        folder = self.folder(name)
        if not self.get(name).active:
            return
        with storage_errors(folder.path), contextlib.suppress(FileExistsError):
            rundir.create_json(folder.cancel, {"time": now().isoformat()})
        if not is_locked(folder.supervisor_lock):
            self._end_orphan(folder)

    def folder(self, name: str, *, must_exist: bool = True) -> ExecutionFolder:
        """Raises ExecutionNotFoundError."""
        if "/" in check_object_name(name) or (must_exist and not self._at(name).request.exists()):
            raise ExecutionNotFoundError(name)
        return self._at(name)

    def _at(self, name: str) -> ExecutionFolder:
        return ExecutionFolder(self._folder / name)

    def _document(self, request: JobRequest) -> dict[str, object]:
        document = dataclasses.asdict(dataclasses.replace(request, env={}))
        del document["env"]  # it may hold secrets; the supervisor inherits it
        return document | {
            "command": list(self._command),
            "args": list(request.args),
            "root": str(self._bucket.root),
            "grace_s": self._grace_s,
            "final_codes": sorted(self._final_codes),
            "created_at": now().isoformat(),
        }

    def _start_supervisor(self, folder: ExecutionFolder, env: Mapping[str, str]) -> None:
        """Returns once the supervisor lives on its own."""
        with folder.supervisor_log.open("ab") as output:
            ended = subprocess.run(
                [sys.executable, "-m", "g4kit.cloud.supervisor", str(folder.path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | env,
                cwd=folder.path,
                start_new_session=True,
                check=False,
            )
        if ended.returncode:
            raise JobStartError(
                f"execution {folder.name}: its supervisor ended with {ended.returncode}; see {folder.supervisor_log}."
            )

    def _end_orphan(self, folder: ExecutionFolder) -> None:
        """Ends an attempt whose supervisor was killed. Its lock proves that the process id is still its own."""
        state = rundir.read_json(folder.state) if folder.state.exists() else None
        for number, wait_s in ((signal.SIGTERM, self._grace_s), (signal.SIGKILL, self._grace_s)):
            deadline = time.monotonic() + wait_s
            if state and attempt_is_alive(folder, state):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(state["attempt"]["pid"], number)
            while attempt_is_alive(folder, state) and time.monotonic() < deadline:
                time.sleep(FOLLOW_INTERVAL_S)


class LocalLogs:
    def __init__(self, jobs: LocalJobs) -> None:
        self._jobs = jobs

    def read(self, execution: str, *, since: datetime.datetime | None = None) -> Iterator[LogLine]:
        return self._lines(self._jobs.folder(execution), since, follow=False)

    def follow(self, execution: str, *, since: datetime.datetime | None = None) -> Iterator[LogLine]:
        return self._lines(self._jobs.folder(execution), since, follow=True)

    def _lines(self, folder: ExecutionFolder, since: datetime.datetime | None, *, follow: bool) -> Iterator[LogLine]:
        offset = 0
        while True:
            # Asked before reading: what an ended execution wrote is all there.
            more = follow and self._jobs.get(folder.name).active
            for raw in _whole_lines(folder.log, offset):
                offset += len(raw)
                line = _parse(raw)
                if since is None or line.time >= since:
                    yield line
            if not more:
                return
            time.sleep(FOLLOW_INTERVAL_S)


def _whole_lines(path: Path, offset: int) -> Iterator[bytes]:
    """Lines from a byte offset on, less a last one that is still being written."""
    if not path.exists():
        return
    with storage_errors(path), path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if line.endswith(b"\n"):
                yield line


def _parse(raw: bytes) -> LogLine:
    stamp, place, text = raw.decode(errors="replace").rstrip("\n").split(" ", 2)
    task, attempt = place.split("/")
    return LogLine(datetime.datetime.fromisoformat(stamp), text, int(task), int(attempt))
