"""What runs in the containers of a Vertex AI job: who a host is, its attempts, and torchrun's meeting across hosts."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousParameters,
    c10d_rendezvous_backend,
)
from torch.distributed.run import config_from_args, parse_args

from contract.task import TASK
from g4trainer import vertex
from g4trainer.vertex import ClusterError, Host

POOLS = {
    "workerpool0": ["cmle-training-workerpool0-ab-0:2222"],
    "workerpool1": ["cmle-training-workerpool1-ab-0:2222", "cmle-training-workerpool1-ab-1:2222"],
}
"""The example of Google's page on distributed training."""


def spec(pools: dict[str, list[str]], pool: str, index: int) -> dict[str, str]:
    document = {"cluster": pools, "environment": "cloud", "task": {"type": pool, "index": index, "trial": ""}}
    return {"CLUSTER_SPEC": json.dumps(document)}


def start(tmp_path: Path, attempts: int, *arguments: str, **env: str) -> "subprocess.Popen[str]":
    own = {
        "G4KIT_TRAINER": shlex.join(TASK),
        "G4KIT_ATTEMPTS_FILE": str(tmp_path / "launches" / "0a1b.attempts.json"),
        "G4KIT_ATTEMPT_TIMEOUT_S": "60",
        "G4KIT_GRACE_S": "1",
        "CLOUD_ML_JOB_ID": "7001",
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "g4trainer.vertex", "--attempts", str(attempts), *arguments],
        env={**os.environ, **own, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def noted(tmp_path: Path) -> list[dict[str, Any]]:
    return list(json.loads((tmp_path / "launches" / "0a1b.attempts.json").read_text())["attempts"])


def test_who_a_host_is() -> None:
    chief = "cmle-training-workerpool0-ab-0:2222"
    assert vertex.host_of({}) == vertex.host_of(spec({"workerpool0": [chief]}, "workerpool0", 0)) == Host()
    assert vertex.host_of(spec(POOLS, "workerpool0", 0)) == Host(3, 0, "cmle-training-workerpool0-ab-0", chief)
    assert vertex.host_of(spec(POOLS, "workerpool1", 1)) == Host(3, 2, "cmle-training-workerpool1-ab-1", chief)


@pytest.mark.parametrize(
    "stated",
    ["{", "[]", "{}", spec(POOLS, "workerpool1", 2)["CLUSTER_SPEC"], spec(POOLS, "workerpool2", 0)["CLUSTER_SPEC"]],
)
def test_a_cluster_that_is_another_is_refused(stated: str) -> None:
    with pytest.raises(ClusterError, match="CLUSTER_SPEC: got "):
        vertex.host_of({"CLUSTER_SPEC": stated})


def test_what_torchrun_is_told() -> None:
    assert vertex.torchrun_variables(Host(), "7001") == {}
    worker = vertex.host_of(spec(POOLS, "workerpool1", 0))
    assert vertex.torchrun_variables(worker, "7001") == {
        "PET_NNODES": "3",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": "cmle-training-workerpool0-ab-0:2222",
        "PET_RDZV_ID": "7001",
        "PET_RDZV_CONF": "is_host=0,join_timeout=1800,read_timeout=1800",
        "PET_LOCAL_ADDR": "cmle-training-workerpool1-ab-0",
    }


def test_torch_waits_for_a_chief_that_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun itself reads the variables; the wait is recorded in place of half an hour of it."""
    asked: list[dict[str, Any]] = []

    def store(*where: Any, **how: Any) -> Any:
        asked.append(how)
        raise TimeoutError("no chief")

    monkeypatch.setattr(c10d_rendezvous_backend, "TCPStore", store)
    for name, value in vertex.torchrun_variables(vertex.host_of(spec(POOLS, "workerpool1", 0)), "7001").items():
        monkeypatch.setenv(name, value)
    config, _, _ = config_from_args(parse_args(["--nproc-per-node", "1", "script.py"]))
    rendezvous = RendezvousParameters("c10d", config.rdzv_endpoint, config.run_id, 3, 3, **config.rdzv_configs)
    with pytest.raises(RendezvousConnectionError):
        c10d_rendezvous_backend.create_backend(rendezvous)
    assert [(how["timeout"].total_seconds(), how["is_master"]) for how in asked] == [(1800, False)]


def test_a_worker_waits_on_the_chiefs_time(tmp_path: Path) -> None:
    """What it waits for a chief that comes late is not taken from the attempt that they then make together."""
    limit = ("env:G4KIT_ATTEMPT_TIMEOUT_S",)
    for pool, told in (("workerpool0", "60"), ("workerpool1", "1860.0")):
        said, _ = start(tmp_path, 1, *limit, **spec(POOLS, pool, 0)).communicate(timeout=20)
        assert f"G4KIT_ATTEMPT_TIMEOUT_S={told}\n" in said


def test_vertex_ai_is_not_told_of_crashes() -> None:
    codes = {code: vertex.code_for_vertex(code) for code in (0, 1, 3, 6, 11, 75, 127, 134, 137, 139)}
    assert codes == {0: 0, 1: 1, 3: 3, 6: 1, 11: 1, 75: 75, 127: 127, 134: 1, 137: 1, 139: 1}


def test_sigterm_lets_the_attempt_stop_itself_and_no_other_follows(tmp_path: Path) -> None:
    process = start(tmp_path, 5, "on-term:75", "print:up", "sleep:60")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=20)
    assert (process.returncode, said) == (75, "stopping\ng4kit: attempt 1 ended with exit code 75: cancelled\n")
    [attempt] = noted(tmp_path)
    assert (attempt["exit_code"], attempt["ended_by"]) == (75, "cancelled")


def test_a_container_that_was_started_again_goes_on_counting(tmp_path: Path) -> None:
    for _ in range(2):
        start(tmp_path, 3, "exit:1").communicate(timeout=20)
    assert len(noted(tmp_path)) == 3
    lost = start(tmp_path, 4, "print:up", "sleep:5")
    assert lost.stdout is not None
    assert lost.stdout.readline() == "up\n"
    lost.kill()
    lost.communicate(timeout=20)
    again = start(tmp_path, 4, "print:up")
    said, _ = again.communicate(timeout=20)
    assert (again.returncode, said) == (1, "")
    assert [attempt["exit_code"] for attempt in noted(tmp_path)] == [1, 1, 1, None]


def test_a_file_that_was_taken_away_is_not_written_again(tmp_path: Path) -> None:
    process = start(tmp_path, 1, "print:up", "sleep:0.5")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    (tmp_path / "launches" / "0a1b.attempts.json").unlink()
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert list((tmp_path / "launches").iterdir()) == []


def test_a_file_that_cannot_be_written_ends_no_attempt(tmp_path: Path) -> None:
    (tmp_path / "launches").touch()
    process = start(tmp_path, 1, "print:done")
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "done\n" in said
    assert "cannot be written" in said


def test_two_hosts_meet_and_meet_again_in_the_next_attempt(tmp_path: Path) -> None:
    """Real torchrun on two addresses of this machine; the chief's process is rank 0, in every attempt."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\n"
        "print(*(os.environ[name] for name in ('CLOUD_RUN_TASK_ATTEMPT', 'RANK', 'WORLD_SIZE', 'GROUP_RANK')))\n"
        "sys.exit(int(os.environ['CLOUD_RUN_TASK_ATTEMPT'] == '0'))\n"
    )
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--max-restarts", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pools = {"workerpool0": [f"127.0.0.1:{port}"], "workerpool1": [f"127.0.0.2:{port}"]}
    command = {"G4KIT_TRAINER": shlex.join(torchrun), "PET_MONITOR_INTERVAL": "0.1"}
    worker = start(tmp_path, 3, str(script), **command, **spec(pools, "workerpool1", 0))
    chief = start(tmp_path, 3, str(script), **command, **spec(pools, "workerpool0", 0))
    begun = time.monotonic()
    said, _ = chief.communicate(timeout=60)
    of_worker, _ = worker.communicate(timeout=60)
    assert (chief.returncode, worker.returncode) == (0, 0), said + of_worker
    assert time.monotonic() - begun < 60
    ranks = [line for line in said.splitlines() if line[:1].isdigit() and len(line) == 7]
    assert ranks == ["0 0 2 0", "1 0 2 0"]
    assert [line for line in of_worker.splitlines() if line[:1].isdigit() and len(line) == 7][-1].endswith("1 2 1")
    assert [attempt["exit_code"] for attempt in noted(tmp_path)] == [1, 0]
