"""g4kit doctor: each thing that can be wrong, and the command that mends it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fakes.google_cloud import QUICK, FakeGoogleCloud
from g4kit.cloud import google_client
from g4kit.main import cli

Doctor = Callable[..., Result]


@pytest.fixture
def doctor(google: FakeGoogleCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    (tmp_path / "deployment.json").write_text(json.dumps(google.deployment.model_dump()))
    monkeypatch.setenv("G4KIT_DEPLOYMENT", str(tmp_path / "deployment.json"))
    monkeypatch.setenv("G4KIT_EMULATOR_HOST", google.server.url)
    monkeypatch.setenv("G4KIT_ROOT", str(tmp_path / "local"))
    monkeypatch.setattr(google_client, "Patience", lambda: QUICK)
    return lambda *arguments: CliRunner().invoke(cli, ["doctor", *arguments])


def wrong(result: Result) -> Iterator[tuple[str, str]]:
    """Check and mend of what failed."""
    assert result.exit_code == 1, result.output
    for finding in json.loads(result.stdout):
        if not finding["ok"]:
            yield finding["check"], finding["mend"]


def test_a_sound_deployment(doctor: Doctor, google: FakeGoogleCloud) -> None:
    result = doctor()
    assert result.exit_code == 0, result.output
    assert "MEND" not in result.stdout
    found: list[dict[str, Any]] = json.loads(doctor("--json").stdout)
    assert [one["check"] for one in found][:3] == ["deployment", "bucket region", "bucket access"]
    assert {"job g4kit-l4 start", "job g4kit-rtx GPU", "job g4kit-tools image"} <= {one["check"] for one in found}
    assert google.run.names == []


def test_everything_that_can_be_wrong(doctor: Doctor, google: FakeGoogleCloud) -> None:
    google.storage.location = "US-EAST4"
    google.storage.denied.add("storage.objects.create")
    google.run.denied.add("run.jobs.run")
    google.run.jobs["g4kit-l4"].image = "us-docker.pkg.dev/cloudrun/container/job:latest"
    google.run.jobs["g4kit-rtx"].service_account = "other@test-project.iam.gserviceaccount.com"
    del google.run.jobs["g4kit-tools"]
    (google.mount / "models" / "gemma").mkdir(parents=True)
    (google.mount / "models" / "gemma" / "config.json").write_text("{}")
    mends = dict(wrong(doctor("--json")))
    assert mends["bucket region"].startswith("set region to us-east4")
    assert "--role=roles/storage.objectAdmin" in mends["bucket access"]
    assert "build_command" in mends["job g4kit-l4 image"]
    assert "--role=roles/run.developer" in mends["job g4kit-rtx start"]
    assert mends["job g4kit-rtx account"] == mends["job g4kit-tools"] == "terraform -chdir=terraform apply"
    assert mends["model gemma"] == "g4kit stage model SOURCE --name gemma"


def test_a_bucket_that_is_not_there(doctor: Doctor, google: FakeGoogleCloud) -> None:
    google.mount.rmdir()
    result = doctor()
    assert result.exit_code == 1
    assert "bucket does not exist" in result.stdout


def test_no_deployment_and_nobody_signed_in(doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("G4KIT_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    assert list(wrong(doctor("--json"))) == [("target", "gcloud auth application-default login")]
    monkeypatch.delenv("G4KIT_DEPLOYMENT")
    [(check, mend)] = wrong(doctor("--json", "--target", "cloudrun"))
    assert (check, "deployment.json" in mend) == ("target", True)


def test_the_local_target(doctor: Doctor, tmp_path: Path) -> None:
    assert doctor("--target", "local").exit_code == 0
    assert not (tmp_path / "local").exists(), "looking makes nothing"
    (tmp_path / "local").touch()
    assert dict(wrong(doctor("--target", "local", "--json")))["bucket"].startswith(str(tmp_path / "local"))
