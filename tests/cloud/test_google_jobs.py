"""Cloud Run through its own client: nothing is started twice, whatever answer is lost; states are told apart."""

import dataclasses
import datetime
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from contract.task import TASK
from contract.waiting import wait, wait_until
from fakes.faults import Fault, Kind
from fakes.google_cloud import QUICK, FakeGoogleCloud
from g4kit.cloud import google_jobs
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
    google.run.image_s, google.run.pending_s = 0.5, 1.0
    started = cloud.jobs.run(request("sleep:60"))
    assert (started.state, started.started_at, started.tasks) == (ExecutionState.PENDING, None, ())
    assert started.message == "pulling the image"
    wait_until(lambda: cloud.jobs.get(started.name).message, lambda message: message == "waiting for a GPU")
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
    limits = re.findall(r'"(77s?)"', json.dumps(document.template))
    assert sorted(limits) == ["77", "77s"], "what tells the trainer of it, and the limit itself"
    assert started.name.startswith("g4kit-l4-")


def listings(google: FakeGoogleCloud) -> int:
    return sum(line.startswith("GET") and "/executions?" in line for line in google.server.requests)


def test_a_launch_that_nobody_began_before_lists_nothing(google: FakeGoogleCloud, cloud: GoogleCloud) -> None:
    cloud.jobs.run(request("print:once"))
    assert listings(google) == 0


def test_after_a_lost_answer_it_looks_ever_more_rarely_and_not_at_what_is_older(
    google: FakeGoogleCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(google_jobs, "PAGE", 2)
    for number in range(5):
        cloud = GoogleCloud(google.access())
        cloud.jobs.run(request("print:old", launch_id=f"old-{number}"))
    for started in list(google.run._started.values()):
        started.created_at -= datetime.timedelta(hours=10)
    patience = dataclasses.replace(QUICK, poll_s=0.1, settle_s=1.5, timeout_s=0.5)
    cloud = GoogleCloud(google.access(patience))
    google.server.faults.add(Fault(Kind.RESET, RUN))
    before = listings(google)
    started_at = time.monotonic()
    cloud.jobs.run(request("print:new", launch_id="new"))
    looks, seconds = listings(google) - before, time.monotonic() - started_at
    assert seconds > 1.5
    assert 4 <= looks <= 7, "at 0, 0.05, 0.15, 0.35, 0.75 and 1.5 s, a page each"
    assert len(google.run.names) == 6


def test_following_a_run_asks_for_what_goes_on_and_lists_rarely(google: FakeGoogleCloud) -> None:
    cloud = GoogleCloud(google.access(dataclasses.replace(QUICK, relist_s=60.0)))
    first = cloud.jobs.run(request("print:x"))
    wait(cloud, first.name)
    second = cloud.jobs.run(request("sleep:60", launch_id="second"))
    before = listings(google)
    for _ in range(20):
        assert [one.name for one in cloud.jobs.find("run-1")] == [first.name, second.name]
    assert listings(google) - before == len(google.deployment.job_names)
    other = GoogleCloud(google.access())
    other.jobs.cancel(second.name)
    wait(other, second.name)
    assert [one.active for one in cloud.jobs.find("run-1")] == [False, False]
    third = other.jobs.run(request("print:x", launch_id="third"))
    assert [one.name for one in cloud.jobs.find("run-1")][-1] == third.name, "nothing goes on: listed anew"
