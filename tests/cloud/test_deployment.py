"""Reading what Terraform made."""

import json
from pathlib import Path
from typing import Any

import pytest

from fakes.google_cloud import FakeGoogleCloud
from g4kit.deployment import Deployment, DeploymentError, parse_deployment, read_deployment


@pytest.fixture
def document(google: FakeGoogleCloud) -> dict[str, Any]:
    """As `terraform output -json` prints it."""
    value = google.deployment.model_dump() | {"from_a_newer_module": 1}
    return {
        "build_command": {"sensitive": False, "type": "string", "value": "gcloud builds submit"},
        "deployment": {"sensitive": False, "type": ["object", {}], "value": value},
    }


def test_all_outputs_or_the_one_are_read(document: dict[str, Any], google: FakeGoogleCloud) -> None:
    assert parse_deployment(json.dumps(document), "x") == google.deployment
    assert parse_deployment(json.dumps(document["deployment"]["value"]), "x") == google.deployment


def test_the_variable_names_a_file(document: dict[str, Any], google: FakeGoogleCloud, tmp_path: Path) -> None:
    file = tmp_path / "deployment.json"
    file.write_text(json.dumps(document))
    assert read_deployment({"G4KIT_DEPLOYMENT": str(file)}) == google.deployment


def test_the_variable_names_terraforms_folder(
    document: dict[str, Any], google: FakeGoogleCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outputs.json").write_text(json.dumps(document))
    terraform = tmp_path / "bin" / "terraform"
    terraform.parent.mkdir()
    terraform.write_text('#!/bin/sh\n[ "$2 $3" = "output -json" ] && cat "${1#-chdir=}/outputs.json"\n')
    terraform.chmod(0o755)
    monkeypatch.setenv("PATH", str(terraform.parent), prepend=":")
    assert read_deployment({"G4KIT_DEPLOYMENT": str(tmp_path)}) == google.deployment
    (tmp_path / "outputs.json").unlink()
    with pytest.raises(DeploymentError, match=r"outputs\.json"):
        read_deployment({"G4KIT_DEPLOYMENT": str(tmp_path)})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "x: got no JSON"),
        ("[]", "x: got no output `deployment`"),
        ('{"deployment": {"value": null}}', "x: got no output `deployment`"),
        ('{"deployment": {"value": {"project": ""}}}', "deployment.project: got ''"),
        ('{"deployment": {"value": {"project": "p"}}}', "deployment.bucket: got nothing; field required."),
    ],
)
def test_what_is_no_deployment_is_refused_with_all_problems(text: str, says: str) -> None:
    with pytest.raises(DeploymentError) as refused:
        parse_deployment(text, "x")
    assert says in str(refused.value)
    assert "G4KIT_DEPLOYMENT" in str(refused.value)


def test_a_missing_variable_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="G4KIT_DEPLOYMENT: got nothing"):
        read_deployment({})
    with pytest.raises(DeploymentError, match="cannot be read"):
        read_deployment({"G4KIT_DEPLOYMENT": str(tmp_path / "none.json")})


def test_jobs_are_found_by_accelerator(google: FakeGoogleCloud) -> None:
    deployment: Deployment = google.deployment
    assert [job.name for job in deployment.jobs_with("nvidia-l4")] == ["g4kit-l4"]
    assert deployment.jobs_with("nvidia-h100") == []
    assert deployment.job_names == ["g4kit-l4", "g4kit-rtx", "g4kit-tools"]
    assert deployment.location == "projects/test-project/locations/europe-west4"
