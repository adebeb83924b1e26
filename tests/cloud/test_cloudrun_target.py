"""Every verb with --target cloudrun, as a user meets it, against the fakes and a stand-in trainer."""

import json
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from contract.waiting import wait_until
from fakes.google_cloud import FakeGoogleCloud
from g4kit.cloud.base import Execution, JobRequest
from g4kit.cloud.google_jobs import GoogleJobs
from g4kit.targets import open_cloud

Call = Callable[..., Result]
GRID = ("--grid", "lora.r=4,16", "--grid", "training.learning_rate=1e-3,2e-3")
FINE = {"steps": 10, "exit": 0}


@pytest.fixture
def google(standins: FakeGoogleCloud) -> FakeGoogleCloud:
    return standins


def test_a_deployment_makes_cloud_run_the_default(
    environ: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert open_cloud(None, environ).target == "cloudrun"
    assert open_cloud("local", environ | {"G4KIT_ROOT": str(tmp_path)}).target == "local"
    assert capsys.readouterr().err.splitlines()[0] == "target: cloudrun (gs://g4kit-test)"


def test_from_staging_to_fetching(staged: Call, google: FakeGoogleCloud, tmp_path: Path) -> None:
    again = staged("stage", "data", "builtin:digits", "--json")
    assert json.loads(again.stdout)["already"] is True
    launched = staged(
        "launch", "tiny.toml", "--wait", "--yes", plan=[{"steps": 4, "exit": 75}, {"steps": 6, "exit": 0}]
    )
    assert launched.exit_code == 0, launched.stderr
    run_id = launched.stdout.strip()
    [execution] = google.run.names
    assert execution in launched.stderr
    frozen = json.loads((google.mount / "runs" / run_id / "recipe.json").read_text())
    assert frozen["image_digest"] == google.run.jobs["g4kit-l4"].image
    view = json.loads(staged("runs", run_id, "--json").stdout)
    assert (view["state"], view["target"], view["execution"]) == ("succeeded", "cloudrun", execution)
    log = staged("logs", run_id).stdout.splitlines()
    assert [line for line in log if line.startswith("step ")] == [f"step {step} of {run_id}" for step in range(1, 11)]
    assert "g4kit: attempt 1 ended with exit code 75" in log
    fetched = staged("fetch", run_id)
    assert fetched.exit_code == 0, fetched.stderr
    there = google.mount / "runs" / run_id / "adapter" / "adapter_model.safetensors"
    assert (tmp_path / run_id / "adapter" / "adapter_model.safetensors").read_bytes() == there.read_bytes()


def test_the_same_id_is_the_same_execution(staged: Call, google: FakeGoogleCloud) -> None:
    for _ in range(2):
        assert staged("launch", "tiny.toml", "--id", "mine-1", "--yes").exit_code == 0
    assert len(google.run.names) == 1


@pytest.mark.parametrize("begun", [False, True], ids=["before it began", "after"])
def test_ctrl_c_while_it_begins_says_how_to_see_and_to_go_on(
    staged: Call, google: FakeGoogleCloud, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    really = GoogleJobs.run

    def interrupted(self: GoogleJobs, request: JobRequest) -> Execution:
        if begun:
            really(self, request)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(GoogleJobs, "run", interrupted)
        left = staged("launch", "tiny.toml", "--id", "mine", "--yes")
    assert left.exit_code == 130
    assert "left; mine may have begun. To see: g4kit runs mine; to end it: g4kit cancel mine;" in left.stderr
    assert "to begin it: the same command with --id mine" in left.stderr
    assert len(google.run.names) == begun
    again = staged("launch", "tiny.toml", "--id", "mine", "--yes", "--wait")
    assert (again.exit_code, again.stdout.strip()) == (0, "mine"), again.stderr
    assert len(google.run.names) == 1


def test_cancel_and_resume(staged: Call, google: FakeGoogleCloud) -> None:
    launched = staged(
        "launch", "tiny.toml", "--yes", plan=[{"steps": 4, "exit": 0, "sleep_s": 60}, {"steps": 6, "exit": 0}]
    )
    run_id = launched.stdout.strip()
    wait_until(lambda: list(google.mount.glob(f"runs/{run_id}/claims/*.json")), bool)
    cancelled = staged("cancel", run_id)
    assert (cancelled.exit_code, cancelled.stdout.strip()) == (0, run_id)
    resumed = staged("resume", run_id, "--wait")
    assert resumed.exit_code == 0, resumed.stderr
    assert len(google.run.names) == 2
    assert run_id in staged("runs").stdout


def test_a_dry_run_starts_nothing_and_says_what_is_denied(staged: Call, google: FakeGoogleCloud) -> None:
    told = staged("launch", "tiny.toml", "--dry-run")
    assert told.exit_code == 0, told.stderr
    google.run.denied.add("run.jobs.run")
    refused = staged("launch", "tiny.toml", "--dry-run")
    assert refused.exit_code == 2
    assert "run.jobs.run is not allowed" in refused.stderr
    assert google.run.names == []
    assert not (google.mount / "runs").exists()


def test_a_token_of_the_environment_is_written_nowhere(
    staged: Call, google: FakeGoogleCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_" + os.urandom(16).hex()
    monkeypatch.setenv("HF_TOKEN", secret)
    said = [staged("stage", "data", "builtin:digits"), staged("launch", "tiny.toml", "--dry-run", "--json", "--yes")]
    launched = staged("launch", "tiny.toml", "--wait", "--yes")
    run_id = launched.stdout.strip()
    said += [launched, *(staged(verb, run_id) for verb in ("logs", "runs", "fetch")), staged("doctor", "--json")]
    assert [result.exit_code for result in said] == [0] * len(said)
    assert secret not in "".join(result.stdout + result.stderr for result in said)
    started = google.run.started(google.run.names[0])
    assert started is not None
    assert secret not in json.dumps(started.template)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_without_a_deployment_it_says_how_to_get_one(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("G4KIT_DEPLOYMENT")
    refused = call("runs", "--target", "cloudrun")
    assert refused.exit_code == 2
    assert "terraform -chdir=terraform output -json > deployment.json" in refused.stderr


def test_a_sweep_is_one_execution_whose_tasks_are_retried_alone(
    staged: Call, google: FakeGoogleCloud, tmp_path: Path
) -> None:
    planned = staged("sweep", "tiny.toml", *GRID, "--dry-run", "--max-cost", "100", "--json")
    document = json.loads(planned.stdout)
    assert "all     4 points, one after another: about " in planned.stderr
    assert document["cost_usd"]["worst"] == pytest.approx(
        sum(point["estimate"]["cost_usd"]["worst"] for point in document["points"]), abs=0.02
    )
    assert len(document["points"]) == 4
    assert google.run.names == []
    killer = threading.Thread(target=lose_the_machine_of, args=[google, 1], daemon=True)
    killer.start()
    slow = {"steps": 4, "exit": 0, "sleep_s": 30}
    swept = staged(
        "sweep",
        "tiny.toml",
        *GRID,
        "--id",
        "s1",
        "--wait",
        "--yes",
        plan={"1": [slow, FINE], "2": [{"steps": 2, "exit": 75}, FINE], "*": [FINE]},
    )
    assert swept.exit_code == 0, swept.stderr
    killer.join(1)
    [execution] = google.run.names
    started = google.run.started(execution)
    assert started is not None
    assert started.task_count == 4
    assert started.template["containers"][0]["args"] == ["run", "--sweep", f"{google.mount}/sweeps/s1/tasks.json"]
    tasks = json.loads((google.mount / "sweeps" / "s1" / "tasks.json").read_text())["tasks"]
    attempts = [len(list((google.mount / "runs" / run_id / "claims").iterdir())) for run_id in tasks]
    assert attempts == [1, 2, 2, 1]
    view = json.loads(staged("runs", "s1", "--json").stdout)
    assert [point["run"]["state"] for point in view["points"]] == ["succeeded"] * 4
    assert (view["best"]["run_id"], view["best"]["by"]) == ("s1-02", "validation loss")
    log = staged("logs", "s1", "--task", "1").stdout.splitlines()
    assert [line for line in log if line.startswith("g4kit: attempt")] == [
        "g4kit: attempt 1 ended with exit code 137",
        "g4kit: attempt 2 ended with exit code 0",
    ]
    assert not (google.mount / "runs" / "s1").exists(), "what belongs to the launch lies with the sweep"
    assert staged("fetch", "s1-02").exit_code == 0


def test_what_is_left_of_a_sweep_is_an_execution_of_so_many_tasks(staged: Call, google: FakeGoogleCloud) -> None:
    hopeless = [{"steps": 1, "exit": 3}]
    swept = staged("sweep", "tiny.toml", *GRID, "--id", "s1", "--wait", "--yes", plan={"1": hopeless, "*": [FINE]})
    assert swept.exit_code == 3
    resumed = staged("resume", "s1", "--wait", plan=[FINE])
    assert resumed.exit_code == 0, resumed.stderr
    second = google.run.started(google.run.names[1])
    assert second is not None
    assert second.task_count == 1
    assert second.template["containers"][0]["args"][-2:] == ["--only", "1"]


def test_a_cap_on_the_cost_holds_for_all_points(staged: Call) -> None:
    planned = staged("sweep", "tiny.toml", *GRID, "--dry-run", "--max-cost", "2", "--json")
    assert planned.exit_code == 0, planned.stderr
    points = json.loads(planned.stdout)["points"]
    jobs = [point["recipe"]["job"] for point in points]
    second = points[0]["estimate"]["prices"]["usd_a_second"]
    assert sum(job["timeout_s"] * job["max_attempts"] * second for job in jobs) <= 2
    refused = staged("sweep", "tiny.toml", *GRID, "--dry-run", "--max-cost", "0.01")
    assert refused.exit_code == 2
    assert re.search(r"got 0\.01, and an attempt .* may cost \$.* of each of 4 runs; write at least", refused.stderr)


def test_a_deployment_without_the_card_is_told_once(staged: Call, google: FakeGoogleCloud) -> None:
    refused = staged("sweep", "tiny.toml", *GRID, "--set", "job.accelerator=nvidia-h100-80gb", "--yes")
    assert refused.exit_code == 2
    assert refused.stderr.count('job.accelerator: got "nvidia-h100-80gb"') == 1
    assert google.run.names == []


def test_an_evaluation_over_many_tasks_is_one_execution(staged: Call, google: FakeGoogleCloud) -> None:
    run_id = staged("launch", "tiny.toml", "--wait", "--yes", plan=[FINE]).stdout.strip()
    told = staged("evaluate", run_id, "--shards", "3", "--test-size", "40", "--dry-run", "--max-cost", "5", "--json")
    assert json.loads(told.stdout)["worst_usd"] <= 5
    arguments = ("evaluate", run_id, "--shards", "3", "--test-size", "40", "--wait", "--yes")
    evaluated = staged(*arguments, plan={"2/0": {"exit": 75}})
    assert evaluated.exit_code == 0, evaluated.stderr
    assert len(google.run.names) == 2
    started = google.run.started(google.run.names[1])
    assert started is not None
    assert started.task_count == 3
    path = f"{google.mount}/runs/{run_id}"
    asked = ["evaluate", path, "--shards", "3", "--test-size", "40"]
    assert started.template["containers"][0]["args"] == asked
    assert sorted(path.name for path in (google.mount / "runs").iterdir()) == [run_id]


def lose_the_machine_of(google: FakeGoogleCloud, task: int) -> None:
    """Once that task of a sweep is at work, kills it without a word."""
    while not list((google.mount / "runs").glob(f"*-{task:02d}/status.json")):
        time.sleep(0.02)
    google.run.lose_machine(google.run.names[0])
