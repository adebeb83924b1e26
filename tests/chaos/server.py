"""A process that has imported everything and forks one real process for each attempt that a test asks for.

Importing torch and transformers takes longer than the attempts of these tests; a forked attempt starts at once, and it
can be killed like any other process. One thread a process: what OpenMP started would not survive a fork.

Reads one JSON request a line (`id`, `run`, `log`, `environment`, `layer`, `faults`); answers `{"id", "pid"}` and, when
the attempt is over, `{"id", "status"}`: its exit code, or minus the signal that ended it.
"""

import contextlib
import json
import logging
import os
import select
import sys
import time
from pathlib import Path
from typing import Any

POLL_S = 0.01


def main(root: Path) -> None:
    """root: where the embedded model and data are staged."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to stderr
    _warm_up(root)
    answers.write(json.dumps({"ready": True}) + "\n")
    running: dict[int, int] = {}
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], POLL_S if running else None)
        if readable:
            line = sys.stdin.readline()
            if not line:
                return
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                _attempt(request)
            running[pid] = request["id"]
            answers.write(json.dumps({"id": request["id"], "pid": pid}) + "\n")
        with contextlib.suppress(ChildProcessError):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                answers.write(json.dumps({"id": running.pop(pid), "status": code}) + "\n")


def _attempt(request: dict[str, Any]) -> None:
    """Does in the forked process what `python -m g4trainer run PATH` does; never returns."""
    from chaos import faults, layer
    from g4trainer import __main__ as program

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdin.close()
    logging.getLogger().handlers.clear()
    os.environ.update(request["environment"])
    program.STARTED = time.monotonic()
    if request["layer"]:
        layer.install(Path(request["run"]), request["layer"])
    for name, arguments in request["faults"].items():
        getattr(faults, name)(*arguments)
    code = 1
    try:
        code = program.main(["run", request["run"]])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _warm_up(root: Path) -> None:
    """Imports everything, stages the embedded model and data, and loads them once."""
    import torch

    from g4trainer import __main__ as program

    torch.set_num_threads(1)
    program._quiet_imports()
    os.environ["G4KIT_ROOT"] = str(root)
    from g4trainer import selftest, tiny, train  # noqa: F401
    from g4trainer.collator import Collator
    from g4trainer.model import load_base, load_processor
    from g4trainer.recipe import Model

    for folder, write in (("models/tiny-gemma4", tiny.write_model), ("datasets/digits", tiny.write_digits)):
        write(root / folder)
        selftest.mark_staged(root / folder, source="builtin")
    model = root / "models" / "tiny-gemma4"
    Collator(load_processor(model), max_soft_tokens=70, supervise="completion")
    load_base(model, Model(id="tiny-gemma4"), device=torch.device("cpu"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
