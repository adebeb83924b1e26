"""Cloud Run through its own client: nothing is started twice, whatever answer is lost; states are told apart."""

import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from contract.task import TASK
from contract.waiting import wait, wait_until
from fakes.faults import Fault, Kind
from fakes.google_cloud import QUICK, FakeGoogleCloud
from g4kit.cloud.base import ExecutionState, JobRequest, JobStartError, Task
from g4kit.cloud.google import GoogleCloud

RUN = "^POST .*:run"


@pytest.fixture
def google(tmp_path: Path) -> Iterator[FakeGoogleCloud]:
    made = FakeGoogleCloud(tmp_path / "google", command=TASK, grace_s=1.0)
    yield made
    made.close()


@pytest.fixture
def cloud(google: FakeGoogleCloud) -> GoogleCloud:
    return GoogleCloud(google.access())


def request(*args: str, launch_id: str = "0a1b", accelerator: str = "nvidia-l4", timeout_s: int = 60) -> JobRequest:
    return JobRequest("run-1", launch_id, args, timeout_s, 1, accelerator)


@pytest.mark.parametrize("first", [kind for kind in Kind if kind not in (Kind.STALE_GENERATION, Kind.WRONG_CHECKSUM)])
@pytest.mark.parametrize(
    "second", [None, *[pytest.param(kind, marks=pytest.mark.slow) for kind in (Kind.RETURN_503, Kind.ANSWER_LOST)]]
)
def test_a_start_that_meets_faults_is_one_execution(google: FakeGoogleCloud, first: Kind, second: Kind | None) -> None:
    cloud = GoogleCloud(google.access(dataclasses.replace(QUICK, timeout_s=0.5, settle_s=0.1)))
    google.server.faults.add(*(Fault(kind, RUN, seconds=0.6) for kind in (first, second) if kind))
    started = cloud.jobs.run(request("print:once"))
    assert google.run.names == [started.name]
    assert cloud.jobs.run(request("print:once")).name == started.name
    assert google.run.names == [started.name]


def test_many_callers_of_one_launch_get_one_execution(google: FakeGoogleCloud) -> None:
    names: list[str] = []
    barrier = threading.Barrier(6)

    def launch() -> None:
        cloud = GoogleCloud(google.access(dataclasses.replace(QUICK, settle_s=3.0)))
        barrier.wait()
        names.append(cloud.jobs.run(request("print:once")).name)

    threads = [threading.Thread(target=launch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 6
    assert set(names) == set(google.run.names)
    assert len(google.run.names) == 1


def test_a_claim_left_by_a_dead_caller_is_taken_over(google: FakeGoogleCloud, cloud: GoogleCloud) -> None:
    cloud.bucket.write("runs/run-1/launches/0a1b.claim", b"{}")
    with pytest.raises(JobStartError, match="g4kit resume run-1"):
        cloud.jobs.run(request("print:once"))
    assert google.run.names == []
    assert cloud.jobs.run(request("print:once")).name == google.run.names[0]


def test_waiting_for_a_gpu_is_pending_and_can_be_cancelled(google: FakeGoogleCloud, cloud: GoogleCloud) -> None:
    google.run.pending_s = 1.0
    started = cloud.jobs.run(request("sleep:60"))
    assert (started.state, started.started_at, started.tasks) == (ExecutionState.PENDING, None, ())
    assert "Waiting" in started.message
    running = wait_until(lambda: cloud.jobs.get(started.name), lambda one: one.state is ExecutionState.RUNNING)
    assert running.tasks == (Task(0, ExecutionState.RUNNING, 0, None),)
    second = cloud.jobs.run(request("sleep:60", launch_id="second"))
    cloud.jobs.cancel(second.name)
    assert cloud.jobs.get(second.name).state is ExecutionState.CANCELLED
    cloud.jobs.cancel(started.name)
    assert wait(cloud, started.name).state is ExecutionState.CANCELLED


def test_asking_whether_a_job_can_run_starts_nothing(google: FakeGoogleCloud, cloud: GoogleCloud) -> None:
    assert cloud.jobs.problems(request("print:x")) == []
    [no_gpu] = cloud.jobs.problems(request(accelerator="nvidia-h100"))
    assert 'got "nvidia-h100", and the deployment has jobs with: nvidia-l4, nvidia-rtx-pro-6000' in no_gpu
    google.run.denied.add("run.jobs.run")
    [denied] = cloud.jobs.problems(request("print:x"))
    assert "run.jobs.run is not allowed" in denied
    assert "--role=roles/run.developer" in denied
    del google.run.jobs["g4kit-rtx"]
    google.run.denied.clear()
    [gone] = cloud.jobs.problems(request(accelerator="nvidia-rtx-pro-6000"))
    assert "terraform apply" in gone
    assert google.run.names == []


def test_an_execution_carries_its_own_limit_and_no_other_job_is_touched(
    google: FakeGoogleCloud, cloud: GoogleCloud
) -> None:
    started = cloud.jobs.run(request("env:G4KIT_ATTEMPT_TIMEOUT_S", "env:G4KIT_ROOT", timeout_s=77))
    wait(cloud, started.name)
    own = [line.text for line in cloud.logs.read(started.name) if not line.text.startswith("g4kit:")]
    assert own == ["G4KIT_ATTEMPT_TIMEOUT_S=77", f"G4KIT_ROOT={google.mount}"]
    document = google.run.started(started.name)
    assert document is not None
    assert json.dumps(document.template).count("77") == 2  # the limit itself, and what tells the trainer of it
    assert started.name.startswith("g4kit-l4-")
