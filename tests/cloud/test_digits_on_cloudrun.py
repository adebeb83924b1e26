"""The digits recipe on the fake of Cloud Run, with the real trainer: a lost machine changes nothing in the result."""

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
]
"""Six steps in place of hundreds, a checkpoint at every second."""
KILL_AFTER = "step-00000002"


@pytest.fixture
def google(tmp_path: Path) -> Iterator[FakeGoogleCloud]:
    made = FakeGoogleCloud(tmp_path / "google")
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_result_is_the_local_targets(
    google: FakeGoogleCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deployment.json").write_text(json.dumps(google.deployment.model_dump()))
    monkeypatch.setenv("G4KIT_DEPLOYMENT", str(tmp_path / "deployment.json"))
    monkeypatch.setenv("G4KIT_EMULATOR_HOST", google.server.url)
    monkeypatch.setenv("G4KIT_ROOT", str(tmp_path / "local"))
    monkeypatch.setattr(google_client, "Patience", lambda: QUICK)
    killer = threading.Thread(target=lose_the_machine_once, args=[google], daemon=True)
    killer.start()
    results = {target: whole_run(target, tmp_path / target) for target in ("cloudrun", "local")}
    killer.join(1)
    assert len(google.run.names) == 1
    log = CliRunner().invoke(cli, ["logs", results["cloudrun"]["run_id"], "--target", "cloudrun"]).stdout
    assert "g4kit: attempt 1 ended with exit code 137" in log
    assert "g4kit: attempt 2 ended with exit code 0" in log
    for part in ("baseline", "final"):
        assert results["cloudrun"][part] == results["local"][part]
    weights = "adapter/adapter_model.safetensors"
    there, here = (results[target]["artifacts"][weights]["sha256"] for target in ("cloudrun", "local"))
    assert there == here
    assert (tmp_path / "cloudrun" / weights).read_bytes() == (tmp_path / "local" / weights).read_bytes()


def whole_run(target: str, folder: Path) -> dict[str, Any]:
    """Stages, launches, follows to the end and fetches; returns results.json."""
    for kind, source in (("model", "builtin:tiny-gemma4"), ("data", "builtin:digits")):
        call("stage", kind, source, "--target", target)
    overrides = [part for item in SHORT for part in ("--set", item)]
    launched = call("launch", str(RECIPE), *overrides, "--target", target, "--wait", "--yes")
    call("fetch", launched.stdout.strip(), "--target", target, "--out", str(folder))
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def lose_the_machine_once(google: FakeGoogleCloud) -> None:
    """Waits for a checkpoint, then kills the attempt without a word."""
    while not list((google.mount / "runs").glob(f"*/checkpoints/{KILL_AFTER}/COMMITTED.json")):
        time.sleep(0.05)
    google.run.lose_machine(google.run.names[0])
