"""Custom jobs of Vertex AI: what is asked for, states, retries, lost answers, lost machines; against the live fake."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.cloud import aiplatform_v1

from contract.task import TASK
from contract.waiting import wait, wait_until
from fakes.faults import Fault, Kind
from fakes.google_cloud import QUICK, FakeGoogleCloud
from g4kit.cloud import vertex as vertex_module
from g4kit.cloud.base import ExecutionState, JobRequest, Task
from g4kit.cloud.vertex import VertexCloud
from g4kit.errors import UserError

GOLDEN = Path(__file__).with_name("golden")
CREATE = "^POST .*/customJobs$"
H100 = JobRequest("run-1", "0a1b", ("print:once",), 60, 1, "nvidia-h100-80gb")


@pytest.fixture
def google(tmp_path: Path) -> Iterator[FakeGoogleCloud]:
    made = FakeGoogleCloud(tmp_path / "google", command=TASK, grace_s=1.0)
    yield made
    made.close()


@pytest.fixture
def cloud(google: FakeGoogleCloud) -> VertexCloud:
    return VertexCloud(google.access())


def read(text: str) -> Any:
    """A CustomJob in JSON: names and numbers of enumerations are the same."""
    return aiplatform_v1.CustomJob.from_json(text)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vertex-1x8", {"accelerator": "nvidia-h100-80gb", "gpus": 8, "provisioning": "spot"}),
        (
            "vertex-2x8",
            {
                "accelerator": "nvidia-h200-141gb",
                "gpus": 16,
                "hosts": 2,
                "provisioning": "flex-start",
                "max_wait_s": 7200,
                "max_attempts": 10,
                "timeout_s": 86400,
            },
        ),
    ],
)
def test_the_submitted_spec_is_the_golden_one(
    google: FakeGoogleCloud, cloud: VertexCloud, name: str, changes: dict[str, Any]
) -> None:
    usual: dict[str, Any] = {"timeout_s": 3600, "max_attempts": 4}
    request = dataclasses.replace(H100, args=("run", cloud.bucket.job_path("runs/run-1")), **usual | changes)
    assert cloud.jobs.problems(request) == []
    cloud.jobs.cancel(cloud.jobs.run(request).name)
    [job] = google.vertex.jobs.values()
    submitted = json.dumps(job.asked).replace(str(google.mount), "/gcs/g4kit-test")  # where Vertex AI mounts it
    assert read(submitted) == read((GOLDEN / f"{name}.json").read_text())


def test_several_hosts_meet_at_the_chief(google: FakeGoogleCloud, cloud: VertexCloud) -> None:
    names = ("PET_NNODES", "PET_RDZV_ENDPOINT", "PET_RDZV_CONF", "PET_LOCAL_ADDR", "PET_RDZV_BACKEND", "PET_RDZV_ID")
    args = (*(f"env:{name}" for name in names), "sleep:1")
    started = cloud.jobs.run(dataclasses.replace(H100, args=args, gpus=24, hosts=3))
    ended = wait(cloud, started.name)
    assert (ended.state, ended.tasks) == (ExecutionState.SUCCEEDED, (Task(0, ExecutionState.SUCCEEDED, 0, 0),))
    said: dict[int, dict[str, str]] = {0: {}, 1: {}, 2: {}}
    for line in cloud.logs.read(started.name):
        if line.text.startswith("PET_"):
            name, _, value = line.text.partition("=")
            said[line.task][name] = value
    assert {
        tuple(host.pop(name) for name in ("PET_NNODES", "PET_RDZV_BACKEND", "PET_RDZV_ID")) for host in said.values()
    } == {("3", "c10d", started.name)}
    assert len({host.pop("PET_RDZV_ENDPOINT") for host in said.values()}) == 1
    assert said == {
        host: {
            "PET_LOCAL_ADDR": f"127.0.0.{host + 1}",
            "PET_RDZV_CONF": f"is_host={int(host == 0)},join_timeout=1800,read_timeout=1800",
        }
        for host in said
    }


def test_a_worker_that_fails_is_tried_again_for_as_long_as_the_chief_goes_on(
    google: FakeGoogleCloud, cloud: VertexCloud
) -> None:
    started = cloud.jobs.run(dataclasses.replace(H100, args=("sleep:0.3", "exit:1"), gpus=16, hosts=2, max_attempts=2))
    ended = wait(cloud, started.name)
    assert (ended.state, ended.exit_code, ended.attempt) == (ExecutionState.FAILED, 1, 1)
    assert ended.message == "ended with exit code 1 in attempt 2"


@pytest.mark.parametrize("kind", [Kind.RETURN_503, Kind.RESET, Kind.ANSWER_LOST, Kind.BROKEN_STREAM, Kind.STALL])
def test_a_start_that_meets_faults_is_one_job(google: FakeGoogleCloud, kind: Kind) -> None:
    cloud = VertexCloud(google.access(dataclasses.replace(QUICK, timeout_s=0.5, settle_s=0.1)))
    google.server.faults.add(Fault(kind, CREATE, seconds=0.6))
    started = cloud.jobs.run(H100)
    assert list(google.vertex.jobs) == [started.name]
    assert cloud.jobs.run(H100).name == started.name
    assert list(google.vertex.jobs) == [started.name]


@pytest.mark.parametrize("kind", [Kind.RETURN_503, Kind.ANSWER_LOST])
def test_several_tasks_that_meet_faults_are_as_many_jobs(google: FakeGoogleCloud, kind: Kind) -> None:
    cloud = VertexCloud(google.access(dataclasses.replace(QUICK, timeout_s=0.5, settle_s=0.1)))
    google.server.faults.add(Fault(kind, CREATE))
    request = dataclasses.replace(H100, args=("env:CLOUD_RUN_TASK_INDEX",), task_count=3)
    started = cloud.jobs.run(request)
    assert started.name == "tasks-0a1b"
    assert cloud.jobs.run(request).name == started.name
    ended = wait(cloud, started.name)
    assert [task.exit_code for task in ended.tasks] == [0, 0, 0]
    assert len(google.vertex.jobs) == 3
    names = {job.asked["displayName"] for job in google.vertex.jobs.values()}
    assert names == {"g4kit-run-1-0", "g4kit-run-1-1", "g4kit-run-1-2"}
    said = [line.text for line in cloud.logs.read(started.name) if line.text.startswith("CLOUD")]
    assert sorted(said) == [f"CLOUD_RUN_TASK_INDEX={index}" for index in range(3)]


def test_tasks_that_could_not_be_started_are_started_by_the_same_launch(
    google: FakeGoogleCloud,
) -> None:
    cloud = VertexCloud(google.access(dataclasses.replace(QUICK, settle_s=0.1)))
    google.vertex.exhausted, google.vertex.room = "custom_model_training_nvidia_h100_gpus", 2
    request = dataclasses.replace(H100, args=("sleep:0.5",), task_count=3)
    with pytest.raises(UserError, match="2 of 3 tasks were started and go on; the same command starts the others"):
        cloud.jobs.run(request)
    [partly] = cloud.jobs.find("run-1")
    assert len(partly.tasks) == 2
    ended = wait(cloud, partly.name)
    assert (ended.state, ended.message) == (ExecutionState.FAILED, "2 of 3 tasks were started")
    google.vertex.exhausted = ""
    again = wait(cloud, cloud.jobs.run(request).name)
    assert (again.name, [task.state for task in again.tasks]) == (partly.name, [ExecutionState.SUCCEEDED] * 3)
    assert len(google.vertex.jobs) == 3


def test_ids_that_no_label_can_hold(google: FakeGoogleCloud, cloud: VertexCloud) -> None:
    """What is done for a run is named below it, and an id may be as long as a label."""
    ids = [f"run-1/requests/{end}" for end in ("0a1b", "0a1c")] + [f"{'r' * 63}_evaluation", "r" * 63]
    for number, run_id in enumerate(ids):
        request = dataclasses.replace(H100, run_id=run_id, launch_id=f"0a1{number}", folder="staging/x")
        assert cloud.jobs.problems(request) == []
        ended = wait(cloud, cloud.jobs.run(request).name)
        assert (ended.run_id, ended.launch_id, ended.state) == (run_id, f"0a1{number}", ExecutionState.SUCCEEDED)
        assert [one.name for one in cloud.jobs.find(run_id)] == [ended.name]
    assert [one.run_id for one in cloud.jobs.find()] == ids


def test_waiting_for_machines_is_pending_and_can_be_cancelled(google: FakeGoogleCloud, cloud: VertexCloud) -> None:
    google.vertex.pending_s = 30.0
    started = cloud.jobs.run(H100)
    waiting = wait_until(lambda: cloud.jobs.get(started.name), lambda one: "machines" in one.message)
    assert (waiting.state, waiting.started_at, waiting.tasks) == (ExecutionState.PENDING, None, ())
    cloud.jobs.cancel(started.name)
    ended = wait(cloud, started.name)
    assert (ended.state, ended.exit_code) == (ExecutionState.CANCELLED, None)


def test_lost_machines_are_another_attempt_of_the_same_job(google: FakeGoogleCloud, cloud: VertexCloud) -> None:
    request = dataclasses.replace(H100, args=("env:CLOUD_RUN_TASK_ATTEMPT", "exit-at:1=0", "sleep:60"), max_attempts=3)
    started = cloud.jobs.run(request)
    wait_until(lambda: list(cloud.logs.read(started.name)), bool)
    google.vertex.lose_machines(started.name)
    ended = wait(cloud, started.name)
    assert ended.tasks == (Task(0, ExecutionState.SUCCEEDED, 1, 0),)
    assert [one["exit_code"] for one in cloud.jobs.attempts(started.name)] == [None, 0]
    lines = [(line.text, line.attempt) for line in cloud.logs.read(started.name) if line.text.startswith("CLOUD_RUN")]
    assert lines == [("CLOUD_RUN_TASK_ATTEMPT=0", 0), ("CLOUD_RUN_TASK_ATTEMPT=1", 1)]


def test_a_crash_is_an_attempt_like_any_other(google: FakeGoogleCloud, cloud: VertexCloud) -> None:
    """Vertex AI would start the whole job again for the exit code of a crash: it is not told."""
    started = cloud.jobs.run(dataclasses.replace(H100, args=("kill:11",), max_attempts=2))
    ended = wait(cloud, started.name)
    assert (ended.exit_code, ended.attempt) == (139, 1)
    assert google.vertex.jobs[started.name].starts == 1
    assert "non-zero status of 1." in google.vertex.jobs[started.name].error


def test_in_a_list_of_all_runs_the_exit_code_is_what_vertex_ai_says(cloud: VertexCloud) -> None:
    wait(cloud, cloud.jobs.run(dataclasses.replace(H100, args=("exit:75",))).name)
    [listed] = cloud.jobs.find()
    assert (listed.state, listed.exit_code) == (ExecutionState.FAILED, 75)


def test_everything_is_asked_before_anything_is_started(google: FakeGoogleCloud, cloud: VertexCloud) -> None:
    assert cloud.jobs.problems(H100) == []
    [no_gpu] = cloud.jobs.problems(dataclasses.replace(H100, accelerator="nvidia-l4"))
    assert 'job.accelerator: got "nvidia-l4" for target vertex; write one of nvidia-a100-40gb, ' in no_gpu
    [no_machine] = cloud.jobs.problems(dataclasses.replace(H100, accelerator="nvidia-h200-141gb", gpus=4))
    assert "job.gpus: got 4 on 1 host, and the machines of nvidia-h200-141gb are a3-ultragpu-8g; write" in no_machine
    assert cloud.jobs.problems(dataclasses.replace(H100, task_count=2)) == []
    google.vertex.denied |= {"aiplatform.customJobs.create", "iam.serviceAccounts.actAs"}
    create, act_as = cloud.jobs.problems(H100)
    assert "aiplatform.customJobs.create not allowed; write: gcloud projects add-iam-policy-binding" in create
    assert "--role=roles/aiplatform.user" in create
    assert "actAs not allowed; write: gcloud iam service-accounts add-iam-policy-binding g4kit-runtime@" in act_as
    google.vertex.denied.clear()
    google.run.jobs["g4kit-tools"].image = "us-docker.pkg.dev/cloudrun/container/job:latest"
    [no_image] = cloud.jobs.problems(H100)
    assert "build_command" in no_image
    assert google.vertex.jobs == {}


def test_an_exceeded_quota_is_named(google: FakeGoogleCloud) -> None:
    cloud = VertexCloud(google.access(dataclasses.replace(QUICK, settle_s=0.1)))
    google.vertex.exhausted = "aiplatform.googleapis.com/custom_model_training_nvidia_h100_gpus"
    with pytest.raises(UserError, match=r"quota is used up .*custom_model_training_nvidia_h100_gpus"):
        cloud.jobs.run(H100)


def test_a_deployment_without_vertex_ai_says_how_to_enable_it(google: FakeGoogleCloud) -> None:
    google.deployment = google.deployment.model_copy(update={"vertex": None})
    cloud = VertexCloud(google.access())
    assert "write enable_vertex = true in terraform.tfvars" in cloud.jobs.problems(H100)[0]


def test_without_its_client_the_target_says_what_to_install(
    cloud: VertexCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vertex_module, "CLIENT", "google.cloud.no_such_client")
    with pytest.raises(UserError, match=r"pip install 'g4kit\[vertex\]'"):
        _ = cloud.jobs
