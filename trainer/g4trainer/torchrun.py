"""Starts torchrun where an attempt takes several processes, and stands for them all: one signal in, one exit code out.

torchrun starts one process a GPU and ends them all when one dies. Left alone it would turn every exit code into 1, and
a signal into thirty seconds' notice. So the launcher keeps a connection to each process it had started: it passes
signals on, takes the exit code from rank 0, and its own death is theirs.

On several hosts each runs the same command. torchrun reads who they are from its own variables: PET_NNODES,
PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT, or PET_RDZV_ENDPOINT with PET_RDZV_BACKEND and PET_RDZV_ID.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from g4trainer.deadline import STARTED_VARIABLE
from g4trainer.exits import ExitCode
from g4trainer.planner import processes_that_divide
from g4trainer.recipe import FrozenRecipe
from g4trainer.wire import Wire, listen

LAUNCHER_VARIABLE = "G4KIT_LAUNCHER"
"""The launcher's socket; set for the processes that it has torchrun start."""
POLL_S = 0.05
STOP_S = 20.0
"""After a second SIGINT, or when rank 0 has ended: how long the processes have until they are killed."""


def hosts_of(environ: Mapping[str, str] = os.environ) -> int:
    """How many hosts share the attempt."""
    return int(environ.get("PET_NNODES") or 1)


class LaunchError(ValueError):
    """A number of processes that cannot be had here, with what to write."""


def under_torchrun(environ: Mapping[str, str] = os.environ) -> bool:
    return "TORCHELASTIC_RUN_ID" in environ


def processes_on_this_host(frozen: FrozenRecipe, *, devices: int, environ: Mapping[str, str] = os.environ) -> int:
    """How many processes an attempt takes on this host. Raises LaunchError where the recipe's number does not fit.

    devices: GPUs that CUDA shows; without one, the recipe's number is rehearsed on the CPU.
    The local target takes what is there, as far as the effective batch can be divided among it.
    """
    recipe, hosts = frozen.recipe, hosts_of(environ)
    wanted, rest = divmod(recipe.job.gpus, hosts)
    if rest:
        raise LaunchError(f"job.gpus: got {recipe.job.gpus} for {hosts} hosts; write a multiple of {hosts}.")
    if devices == 0:
        return wanted
    if frozen.target == "local" and hosts == 1:
        at_most = devices if wanted == 1 else min(wanted, devices)
        return processes_that_divide(recipe, at_most)[-1]
    if wanted > devices:
        raise LaunchError(
            f"job.gpus: got {recipe.job.gpus}, which is {wanted} on each of {hosts} hosts, and this one shows "
            f"{devices}; write job.gpus = {devices * hosts}, or choose a machine type with more."
        )
    return wanted


class Launcher:
    """Runs one attempt under torchrun."""

    def __init__(self, run: Path, processes: int, *, started: float, program: Sequence[str] = ()) -> None:
        """
        started: `time.monotonic()` at the start of this process, from which the attempt's limit counts.
        program: what each process runs, as torchrun takes it; `-m g4trainer run` with the run's path where it is empty.
        """
        self._program = program or ("-m", "g4trainer", "run", str(run.resolve()))
        self._processes, self._started = processes, started
        self._wires: list[Wire] = []
        self._passed_on: dict[Wire, int] = {}
        self._signals: list[int] = []
        self._code: int | None = None

    def run(self) -> int:
        """Returns the attempt's exit code; 1 where its processes did not live to say one."""
        with tempfile.TemporaryDirectory(prefix="g4trainer-") as folder:
            path = Path(folder) / "launcher"
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(str(path))
                listener.listen(self._processes)
                listen(listener, on_message=self._hear, on_lost=lambda _: None)
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, lambda number, _: self._signals.append(number))
                torchrun = subprocess.Popen(self._command(), env=self._environment(path), start_new_session=True)
                ended = self._wait(torchrun)
        if self._signals.count(signal.SIGINT) > 1:
            return int(ExitCode.KILLED)
        return self._code if self._code is not None else (ExitCode.FAILED if ended else ExitCode.DONE)

    def _command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--max-restarts", "0"),
            *("--nproc-per-node", str(self._processes)),
            *(("--standalone", "--local-addr", "127.0.0.1") if hosts_of() == 1 else ()),
            *self._program,
        ]

    def _environment(self, path: Path) -> dict[str, str]:
        """Their time counts from this process's start: how long hosts wait for one another is part of the attempt."""
        environment = {**os.environ, LAUNCHER_VARIABLE: str(path), STARTED_VARIABLE: str(self._started)}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._processes)))
        return environment

    def _wait(self, torchrun: "subprocess.Popen[bytes]") -> int:
        """Waits for torchrun; ends it by force where it outlives the attempt."""
        over: float | None = None
        while torchrun.poll() is None:
            self._pass_signals_on()
            if over is None and (self._code is not None or self._signals.count(signal.SIGINT) > 1):
                over = time.monotonic() + STOP_S
            if over is not None and time.monotonic() > over:
                self._signals.append(signal.SIGKILL)
                self._pass_signals_on()
                torchrun.kill()
                torchrun.wait()
            time.sleep(POLL_S)
        return torchrun.returncode

    def _pass_signals_on(self) -> None:
        """Each signal once to each process, also to one that came after it."""
        for wire in list(self._wires):
            passed = self._passed_on.get(wire, 0)
            for number in self._signals[passed:]:
                wire.send({"signal": int(number)})
                self._passed_on[wire] = self._passed_on.get(wire, 0) + 1

    def _hear(self, wire: Wire, message: Any) -> None:
        """A process says who it is, and, at its end, its exit code."""
        if "code" in message:
            if self._code is None or message["rank"] == 0:
                self._code = message["code"]
        else:
            self._wires.append(wire)


class Launched:
    """The other side: a process that a Launcher had started."""

    def __init__(self, path: str, rank: int) -> None:
        self._rank = rank
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        end.connect(path)
        self._wire = Wire(end, on_message=self._obey, on_lost=lambda _: os._exit(ExitCode.FAILED))
        self._wire.send({"rank": rank})

    def end(self, code: int) -> None:
        """Tells the exit code."""
        self._wire.send({"rank": self._rank, "code": int(code)})

    @staticmethod
    def _obey(_: Wire, message: Any) -> None:
        os.kill(os.getpid(), message["signal"])


def launched(environ: Mapping[str, str] = os.environ) -> Launched | None:
    """The connection to the Launcher that this process was started by; None where torchrun was started otherwise."""
    path = environ.get(LAUNCHER_VARIABLE)
    return Launched(path, int(environ.get("RANK", "0"))) if path and under_torchrun(environ) else None


def exit_code_for_torchrun(code: int, connection: Launched | None) -> int:
    """What to exit with: torchrun calls everything but 0 a failure, and logs a page about it."""
    if connection is None:
        return int(code)
    connection.end(code)
    return 0
