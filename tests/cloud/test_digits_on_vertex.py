"""The digits recipe on the fake of Vertex AI, with the real trainer on two hosts that meet by torchrun; both are lost,
and the run goes on from its last checkpoint."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fakes.google_cloud import QUICK, FakeGoogleCloud
from g4kit.cloud import google_client
from g4kit.main import cli

pytest.importorskip("torch", reason="needs the extra `train`")

RECIPE = Path(__file__).parents[2] / "recipes" / "digits-tiny.toml"
SHORT = [
    "data.train_size=26",
    "data.validation_size=2",
    "data.test_size=6",
    "training.effective_batch_size=8",
    "training.num_train_epochs=2",
    "training.save_steps=2",
    "job.timeout_s=600",
    "job.accelerator=nvidia-h100-80gb",
    "job.gpus=2",
    "job.hosts=2",
]
"""Six steps in place of hundreds, a checkpoint at every second; a process on each host, here without a GPU."""
LOSE_AFTER = "step-00000002"


@pytest.fixture
def google(tmp_path: Path) -> Iterator[FakeGoogleCloud]:
    made = FakeGoogleCloud(tmp_path / "google")
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hosts_that_are_lost_once_finish_the_run(
    google: FakeGoogleCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deployment.json").write_text(json.dumps(google.deployment.model_dump()))
    monkeypatch.setenv("G4KIT_TARGET", "vertex")
    monkeypatch.setenv("G4KIT_DEPLOYMENT", str(tmp_path / "deployment.json"))
    monkeypatch.setenv("G4KIT_EMULATOR_HOST", google.server.url)
    monkeypatch.setattr(google_client, "Patience", lambda: QUICK)
    for kind, source in (("model", "builtin:tiny-gemma4"), ("data", "builtin:digits")):
        call("stage", kind, source)
    loser = threading.Thread(target=lose_the_machines_once, args=[google], daemon=True)
    loser.start()
    overrides = [part for item in SHORT for part in ("--set", item)]
    run_id = call("launch", str(RECIPE), *overrides, "--wait", "--yes").stdout.strip()
    loser.join(1)
    [job] = google.vertex.jobs.values()
    assert (job.state, job.starts) == ("JOB_STATE_SUCCEEDED", 2)
    call("fetch", run_id, "--out", str(tmp_path / "out"))
    results: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["train"]["steps"] == 6
    attempts = json.loads(next(google.mount.glob(f"runs/{run_id}/launches/*.attempts.json")).read_text())["attempts"]
    assert [attempt["exit_code"] for attempt in attempts] == [None, 0]
    assert "g4kit: attempt 2 ended with exit code 0" in call("logs", run_id).stdout


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def lose_the_machines_once(google: FakeGoogleCloud) -> None:
    """Waits for a checkpoint, then takes both hosts without a word."""
    while not list((google.mount / "runs").glob(f"*/checkpoints/{LOSE_AFTER}/COMMITTED.json")):
        time.sleep(0.05)
    google.vertex.lose_machines(next(iter(google.vertex.jobs)))
