"""What a job runs in the contract tests: each argument is one thing to do, in order.

print:TEXT       a line on stdout
err:TEXT         a line on stderr
partial:TEXT     text without a line's end
env:NAME         `NAME=value` on stdout
write:PATH=TEXT  a file
exit:CODE        ends here
exit-at:N=CODE   ends here in attempt N
exit-task:N=CODE ends here in task N
sleep:SECONDS    in short naps, so that signals are served
on-term:CODE     from here on SIGTERM prints "stopping" and ends with this code
ignore-term:     from here on SIGTERM does nothing
child:SECONDS    starts a child process in the same group that sleeps, and prints its process id
kill:NUMBER      sends this signal to itself
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def main() -> None:
    for argument in sys.argv[1:]:
        verb, _, value = argument.partition(":")
        VERBS[verb](value)


def on_term(code: str) -> None:
    def stop(*_: object) -> None:
        print("stopping", flush=True)
        os._exit(int(code))

    signal.signal(signal.SIGTERM, stop)


def exit_where(variable: str) -> Callable[[str], None]:
    def end(value: str) -> None:
        number, code = value.split("=")
        if os.environ[variable] == number:
            sys.exit(int(code))

    return end


def sleep(seconds: str) -> None:
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        time.sleep(0.02)


def write(value: str) -> None:
    path, _, text = value.partition("=")
    Path(path).write_text(text)


def child(seconds: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])
    print(f"child {process.pid}", flush=True)


VERBS: dict[str, Callable[[str], object]] = {
    "print": lambda text: print(text, flush=True),
    "err": lambda text: print(text, file=sys.stderr, flush=True),
    "partial": lambda text: print(text, end="", flush=True),
    "env": lambda name: print(f"{name}={os.environ.get(name, '')}", flush=True),
    "write": write,
    "exit": lambda code: sys.exit(int(code)),
    "exit-at": exit_where("CLOUD_RUN_TASK_ATTEMPT"),
    "exit-task": exit_where("CLOUD_RUN_TASK_INDEX"),
    "sleep": sleep,
    "on-term": on_term,
    "ignore-term": lambda _: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "child": child,
    "kill": lambda number: os.kill(os.getpid(), int(number)),
}

TASK = (sys.executable, __file__)
"""The command that runs this file."""

if __name__ == "__main__":
    main()
