"""`python -m g4kit.cloud.supervisor EXECUTION_FOLDER`: runs a local execution as Cloud Run would.

Tasks one after the other, each with attempts until one exits with 0; every other exit code is retried, except, which
Cloud Run does not know, those after which no retry can help (g4trainer.exits.FINAL). An attempt gets Cloud Run's
environment variables, a time limit, and at its end SIGTERM, 10 s, SIGKILL for its whole process group. The
supervisor detaches from its starter, so it outlives the terminal.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from g4kit.cloud.base import ExecutionState, now
from g4kit.cloud.local_execution import ExecutionFolder
from g4kit.locks import take_lock
from g4trainer import rundir
from g4trainer.deadline import TIMEOUT_VARIABLE
from g4trainer.processes import end_group, signal_group

JOB = "g4kit-local"
POLL_S = 0.25
"""How soon a wish to cancel and the deadline are seen."""
MAX_LINE_BYTES = 64 << 10
"""A longer line is logged in pieces, so that memory stays bounded."""
PUMP_GRACE_S = 2.0
"""A process that left its group may keep the output open; its lines are not waited for longer."""
CANCELLED, TIMED_OUT, SHUT_DOWN = "cancelled", "timed out", "the machine is shutting down"


def main(folder: Path) -> int:
    """Returns in the starting process once the supervisor is alive, holding its lock."""
    execution = ExecutionFolder(folder)
    if take_lock(execution.supervisor_lock) is None or execution.state.exists():
        return 0  # another one supervises it, or it has been run
    request = rundir.read_json(execution.request)
    with execution.log.open("ab", buffering=0) as log:
        supervisor = Supervisor(execution, request, Log(log))
        if os.fork():
            return 0
        os.setsid()
        supervisor.run()
    os._exit(0)


class Log:
    """Appends `time task/attempt text` lines. A full disk loses lines, and says so later, but ends no attempt."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._lost = 0

    def write(self, task: int, attempt: int, text: str) -> None:
        with self._lock:
            lines = [text] if not self._lost else [f"g4kit: {self._lost} lines could not be written", text]
            stamp = now().isoformat(timespec="microseconds")
            try:
                self._file.write("".join(f"{stamp} {task}/{attempt} {line}\n" for line in lines).encode())
                self._lost = 0
            except OSError:
                self._lost += 1


class Supervisor:
    def __init__(self, folder: ExecutionFolder, request: dict[str, Any], log: Log) -> None:
        self.folder = folder
        self.request = request
        self.log = log
        self.shutting_down = False
        self.state: dict[str, Any] = {
            "state": ExecutionState.PENDING,
            "message": "",
            "started_at": None,
            "finished_at": None,
            "attempt": None,
            "tasks": [
                {
                    "index": index,
                    "state": ExecutionState.PENDING,
                    "attempt": 0,
                    "exit_code": None,
                    "started_at": None,
                    "finished_at": None,
                    "attempts": [],
                }
                for index in range(request["task_count"])
            ],
        }
        # Handlers rather than SIG_IGN, which the attempts would inherit.
        signal.signal(signal.SIGHUP, lambda *_: None)
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_shutdown)

    def run(self) -> None:
        self.state |= {"state": ExecutionState.RUNNING, "started_at": now().isoformat()}
        self._write_state()
        stopped = ""
        for task in self.state["tasks"]:
            stopped = self._run_task(task)
            task["finished_at"] = now().isoformat()
            if stopped:
                break
        failed = [task["index"] for task in self.state["tasks"] if task["state"] == ExecutionState.FAILED]
        if stopped == CANCELLED:
            outcome, message = ExecutionState.CANCELLED, ""
        elif stopped:
            outcome, message = ExecutionState.FAILED, stopped
        elif failed:
            outcome, message = ExecutionState.FAILED, self._failure(failed)
        else:
            outcome, message = ExecutionState.SUCCEEDED, ""
        self.state |= {"state": outcome, "message": message, "finished_at": now().isoformat(), "attempt": None}
        self._write_state()

    def _run_task(self, task: dict[str, Any]) -> str:
        """Runs a task's attempts. Returns why the whole execution must stop, or nothing."""
        task |= {"state": ExecutionState.RUNNING, "started_at": now().isoformat()}
        for attempt in range(self.request["max_attempts"]):
            task["attempt"] = attempt
            started_at = now().isoformat()
            exit_code, why = self._run_attempt(task["index"], attempt)
            task["exit_code"] = exit_code
            task["attempts"].append(
                {"started_at": started_at, "finished_at": now().isoformat(), "exit_code": exit_code, "ended_by": why}
            )
            if why == CANCELLED or self.shutting_down:
                task["state"] = ExecutionState.CANCELLED if why == CANCELLED else ExecutionState.FAILED
                return why or SHUT_DOWN
            if exit_code == 0:
                task["state"] = ExecutionState.SUCCEEDED
                return ""
            if exit_code in self.request["final_codes"]:
                break
        task["state"] = ExecutionState.FAILED
        return ""

    def _run_attempt(self, task: int, attempt: int) -> tuple[int, str]:
        """The exit code, and why the supervisor ended the attempt, empty where it ended by itself."""
        if self.folder.cancel.exists():
            return 128 + signal.SIGTERM, CANCELLED
        lock = take_lock(self.folder.attempt_lock(task, attempt))
        if lock is None:
            raise RuntimeError(f"{self.folder.attempt_lock(task, attempt)}: held by another process")
        process = subprocess.Popen(
            [*self.request["command"], *self.request["args"]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | self._environment(task, attempt),
            cwd=self.folder.path,
            start_new_session=True,
            pass_fds=(lock,),
        )
        os.close(lock)
        try:
            self.state["attempt"] = {"task": task, "attempt": attempt, "pid": process.pid}
            self._write_state()
            pump = threading.Thread(target=self._pump, args=(process.stdout, task, attempt), daemon=True)
            pump.start()
            why = self._wait(process)
        finally:  # whatever broke here, no attempt is left without a supervisor
            if process.poll() is None:
                end_group(process, self.request["grace_s"])
            signal_group(process.pid, signal.SIGKILL)  # what the attempt itself left running
        pump.join(PUMP_GRACE_S)
        exit_code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        self.log.write(
            task, attempt, f"g4kit: attempt {attempt + 1} ended with exit code {exit_code}" + (why and f": {why}")
        )
        return exit_code, why

    def _wait(self, process: subprocess.Popen[bytes]) -> str:
        deadline = time.monotonic() + self.request["timeout_s"]
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=POLL_S)
                return ""
            if self.folder.cancel.exists():
                return CANCELLED
            if self.shutting_down:
                return SHUT_DOWN
            if time.monotonic() >= deadline:
                return TIMED_OUT

    def _pump(self, stream: IO[bytes], task: int, attempt: int) -> None:
        while line := stream.readline(MAX_LINE_BYTES):
            text = line.decode(errors="replace").rstrip("\n").rstrip("\r")
            self.log.write(task, attempt, text.rpartition("\r")[2])  # of a progress bar, what a terminal would show

    def _environment(self, task: int, attempt: int) -> dict[str, str]:
        return {
            "CLOUD_RUN_JOB": JOB,
            "CLOUD_RUN_EXECUTION": self.folder.name,
            "CLOUD_RUN_TASK_INDEX": str(task),
            "CLOUD_RUN_TASK_COUNT": str(self.request["task_count"]),
            "CLOUD_RUN_TASK_ATTEMPT": str(attempt),
            "G4KIT_ROOT": self.request["root"],
            TIMEOUT_VARIABLE: str(self.request["timeout_s"]),
            "G4KIT_STATUS_INTERVAL_S": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def _failure(self, failed: list[int]) -> str:
        last = self.state["tasks"][failed[0]]["attempts"][-1]
        which = f"task {failed[0]} " if self.request["task_count"] > 1 else ""
        why = f" ({last['ended_by']})" if last["ended_by"] else ""
        attempts = len(self.state["tasks"][failed[0]]["attempts"])
        of_attempts = f"attempt {attempts} of {self.request['max_attempts']}"
        return f"{which}ended with exit code {last['exit_code']}{why} in {of_attempts}"

    def _write_state(self) -> None:
        rundir.write_json(self.folder.state, self.state)

    def _on_shutdown(self, *_: object) -> None:
        self.shutting_down = True


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
