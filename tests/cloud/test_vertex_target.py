"""The verbs with --target vertex, as a user meets them, against the fakes and a stand-in trainer."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from google.cloud.aiplatform_v1.types import Scheduling

import made_up_model
from cli.bench import RECIPE, STANDIN
from contract.waiting import wait_until
from fakes.google_cloud import QUICK, FakeGoogleCloud
from g4kit import exporting, following, predicting
from g4kit.cloud import google_client
from g4kit.main import cli

Call = Callable[..., Result]
EIGHT_GPUS = RECIPE.replace("nvidia-l4", "nvidia-h100-80gb") + "gpus = 8\n"


@pytest.fixture
def google(tmp_path: Path) -> Iterator[FakeGoogleCloud]:
    made = FakeGoogleCloud(tmp_path / "google", command=STANDIN, grace_s=1.0)
    yield made
    made.close()


@pytest.fixture
def call(google: FakeGoogleCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs a command; processes of the fake inherit its environment. The base model and the data are staged."""
    (tmp_path / "deployment.json").write_text(json.dumps({"deployment": {"value": google.deployment.model_dump()}}))
    (tmp_path / "tiny.toml").write_text(EIGHT_GPUS)
    environ = {
        "G4KIT_TARGET": "vertex",
        "G4KIT_DEPLOYMENT": str(tmp_path / "deployment.json"),
        "G4KIT_EMULATOR_HOST": google.server.url,
        "G4KIT_TRAINER": " ".join(STANDIN),
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(google_client, "Patience", lambda: QUICK)
    monkeypatch.setattr(following, "INTERVAL_S", 0.1)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, plan: Any = None) -> Result:
        if plan is not None:
            monkeypatch.setenv("STANDIN_PLAN", json.dumps(plan))
        result = CliRunner().invoke(cli, arguments)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    source = made_up_model.write(tmp_path / "tiny-gemma4")
    for kind, what in (("model", str(source)), ("data", "builtin:digits")):
        told = call("stage", kind, what)
        assert told.exit_code == 0, told.stderr
    return call


def test_from_launching_to_fetching(call: Call, google: FakeGoogleCloud, tmp_path: Path) -> None:
    launched = call("launch", "tiny.toml", "--wait", "--yes", plan=[{"steps": 4, "exit": 75}, {"steps": 6, "exit": 0}])
    assert launched.exit_code == 0, launched.stderr
    run_id = launched.stdout.strip()
    [job] = google.vertex.jobs.values()
    assert job.id in launched.stderr
    [pool] = job.asked["jobSpec"]["workerPoolSpecs"]
    assert pool["machineSpec"]["machineType"] == "a3-highgpu-8g"
    view = json.loads(call("runs", run_id, "--json").stdout)
    assert (view["state"], view["target"], view["execution"]) == ("succeeded", "vertex", job.id)
    assert any(line.startswith("step ") for line in call("logs", run_id).stdout.splitlines())
    fetched = call("fetch", run_id)
    assert fetched.exit_code == 0, fetched.stderr
    assert (tmp_path / run_id / "adapter" / "adapter_model.safetensors").stat().st_size > 0


def test_an_execution_that_used_up_its_attempts_is_followed_by_another(call: Call, google: FakeGoogleCloud) -> None:
    plan = [{"steps": 2, "exit": 75}, {"steps": 2, "exit": 75}, {"steps": 6, "exit": 0}]
    launched = call("launch", "tiny.toml", "--wait", "--yes", plan=plan)
    assert launched.exit_code == 0, launched.stderr
    first, second = google.vertex.jobs.values()
    assert (first.state, second.state) == ("JOB_STATE_FAILED", "JOB_STATE_SUCCEEDED")
    assert "interrupted at step 4, and it made progress: starting it again" in launched.stderr


def test_cancel_and_resume(call: Call, google: FakeGoogleCloud) -> None:
    plan = [{"steps": 4, "exit": 0, "sleep_s": 60}, {"steps": 6, "exit": 0}]
    run_id = call("launch", "tiny.toml", "--yes", plan=plan).stdout.strip()
    wait_until(lambda: list(google.mount.glob(f"runs/{run_id}/claims/*.json")), bool)
    cancelled = call("cancel", run_id)
    assert (cancelled.exit_code, cancelled.stdout.strip()) == (0, run_id)
    resumed = call("resume", run_id, "--wait")
    assert resumed.exit_code == 0, resumed.stderr
    assert [job.state for job in google.vertex.jobs.values()] == ["JOB_STATE_CANCELLED", "JOB_STATE_SUCCEEDED"]


def test_money_is_asked_for_first(call: Call, google: FakeGoogleCloud) -> None:
    asked = call("launch", "tiny.toml")
    assert asked.exit_code == 1
    assert "start it?" in asked.stderr
    assert google.vertex.jobs == {}


def test_what_cannot_run_is_refused_in_one_go(call: Call, google: FakeGoogleCloud) -> None:
    google.vertex.off = True
    google.vertex.denied.add("aiplatform.customJobs.create")
    wrong = ("--set", "job.accelerator=nvidia-h200-141gb", "--set", "job.gpus=4")
    refused = call("launch", "tiny.toml", *wrong, "--yes")
    assert refused.exit_code == 2
    assert "the machines of nvidia-h200-141gb are a3-ultragpu-8g" in refused.stderr
    assert "aiplatform.customJobs.create not allowed" in refused.stderr
    assert google.vertex.jobs == {}


def findings(result: Result) -> dict[str, dict[str, Any]]:
    return {one["check"]: one for one in json.loads(result.stdout)}


def test_doctor_says_what_is_right_and_what_mends_the_rest(call: Call, google: FakeGoogleCloud) -> None:
    sound = call("doctor", "--json")
    assert sound.exit_code == 0, sound.stdout
    found = findings(sound)
    assert {"deployment", "bucket region", "bucket access", "image", "Vertex AI", "permissions", "quota"} <= set(found)
    assert "custom_model_training_nvidia_h100_gpus" in found["quota"]["found"]
    google.vertex.off = True
    google.vertex.denied.add("iam.serviceAccounts.actAs")
    google.run.jobs["g4kit-tools"].image = "us-docker.pkg.dev/cloudrun/container/job:latest"
    broken = call("doctor", "--json")
    assert broken.exit_code == 1
    mends = {check: one["mend"] for check, one in findings(broken).items() if not one["ok"]}
    assert mends["Vertex AI"] == "gcloud services enable aiplatform.googleapis.com --project=test-project"
    assert mends["permissions"].startswith("gcloud iam service-accounts add-iam-policy-binding g4kit-runtime@")
    assert "build_command" in mends["image"]


def test_from_another_target_a_run_is_told_where_it_goes_on(call: Call, google: FakeGoogleCloud) -> None:
    """The bucket is the same, and Cloud Run the default: there it must neither look lost nor be started again."""
    plan = [{"steps": 4, "exit": 0, "sleep_s": 60}]
    run_id = call("launch", "tiny.toml", "--yes", plan=plan).stdout.strip()
    wait_until(lambda: json.loads(call("runs", run_id, "--json").stdout)["step"], lambda step: step == 4)
    there = ("--target", "cloudrun")
    view = json.loads(call("runs", run_id, "--json", *there).stdout)
    assert (view["state"], view["live"], view["step"]) == ("running", False, 4)
    hint = f"of target vertex; write: g4kit runs {run_id} --target vertex"
    assert view["message"] == hint
    assert hint in call("runs", *there).stdout
    for verb in ("cancel", "resume", "logs"):
        told = call(verb, run_id, *there)
        assert told.exit_code == 2
        assert f"{run_id}: goes on at target vertex, this is cloudrun; write --target vertex." in told.stderr
    assert call("cancel", run_id).exit_code == 0


PRICES = """\
[vertex.europe-west4]
as_of = "2026-11"
source = "a test"
machine_hour = { a3-highgpu-1g = 12.0, a3-highgpu-8g = 96.0, a3-ultragpu-8g = 88.0 }
"""


@pytest.fixture
def run_id(call: Call, google: FakeGoogleCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Finished on eight GPUs."""
    (tmp_path / "prices.toml").write_text(PRICES)
    (tmp_path / "one.png").write_bytes(b"x")
    monkeypatch.setenv("G4KIT_PRICE_TABLE", str(tmp_path / "prices.toml"))
    monkeypatch.setattr(predicting, "POLL_S", 0.1)
    monkeypatch.setattr(exporting, "POLL_S", 0.1)
    launched = call("launch", "tiny.toml", "--wait", "--yes")
    assert launched.exit_code == 0, launched.stderr
    return launched.stdout.strip()


def machines(google: FakeGoogleCloud) -> list[str]:
    """Of each job, in order."""
    pools = [job.asked["jobSpec"]["workerPoolSpecs"] for job in google.vertex.jobs.values()]
    return [f"{pool['machineSpec']['machineType']} x {pool['replicaCount']}" for [pool] in pools]


def test_images_are_answered_on_one_gpu(call: Call, google: FakeGoogleCloud, run_id: str) -> None:
    told = call("predict", run_id, "one.png", "--yes", "--json")
    assert told.exit_code == 0, told.stderr
    [answer] = json.loads(told.stdout)["answers"]
    assert answer["after"]["prediction"] == "1 bytes"
    assert "one execution on nvidia-h100-80gb: 12.00 USD an hour" in told.stderr
    assert machines(google) == ["a3-highgpu-8g x 1", "a3-highgpu-1g x 1"]
    wait_until(lambda: {job.state for job in google.vertex.jobs.values()}, lambda one: one == {"JOB_STATE_SUCCEEDED"})
    left = [path for path in google.mount.glob("runs/*/requests/**/*") if path.is_file()]
    assert left == [], "nothing of the request"
    assert json.loads(call("runs", run_id, "--json").stdout)["execution"] == next(iter(google.vertex.jobs))


def test_another_card_may_be_taken(call: Call, google: FakeGoogleCloud, run_id: str) -> None:
    told = call("predict", run_id, "one.png", "--yes", "--accelerator", "nvidia-h200-141gb")
    assert told.exit_code == 0, told.stderr
    assert "88.00 USD an hour, billed for 60 s at least; its smallest machine has 8 GPUs, of which one" in told.stderr
    assert machines(google)[1] == "a3-ultragpu-8g x 1"
    unknown = call("predict", run_id, "one.png", "--yes", "--accelerator", "h200")
    assert (unknown.exit_code, '--accelerator: got "h200" for target vertex; write one of ' in unknown.stderr) == (
        2,
        True,
    )
    elsewhere = call("export", run_id, "--yes", "--accelerator", "nvidia-l4")
    assert (elsewhere.exit_code, 'got "nvidia-l4" for target vertex' in elsewhere.stderr) == (2, True)
    assert call("predict", run_id, "one.png", "--yes", "--provisioning", "spot").exit_code == 0
    asked = [job.asked["jobSpec"]["scheduling"]["strategy"] for job in google.vertex.jobs.values()]
    assert [Scheduling.Strategy(one).name for one in asked] == ["STANDARD", "STANDARD", "SPOT"]
    other = call("predict", run_id, "one.png", "--provisioning", "spot", "--target", "cloudrun")
    assert (other.exit_code, "--provisioning: got spot for target cloudrun" in other.stderr) == (2, True)


def test_cloud_run_evaluates_what_vertex_ai_trained(call: Call, google: FakeGoogleCloud, run_id: str) -> None:
    there = ("--target", "cloudrun", "--accelerator", "nvidia-l4", "--yes")
    told = call("evaluate", run_id, "--shards", "2", "--wait", *there)
    assert told.exit_code == 0, told.stderr
    assert [name.rpartition("-")[0] for name in google.run.names] == ["g4kit-l4"]
    assert "share 1 of 2" in call("logs", run_id, "--target", "cloudrun").stdout
    assert call("predict", run_id, "one.png", *there).exit_code == 0


def test_a_merged_model_comes_back(call: Call, google: FakeGoogleCloud, run_id: str, tmp_path: Path) -> None:
    told = call("export", run_id, "--out", "merged", "--yes")
    assert told.exit_code == 0, told.stderr
    assert json.loads((tmp_path / "merged" / "EXPORTED.json").read_text())["run_id"] == run_id
    assert machines(google)[1] == "a3-highgpu-1g x 1"


def test_an_evaluation_is_a_job_of_one_gpu_for_each_share(call: Call, google: FakeGoogleCloud, run_id: str) -> None:
    arguments = ("evaluate", run_id, "--shards", "3", "--test-size", "40", "--wait", "--yes", "--json")
    failed = call(*arguments, plan={"1": {"exit": 1}})
    assert failed.exit_code == 1
    assert "task 1 ended with exit code 1" in failed.stderr
    result = call(*arguments, plan={})
    assert result.exit_code == 0, result.stderr
    assert (json.loads(result.stdout)["shards"], json.loads(result.stdout)["count"]) == (3, 40)
    assert machines(google)[1:] == ["a3-highgpu-1g x 1"] * 4, "three, and the one that failed"
    said = call("logs", run_id).stdout.splitlines()
    assert sorted({line for line in said if line.startswith("share")}) == [f"share {index} of 3" for index in range(3)]
    dry = call("evaluate", run_id, "--shards", "2", "--dry-run", "--accelerator", "nvidia-h200-141gb", "--json")
    assert json.loads(dry.stdout)["worst_usd"] == pytest.approx(2 * 2 * 70 * 88 / 3600)
    assert "8 GPUs, of which one works" in dry.stderr


def test_a_sweep_is_a_job_for_each_point(call: Call, google: FakeGoogleCloud) -> None:
    grid = ("--grid", "lora.r=4,8", "--grid", "training.learning_rate=1e-4,1e-3")
    fine = [{"steps": 10, "exit": 0}]
    plan: Any = {"2": [{"steps": 2, "exit": 75}], "*": fine}
    swept = call("sweep", "tiny.toml", *grid, "--id", "s1", "--yes", "--json", plan=plan)
    assert swept.exit_code == 0, swept.stderr
    assert "4 points, all at the same time as far as the quota allows" in swept.stderr
    wait_until(lambda: json.loads(call("runs", "s1", "--json").stdout)["live"], lambda live: not live)
    view = json.loads(call("runs", "s1", "--json").stdout)
    assert [point["run"]["state"] for point in view["points"]] == ["succeeded"] * 2 + ["interrupted", "succeeded"]
    resumed = call("resume", "s1", "--wait", "--json", plan={"*": fine})
    assert resumed.exit_code == 0, resumed.stderr
    view = json.loads(call("runs", "s1", "--json").stdout)
    assert [point["run"]["state"] for point in view["points"]] == ["succeeded"] * 4
    assert machines(google) == ["a3-highgpu-8g x 1"] * 5
    assert "step 12 of s1-02" in call("logs", "s1", "--task", "2").stdout
