"""The command line as a real process: Ctrl-C, SIGKILL, a terminal, a closed pipe."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.bench import Bench
from contract.waiting import wait, wait_until

SLOW = [{"steps": 3, "exit": 0, "sleep_s": 1.5}]


def start(bench: Bench, *arguments: str | Path, plan: list[dict[str, Any]], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "g4kit", *map(str, arguments)],
        env=os.environ | bench.environ(plan),
        start_new_session=True,
        text=True,
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=options.pop("stderr", subprocess.PIPE),
        **options,
    )


@pytest.fixture
def following(g4kit: Bench) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`launch --wait`, following a run; and the run's id."""
    with start(g4kit, "launch", g4kit.recipe, "--id", "mine-1", "--wait", plan=SLOW) as process:
        status = g4kit.root / "runs" / "mine-1" / "status.json"
        wait_until(status.exists, bool)
        yield process, "mine-1"
        process.kill()


def test_ctrl_c_detaches_and_says_how_to_come_back(g4kit: Bench, following: tuple[subprocess.Popen[str], str]) -> None:
    process, run_id = following
    os.killpg(process.pid, signal.SIGINT)
    _, prose = process.communicate(timeout=10)
    assert process.returncode == 130
    assert f"left; the run goes on. To come back: g4kit runs {run_id} --watch" in prose
    assert f"to end it: g4kit cancel {run_id}" in prose
    assert "Traceback" not in prose
    (execution,) = g4kit.cloud.jobs.find(run_id)
    assert execution.active
    assert wait(g4kit.cloud, execution.name).exit_code == 0
    assert "succeeded" in g4kit("runs").stdout


def test_a_killed_command_line_leaves_the_run_going(g4kit: Bench, following: tuple[subprocess.Popen[str], str]) -> None:
    process, run_id = following
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=10)
    (execution,) = g4kit.cloud.jobs.find(run_id)
    assert execution.active
    assert wait(g4kit.cloud, execution.name).exit_code == 0


def test_ctrl_c_while_reading_logs(g4kit: Bench, following: tuple[subprocess.Popen[str], str]) -> None:
    _, run_id = following
    with start(g4kit, "logs", run_id, "-f", plan=SLOW) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"step 1 of {run_id}\n"
        os.killpg(process.pid, signal.SIGINT)
        _, prose = process.communicate(timeout=10)
    assert process.returncode == 0
    assert f"To come back: g4kit logs {run_id} -f" in prose
    assert "Traceback" not in prose


def test_plain_lines_where_there_is_no_terminal(g4kit: Bench) -> None:
    with start(g4kit, "launch", g4kit.recipe, "--id", "mine-1", "--wait", plan=SLOW) as process:
        data, prose = process.communicate(timeout=30)
    assert process.returncode == 0
    assert data == "mine-1\n"
    assert "\x1b" not in prose
    lines = prose.splitlines()
    assert "running · train · step 3/10 · loss 0.3333 · 12.5 samples/s · 3 s left" in lines
    assert "succeeded · accuracy 0.1000 -> 0.9500" in lines


def test_a_bar_is_drawn_on_a_terminal(g4kit: Bench) -> None:
    controller, terminal = pty.openpty()
    environ = {"TERM": "xterm", "COLUMNS": "140", "LINES": "40"}
    process = subprocess.Popen(
        [sys.executable, "-m", "g4kit", "launch", str(g4kit.recipe), "--id", "mine-1", "--wait"],
        env=os.environ | g4kit.environ(SLOW) | environ,
        stdout=subprocess.PIPE,
        stderr=terminal,
        start_new_session=True,
        text=True,
    )
    os.close(terminal)
    drawn = read_until_closed(controller, process)
    data, _ = process.communicate(timeout=10)
    assert (process.returncode, data) == (0, "mine-1\n")
    assert "━" in drawn
    assert "step 3/10 · loss 0.3333 · 12.5 samples/s · 3 s left" in drawn
    assert "succeeded · accuracy 0.1000 -> 0.9500" in drawn


def test_copies_show_bytes_rate_and_time_left_on_a_terminal_and_json_stays_json(bare: Bench) -> None:
    folder = bare.folder / "photos"
    folder.mkdir()
    (folder / "train.parquet").write_bytes(os.urandom(3_000_000))
    (folder / "test.parquet").touch()
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "g4kit", "stage", "data", str(folder), "--json"],
        env=os.environ | bare.environ() | {"TERM": "xterm", "COLUMNS": "140", "LINES": "40"},
        stdout=subprocess.PIPE,
        stderr=terminal,
        start_new_session=True,
        text=True,
    )
    os.close(terminal)
    drawn = read_until_closed(controller, process)
    data, _ = process.communicate(timeout=10)
    staged = {"folder": "datasets/photos", "files": 2, "size": 3_000_000, "already": False}
    assert (process.returncode, json.loads(data)) == (0, staged)
    assert "copying 2 files" in drawn
    assert "3.0/3.0 MB" in drawn
    assert "0:00:00" in drawn


def test_a_closed_pipe_is_no_traceback(g4kit: Bench) -> None:
    with start(g4kit, "launch", "--help", plan=SLOW) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def read_until_closed(controller: int, process: subprocess.Popen[str]) -> str:
    """What the process wrote to the terminal."""
    drawn, deadline = b"", time.monotonic() + 30
    while time.monotonic() < deadline:
        ready, _, _ = select.select([controller], [], [], 0.2)
        if not ready:
            if process.poll() is not None:
                break
            continue
        try:
            piece = os.read(controller, 65536)
        except OSError:  # Linux: EIO once the other side is closed
            break
        drawn += piece
    os.close(controller)
    return drawn.decode(errors="replace")
