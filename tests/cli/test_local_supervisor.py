"""The local target when things die: the command line, the supervisor, the machine."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contract.task import TASK
from contract.waiting import wait, wait_until
from g4kit.cloud.base import Execution, ExecutionState, JobRequest, JobStartError
from g4kit.cloud.local import LocalCloud
from g4kit.cloud.local_execution import START_GRACE_S, ExecutionFolder
from g4kit.cloud.supervisor import Log
from g4kit.locks import is_locked


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[LocalCloud]:
    made = LocalCloud(tmp_path / "root", command=TASK, grace_s=1.0)
    yield made
    for execution in made.jobs.find():
        made.jobs.cancel(execution.name)
        wait(made, execution.name)


def run(cloud: LocalCloud, *args: str, launch_id: str = "a", env: dict[str, str] | None = None) -> Execution:
    return cloud.jobs.run(JobRequest("run-1", launch_id, args, 60, 1, "nvidia-l4", env or {}))


def running(cloud: LocalCloud, name: str) -> ExecutionFolder:
    """The execution's folder, once its attempt has written its first line."""
    folder = cloud.jobs.folder(name)
    wait_until(lambda: folder.log.exists() and folder.log.stat().st_size, bool)
    return folder


def state(folder: ExecutionFolder) -> dict[str, Any]:
    return dict(json.loads(folder.state.read_text()))


def supervisor_pid(folder: ExecutionFolder) -> int:
    """Found by its command line: nothing on disk is trusted to name it."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b"g4kit.cloud.supervisor" in command and os.fsencode(folder.path) in command:
                return int(process.name)
    raise AssertionError("no supervisor is running")


def test_a_killed_supervisor_never_looks_running_for_long(cloud: LocalCloud) -> None:
    name = run(cloud, "print:up", "sleep:0.5", "print:still here", "sleep:60").name
    folder = running(cloud, name)
    attempt = state(folder)["attempt"]["pid"]
    os.kill(supervisor_pid(folder), signal.SIGKILL)
    orphaned = wait_until(lambda: cloud.jobs.get(name), lambda found: bool(found.message))
    if orphaned.active:  # until it writes to the broken pipe
        assert "its supervisor was killed" in orphaned.message
        assert Path(f"/proc/{attempt}").exists()
    ended = wait(cloud, name, timeout_s=10)
    assert ended.state is ExecutionState.FAILED
    assert ended.tasks[0].state is ExecutionState.FAILED
    assert "its supervisor was killed" in ended.message


def test_an_attempt_without_its_supervisor_can_be_cancelled(cloud: LocalCloud) -> None:
    name = run(cloud, "on-term:75", "print:up", "sleep:60").name
    folder = running(cloud, name)
    attempt = state(folder)["attempt"]["pid"]
    os.kill(supervisor_pid(folder), signal.SIGKILL)
    wait_until(lambda: is_locked(folder.supervisor_lock), lambda locked: not locked)
    assert cloud.jobs.get(name).active
    cloud.jobs.cancel(name)
    assert cloud.jobs.get(name).state is ExecutionState.CANCELLED
    wait_until(lambda: "\nState:\tZ" in read_status(attempt), bool)


def test_supervisor_and_attempt_both_killed_as_by_a_power_cut(cloud: LocalCloud) -> None:
    name = run(cloud, "print:up", "sleep:60").name
    folder = running(cloud, name)
    for pid in (supervisor_pid(folder), state(folder)["attempt"]["pid"]):
        os.kill(pid, signal.SIGKILL)
    ended = wait(cloud, name, timeout_s=5)
    assert (ended.state, ended.exit_code) == (ExecutionState.FAILED, None)
    assert "the machine restarted" in ended.message


def test_a_machine_that_shuts_down_lets_the_attempt_stop_itself(cloud: LocalCloud) -> None:
    name = run(cloud, "on-term:75", "print:up", "sleep:60").name
    os.kill(supervisor_pid(running(cloud, name)), signal.SIGTERM)
    ended = wait(cloud, name, timeout_s=10)
    assert (ended.state, ended.exit_code) == (ExecutionState.FAILED, 75)
    assert "shutting down" in ended.message


def test_a_request_whose_supervisor_never_started(cloud: LocalCloud, tmp_path: Path) -> None:
    ended = wait(cloud, run(cloud, "print:up").name)
    folder = cloud.jobs.folder(ended.name)
    request = json.loads(folder.request.read_text())
    for file in folder.path.iterdir():
        if file != folder.request:
            file.unlink()
    assert cloud.jobs.get(ended.name).state is ExecutionState.PENDING
    request["created_at"] = "2026-01-01T00:00:00+00:00"
    folder.request.write_text(json.dumps(request))
    lost = cloud.jobs.get(ended.name)
    assert (lost.state, lost.message) == (ExecutionState.FAILED, "its supervisor never started")
    assert START_GRACE_S < 60
    assert wait(cloud, run(cloud, "print:up").name).state is ExecutionState.SUCCEEDED  # asked again, it starts


def test_asked_by_many_at_once_one_starts(cloud: LocalCloud) -> None:
    threads = [threading.Thread(target=run, args=(cloud, "print:once", "sleep:0.5")) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (execution,) = cloud.jobs.find()
    wait(cloud, execution.name)
    assert [line.text for line in cloud.logs.read(execution.name)].count("once") == 1


def test_the_attempt_gets_signals_as_if_started_by_a_shell(cloud: LocalCloud, tmp_path: Path) -> None:
    report = tmp_path / "signals"
    script = (
        "import signal as s, pathlib;"
        "found = [s.getsignal(number) for number in (s.SIGINT, s.SIGTERM, s.SIGHUP)];"
        "as_usual = found == [s.default_int_handler, s.SIG_DFL, s.SIG_DFL];"
        f"pathlib.Path({str(report)!r}).write_text(repr(as_usual))"
    )
    own = LocalCloud(tmp_path / "root", command=(sys.executable, "-c", script))
    wait(own, run(own).name)
    assert report.read_text() == "True"


def test_secrets_of_the_request_are_in_no_file(cloud: LocalCloud) -> None:
    secret = "hf_" + "x1" * 12
    ended = wait(cloud, run(cloud, "print:up", env={"HF_TOKEN": secret}).name)
    files = [path for path in cloud.bucket.root.rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert ended.state is ExecutionState.SUCCEEDED


def test_a_command_that_cannot_be_started_says_where_to_look(tmp_path: Path) -> None:
    cloud = LocalCloud(tmp_path, command=("/no/such/program",))
    ended = wait(cloud, run(cloud).name)
    assert ended.state is ExecutionState.FAILED
    log = Path(ended.message.partition("see ")[2])
    assert "/no/such/program" in log.read_text()


def test_a_supervisor_that_cannot_start_is_an_error(cloud: LocalCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(JobStartError, match=r"supervisor ended with 1; see .*supervisor\.log"):
        run(cloud, "print:up")


def test_a_full_disk_loses_log_lines_and_says_so() -> None:
    class Disk:
        full = False
        written = b""

        def write(self, data: bytes) -> int:
            if self.full:
                raise OSError(28, "No space left on device")
            self.written += data
            return len(data)

    disk = Disk()
    log = Log(disk)  # type: ignore[arg-type]
    log.write(0, 0, "one")
    disk.full = True
    log.write(0, 0, "two")
    log.write(0, 0, "three")
    disk.full = False
    log.write(0, 1, "four")
    texts = [line.split(" ", 2)[1:] for line in disk.written.decode().splitlines()]
    assert texts == [["0/0", "one"], ["0/1", "g4kit: 2 lines could not be written"], ["0/1", "four"]]


def test_a_progress_bar_is_logged_as_a_terminal_would_leave_it(tmp_path: Path) -> None:
    script = "import sys; sys.stdout.write('10%\\r50%\\r100%\\nnext\\n')"
    cloud = LocalCloud(tmp_path, command=(sys.executable, "-c", script))
    texts = [line.text for line in cloud.logs.follow(run(cloud).name)]
    assert texts[:2] == ["100%", "next"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGHUP])
def test_a_run_outlives_its_starter(cloud: LocalCloud, number: signal.Signals) -> None:
    """As when a terminal is closed, or Ctrl-C is pressed in it: the signal goes to the whole process group."""
    script = (
        "import signal, sys, time; from pathlib import Path; from g4kit.cloud.local import LocalCloud;"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL);"  # nohup, where these tests run under it, has it ignored
        "from g4kit.cloud.base import JobRequest;"
        f"cloud = LocalCloud(Path({str(cloud.bucket.root)!r}), command={TASK!r});"
        "cloud.jobs.run(JobRequest('run-1', 'a', ('print:up', 'sleep:1', 'print:done'), 60, 1, 'nvidia-l4'));"
        "print('started', flush=True); time.sleep(60)"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", script], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"started\n"
        os.killpg(starter.pid, number)
    ended = wait(cloud, "run-1-a")
    assert ended.state is ExecutionState.SUCCEEDED
    assert [line.text for line in cloud.logs.read(ended.name)][:2] == ["up", "done"]


def test_looking_does_not_disturb(cloud: LocalCloud) -> None:
    """Readers probe the supervisor's lock all the time; a supervisor that starts meanwhile must still get it."""
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            cloud.jobs.find()

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(5):
            assert wait(cloud, run(cloud, "exit:0", launch_id=str(number)).name).state is ExecutionState.SUCCEEDED
            time.sleep(0.01)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def read_status(pid: int) -> str:
    """Of a process; a zombie's where it is gone altogether."""
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "\nState:\tZ"
