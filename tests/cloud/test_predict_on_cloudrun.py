"""`g4kit predict` on the fakes: images up, one execution, answers back, nothing left behind."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from contract.waiting import wait_until
from fakes.google_cloud import FakeGoogleCloud
from g4kit import predicting
from g4kit.cloud.base import Execution, ExecutionState, JobRequest
from g4kit.cloud.google_jobs import GoogleJobs
from g4kit.main import cli

Call = Callable[..., Result]


@pytest.fixture
def google(standins: FakeGoogleCloud) -> FakeGoogleCloud:
    return standins


@pytest.fixture
def run_id(staged: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(predicting, "POLL_S", 0.1)
    (tmp_path / "photos").mkdir()
    for number in range(1, 4):
        (tmp_path / "photos" / f"{number}.png").write_bytes(b"x" * number)
    return staged("launch", "tiny.toml", "--wait", "--yes").stdout.strip()


def objects(google: FakeGoogleCloud) -> set[str]:
    return {path.relative_to(google.mount).as_posix() for path in google.mount.rglob("*") if path.is_file()}


def test_answers_come_back(call: Call, google: FakeGoogleCloud, run_id: str) -> None:
    before = objects(google)
    told = call("predict", run_id, "photos", "--both", "--yes", "--json")
    assert told.exit_code == 0, told.stderr
    answers = json.loads(told.stdout)["answers"]
    assert [(answer["image"], answer["after"]["prediction"]) for answer in answers] == [
        ("photos/1.png", "1 bytes"),
        ("photos/2.png", "2 bytes"),
        ("photos/3.png", "3 bytes"),
    ]
    assert "USD an hour, billed for 60 s at least" in told.stderr
    first, own = google.run.names
    started = google.run.started(own)
    assert started is not None
    assert started.template["containers"][0]["args"][:2] == ["predict", str(google.mount / "runs" / run_id)]
    assert objects(google) == before, "nothing of the request is left in the bucket"
    view = json.loads(call("runs", run_id, "--json").stdout)
    assert (view["state"], view["execution"]) == ("succeeded", first), "the run is what it was"
    assert [one["run_id"] for one in json.loads(call("runs", "--json").stdout)] == [run_id]


def test_it_asks_before_it_spends(call: Call, google: FakeGoogleCloud, run_id: str) -> None:
    declined = CliRunner().invoke(cli, ["predict", run_id, "photos"], input="n\n")
    assert declined.exit_code == 1
    assert len(google.run.names) == 1


def test_a_failure_is_told_and_leaves_nothing(call: Call, google: FakeGoogleCloud, run_id: str) -> None:
    Path("photos/2.png").write_bytes(b"broken")
    before = objects(google)
    told = call("predict", run_id, "photos", "--yes")
    assert told.exit_code == 2
    assert "error: photos/2.png: cannot be read." in told.stderr
    assert objects(google) == before


def test_ctrl_c_ends_the_execution(
    call: Call,
    google: FakeGoogleCloud,
    run_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STANDIN_ANSWER_S", "30")

    def interrupt() -> None:
        while len(google.run.names) < 2 or not list((google.mount / "runs" / run_id).glob("requests/*/answers.jsonl")):
            time.sleep(0.05)
        os.kill(os.getpid(), 2)

    threading.Thread(target=interrupt, daemon=True).start()
    told = CliRunner().invoke(cli, ["predict", run_id, "photos", "--yes"])
    assert told.exit_code == 1
    assert_cancelled(google, google.run.names[1])


def test_ctrl_c_while_the_execution_begins_ends_it_too(
    google: FakeGoogleCloud, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_ANSWER_S", "30")
    really = GoogleJobs.run

    def interrupted(self: GoogleJobs, request: JobRequest) -> Execution:
        really(self, request)
        raise KeyboardInterrupt

    monkeypatch.setattr(GoogleJobs, "run", interrupted)
    told = CliRunner().invoke(cli, ["predict", run_id, "photos", "--yes"])
    assert told.exit_code == 1
    assert_cancelled(google, google.run.names[1])


def assert_cancelled(google: FakeGoogleCloud, name: str) -> None:
    started = google.run.started(name)
    assert started is not None
    state = wait_until(lambda: google.run.state(started), lambda one: one is not None and not one.active)
    assert state is not None
    assert state.state is ExecutionState.CANCELLED
