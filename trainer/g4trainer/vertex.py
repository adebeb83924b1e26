"""`python -m g4trainer.vertex --attempts N ARGUMENTS`: what every container of a Vertex AI job runs.

Vertex AI has no attempts: a container that fails ends the job, machines and all. So they are made here, as Cloud Run
makes them: each with a time limit, then SIGTERM, a grace period, SIGKILL, until one ends with 0; or, which Cloud Run
does not know, with a code after which no retry can help (g4trainer.exits.FINAL). What became of them stands in
`$G4KIT_ATTEMPTS_FILE`, for the command line.

On several hosts each container makes its own attempts, and torchrun's rendezvous brings those of one number together:
where one process fails, all of its attempt end (g4trainer.lifeline), on every host. The first worker pool's one
container, the chief, counts. The others follow it for as long as it goes on: with it Vertex AI ends them.
Reference: https://cloud.google.com/vertex-ai/docs/training/distributed-training
"""

import argparse
import contextlib
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from g4trainer import rundir
from g4trainer.deadline import ATTEMPTS_VARIABLE, TIMEOUT_VARIABLE
from g4trainer.exits import FINAL
from g4trainer.processes import end_group, signal_group

ATTEMPTS_FILE = "G4KIT_ATTEMPTS_FILE"
TRAINER = "G4KIT_TRAINER"
"""Command that stands in for `python -m g4trainer`, as on the local target."""
GRACE = "G4KIT_GRACE_S"
GRACE_S = 10.0
"""Between SIGTERM and SIGKILL, as on Cloud Run."""
CHIEF, WORKERS = "workerpool0", "workerpool1"
JOIN_S = 1800
"""How long a host waits for the others, the chief's included: machines start one by one, each with an image of several
GB to load. A worker's attempt may take as much longer than the chief's: when time is up, the chief says so."""
SETTLE_S = 0.5
"""Before the next attempt: log entries know no attempts and are told apart by the time of reading."""
PAUSE_S = 2.0
"""Before a worker host tries again, for the chief may still be ending its own attempt."""
POLL_S = 0.1
MAX_LINE_BYTES = 64 << 10
PUMP_GRACE_S = 2.0
"""A process that left its group may keep the output open; its lines are not waited for longer."""
FAILED = 1
TIMED_OUT, CANCELLED = "timed out", "cancelled"


class ClusterError(ValueError):
    """A CLUSTER_SPEC that says something else than this module was written for."""


@dataclass(frozen=True)
class Host:
    """This container among those of its job."""

    hosts: int = 1
    rank: int = 0
    """The chief is 0."""
    name: str = "localhost"
    chief: str = "localhost:0"
    """Address and port at which the chief's torchrun is met."""

    @property
    def leads(self) -> bool:
        return self.rank == 0


def host_of(environ: Mapping[str, str]) -> Host:
    """Who this container is, from the CLUSTER_SPEC that Vertex AI sets; alone where it names one host or is unset.

    Raises ClusterError.
    """
    stated = environ.get("CLUSTER_SPEC")
    if not stated:
        return Host()
    try:
        document = json.loads(stated)
        pools, task = document["cluster"], document["task"]
        chief, workers = pools[CHIEF], pools.get(WORKERS, [])
        index = int(task["index"])
        if len(chief) != 1 or task["type"] not in (CHIEF, WORKERS):
            raise ClusterError(f"CLUSTER_SPEC: got {stated}; one chief in {CHIEF} and hosts in {WORKERS} are known.")
        own = (chief if task["type"] == CHIEF else workers)[index]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ClusterError(f"CLUSTER_SPEC: got {stated}, which cannot be read ({error!r}).") from error
    if not workers:
        return Host()
    rank = 0 if task["type"] == CHIEF else 1 + index
    return Host(1 + len(workers), rank, own.rpartition(":")[0], chief[0])


def torchrun_variables(host: Host, run_id: str) -> dict[str, str]:
    """How torchrun is told who it is, by variables of its own; nothing for a single host.

    The rendezvous keeps one id over all attempts, so that a host whose count is another still finds the chief's next
    one. Ranks follow the hosts' names in order: the chief's, of `workerpool0`, comes first and gets rank 0.
    """
    if host.hosts == 1:
        return {}
    return {
        "PET_NNODES": str(host.hosts),
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": host.chief,
        "PET_RDZV_ID": run_id,
        # read_timeout is also how long the chief's store is looked for: torch's own 60 s are over before it is there.
        "PET_RDZV_CONF": f"is_host={int(host.leads)},join_timeout={JOIN_S},read_timeout={JOIN_S}",
        "PET_LOCAL_ADDR": host.name,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="g4trainer.vertex", description="Makes the attempts of a Vertex AI job.")
    parser.add_argument("--attempts", type=int, required=True, help="how many in all")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what g4trainer gets")
    options = parser.parse_args(arguments)
    try:
        host = host_of(os.environ)
    except ClusterError as error:
        print(f"g4trainer: {error}", file=sys.stderr)
        return FAILED
    attempts = Attempts(
        command=(*_trainer(os.environ), *options.arguments),
        most=options.attempts,
        host=host,
        path=Path(os.environ[ATTEMPTS_FILE]) if host.leads and ATTEMPTS_FILE in os.environ else None,
        timeout_s=float(os.environ[TIMEOUT_VARIABLE]) + (0 if host.leads else JOIN_S),
        grace_s=float(os.environ.get(GRACE) or GRACE_S),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, attempts.stop)
    return code_for_vertex(attempts.make())


def code_for_vertex(code: int) -> int:
    """What the container ends with. Vertex AI starts the whole job again, up to three times, where the code is that of
    SIGABRT or SIGSEGV: attempts are counted here, so it is not told."""
    return code if code < 128 and code not in (signal.SIGABRT, signal.SIGSEGV) else FAILED


@dataclass
class Attempts:
    """The attempts of one container, one after the other."""

    command: Sequence[str]
    most: int
    host: Host
    path: Path | None
    """Where to note them; None notes nothing, as on all hosts but the chief."""
    timeout_s: float
    grace_s: float
    _noted: list[dict[str, Any]] = field(default_factory=list)
    _stopped: bool = False
    _written: bool = False

    def stop(self, *_: object) -> None:
        """Ends the attempt that runs, and starts no other."""
        self._stopped = True

    def make(self) -> int:
        """Returns the exit code of the last one. A container that was started again goes on counting."""
        if self.path and self.path.exists():
            self._noted = rundir.read_json(self.path)["attempts"]
        code = FAILED
        if self.host.leads and len(self._noted) >= self.most:
            return self._noted[-1]["exit_code"] or FAILED
        number = len(self._noted)
        while not self._stopped:
            code, why = self._make(number)
            print(f"g4kit: attempt {number + 1} ended with exit code {code}" + (why and f": {why}"), flush=True)
            number += 1
            if code == 0 or (self.host.leads and (code in FINAL or number >= self.most)):
                break
            time.sleep(SETTLE_S if self.host.leads else PAUSE_S)
        return code

    def _make(self, number: int) -> tuple[int, str]:
        """The exit code, 128 plus the number for a signal, and why it was ended, empty where it ended by itself."""
        record: dict[str, Any] = {"started_at": _now(), "finished_at": None, "exit_code": None, "ended_by": ""}
        self._noted.append(record)
        self._write()
        process = subprocess.Popen(
            self.command,
            env=self._environment(number),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        pump = threading.Thread(target=_pass_on, args=[process.stdout], daemon=True)
        pump.start()
        try:
            why = self._wait(process)
        finally:
            if process.poll() is None:
                end_group(process, self.grace_s)
            signal_group(process.pid, signal.SIGKILL)  # what the attempt itself left running
        pump.join(PUMP_GRACE_S)
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        record |= {"finished_at": _now(), "exit_code": code, "ended_by": why}
        self._write()
        return code, why

    def _wait(self, process: "subprocess.Popen[bytes]") -> str:
        deadline = time.monotonic() + self.timeout_s
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=POLL_S)
                return ""
            if self._stopped:
                return CANCELLED
            if time.monotonic() >= deadline:
                return TIMED_OUT

    def _environment(self, number: int) -> dict[str, str]:
        """Cloud Run's variables, which the trainer knows, and torchrun's."""
        execution = os.environ.get("CLOUD_ML_JOB_ID", "")
        # The chief counts what is paid for; a worker's attempts may be waits for a chief that is not there yet.
        inherited = {name: value for name, value in os.environ.items() if self.host.leads or name != ATTEMPTS_VARIABLE}
        return {
            **inherited,
            **({} if self.host.leads else {TIMEOUT_VARIABLE: str(self.timeout_s)}),
            "CLOUD_RUN_JOB": "vertex",
            "CLOUD_RUN_EXECUTION": execution,
            "CLOUD_RUN_TASK_INDEX": inherited.get("CLOUD_RUN_TASK_INDEX", "0"),
            "CLOUD_RUN_TASK_COUNT": inherited.get("CLOUD_RUN_TASK_COUNT", "1"),
            "CLOUD_RUN_TASK_ATTEMPT": str(number),
            **torchrun_variables(self.host, execution),
        }

    def _write(self) -> None:
        if self.path is None:
            return
        document = {"attempts": self._noted}
        try:
            if self._written:
                with contextlib.suppress(FileNotFoundError):  # whoever asked has their answer, and took it away
                    rundir.overwrite_json(self.path, document)
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                rundir.write_json(self.path, document)
                self._written = True
        except OSError as error:  # a bucket out of reach for a moment ends no attempt
            print(f"g4kit: {self.path}: cannot be written ({error})", file=sys.stderr, flush=True)


def _pass_on(stream: IO[bytes]) -> None:
    """Both streams of an attempt to our own output, the last line brought to an end if the attempt did not."""
    line = b"\n"
    while line:
        last, line = line, stream.readline(MAX_LINE_BYTES)
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    if not last.endswith(b"\n"):
        sys.stdout.buffer.write(b"\n")
        sys.stdout.buffer.flush()


def _trainer(environ: Mapping[str, str]) -> list[str]:
    return shlex.split(environ.get(TRAINER, "")) or [sys.executable, "-m", "g4trainer"]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat()


if __name__ == "__main__":
    raise SystemExit(main())
