"""g4kit stage model HUB-ID: in the deployment's job, or through this machine; the token is written nowhere."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result

import made_up_model
from contract.waiting import wait_until
from fakes.google_cloud import FakeGoogleCloud
from fakes.hub import FakeHub, Repo
from fakes.server import BLOCK_BYTES
from g4kit.cloud.local import LocalCloud
from g4kit.hub_source import partial_name
from g4kit.staging import staged_problems
from g4trainer import hub

ID = "google/gemma-4-made-up"
FOLDER = "models/gemma-4-made-up"
TOOLS = "g4kit-tools"
Stage = Callable[..., Result]


@pytest.fixture
def fake(google: FakeGoogleCloud) -> Iterator[FakeHub]:
    """A hub that the job sees as well."""
    made = FakeHub()
    google.run.jobs[TOOLS].hidden["HF_ENDPOINT"] = made.url
    yield made
    made.close()


@pytest.fixture
def repo(fake: FakeHub, tmp_path: Path) -> Repo:
    folder = made_up_model.write(tmp_path / "source", shards=2, weights=1_500_000)
    (folder / ".gitattributes").touch()
    return fake.add("models", ID, folder)


@pytest.fixture
def deployment(google: FakeGoogleCloud, tmp_path: Path) -> Path:
    """Where Terraform's outputs are, with a secret for the hub."""
    file = tmp_path / "deployment.json"
    file.write_text(json.dumps(google.deployment.model_dump() | {"hub_token_secret": "g4kit-hub-token"}))
    return file


@pytest.fixture
def stage(stage: Stage, fake: FakeHub, deployment: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """The same, with the hub's fake."""
    monkeypatch.setattr(hub, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("G4KIT_DEPLOYMENT", str(deployment))
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    return stage


def assert_staged(folder: Path, repo: Repo) -> None:
    marker = json.loads((folder / "STAGED.json").read_text())
    assert (marker["source"], marker["revision"]) == (f"hf://{ID}", repo.commit)
    names = sorted(path.name for path in repo.folder.iterdir() if not path.name.startswith("."))
    assert sorted(marker["files"]) == names
    assert len(names) == 7
    assert {name: (folder / name).read_bytes() for name in names} == {
        name: (repo.folder / name).read_bytes() for name in names
    }


def test_the_job_stages_it_and_no_weights_pass_this_machine(
    stage: Stage, google: FakeGoogleCloud, fake: FakeHub, repo: Repo
) -> None:
    result = stage(ID)
    assert (result.exit_code, result.stdout) == (0, f"{FOLDER}\n"), result.stderr
    [execution] = google.run.names
    assert execution.startswith(f"{TOOLS}-")
    started = google.run.started(execution)
    assert started is not None
    assert started.request.args == ("stage", "model", ID, "--name", "gemma-4-made-up", "--revision", repo.commit)
    assert_staged(google.mount / FOLDER, repo)
    assert f"commit {repo.commit}, 7 files" in result.stderr, "the job's own words"
    assert google.storage.uploads.received_bytes == 0
    assert google.storage.sent_bytes < 10_000, "the marker alone is read back"
    again = stage(ID, "--json")
    size = sum(path.stat().st_size for path in repo.folder.iterdir())
    assert json.loads(again.stdout) == {"folder": FOLDER, "files": 7, "size": size, "already": True}
    assert len(google.run.names) == 1


def test_a_gated_model_with_the_jobs_own_token(
    stage: Stage, google: FakeGoogleCloud, fake: FakeHub, repo: Repo, tmp_path: Path
) -> None:
    repo.gated = True
    google.run.jobs[TOOLS].hidden["HF_TOKEN"] = fake.token
    result = stage(ID)
    assert result.exit_code == 0, result.stderr
    assert "cannot be read from here, so the job checks it with its own token" in result.stderr
    assert_staged(google.mount / FOLDER, repo)
    assert_written_nowhere(fake.token, tmp_path, result)


def test_a_gated_model_with_the_token_of_the_environment(
    stage: Stage, google: FakeGoogleCloud, fake: FakeHub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.gated = True
    monkeypatch.setenv("HF_TOKEN", fake.token)
    result = stage(ID, "--here")
    assert result.exit_code == 0, result.stderr
    assert google.run.names == []
    assert_staged(google.mount / FOLDER, repo)
    assert_written_nowhere(fake.token, tmp_path, result)


def assert_written_nowhere(token: str, folder: Path, result: Result) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert [path for path in files if token.encode() in path.read_bytes()] == []
    assert token not in result.stdout + result.stderr


def test_without_a_secret_a_gated_model_starts_no_job(
    stage: Stage, google: FakeGoogleCloud, repo: Repo, deployment: Path
) -> None:
    repo.gated = True
    deployment.write_text(json.dumps(google.deployment.model_dump()))
    result = stage(ID)
    assert result.exit_code == 2
    assert f"{ID}: is gated; accept its terms at" in result.stderr
    assert "docs/deploy.md" in result.stderr
    assert google.run.names == []


def test_wrong_files_start_no_job(stage: Stage, google: FakeGoogleCloud, repo: Repo) -> None:
    (repo.folder / "chat_template.jinja").unlink()
    result = stage(ID)
    assert result.exit_code == 2
    assert "chat_template.jinja: missing" in result.stderr
    assert google.run.names == []


def test_a_job_that_is_at_it_is_joined(stage: Stage, google: FakeGoogleCloud, repo: Repo) -> None:
    google.run.pending_s = 1.0
    results: list[Result] = []
    first = threading.Thread(target=lambda: results.append(stage(ID)))
    first.start()
    wait_until(lambda: len(google.run.names), lambda count: count == 1)
    second = stage(ID)
    first.join()
    assert [result.exit_code for result in (*results, second)] == [0, 0]
    assert len(google.run.names) == 1
    assert_staged(google.mount / FOLDER, repo)


def test_a_job_that_stages_another_revision_is_not_joined(
    stage: Stage, google: FakeGoogleCloud, fake: FakeHub, repo: Repo, tmp_path: Path
) -> None:
    other = fake.add("models", ID, made_up_model.write(tmp_path / "other", shards=1))
    other.refs = {"v2"}
    google.run.pending_s = 2.0
    results: list[Result] = []
    first = threading.Thread(target=lambda: results.append(stage(ID)))
    first.start()
    [name] = wait_until(lambda: google.run.names, bool)
    refused = stage(ID, "--revision", "v2")
    first.join()
    assert refused.exit_code == 2
    assert f"got {ID} {other.commit}, and execution {name} is making the folder from something else" in refused.stderr
    assert results[0].exit_code == 0
    assert_staged(google.mount / FOLDER, repo)


def test_a_job_that_fails_is_told_and_the_next_one_goes_on(
    stage: Stage, google: FakeGoogleCloud, fake: FakeHub, repo: Repo
) -> None:
    google.run.jobs[TOOLS].hidden["G4KIT_ROOT"] = "/proc/no-mount"
    google.run.jobs[TOOLS].max_retries = 0
    failed = stage(ID)
    assert failed.exit_code == 1
    assert "/proc/no-mount" in failed.stderr, "the job's own words"
    assert "ended with exit code 1 in attempt 1; the same command stages what is missing" in failed.stderr
    del google.run.jobs[TOOLS].hidden["G4KIT_ROOT"]
    assert stage(ID).exit_code == 0
    assert len(google.run.names) == 2
    assert_staged(google.mount / FOLDER, repo)


@pytest.mark.parametrize("target", ["local", "cloudrun"])
def test_through_this_machine_it_goes_on_where_it_was(
    stage: Stage, google: FakeGoogleCloud, fake: FakeHub, repo: Repo, tmp_path: Path, target: str
) -> None:
    """What an earlier command has received is in the cache: it is checked and not asked for again."""
    root = google.mount if target == "cloudrun" else tmp_path / "local"
    shard = next(repo.folder.glob("*.safetensors"))
    half = tmp_path / "cache" / "g4kit" / "hub" / repo.commit / partial_name(shard.name)
    half.parent.mkdir(parents=True)
    half.write_bytes(shard.read_bytes()[:2_000_000])
    result = stage(ID, "--here", "--target", target)
    assert result.exit_code == 0, result.stderr
    assert_staged(root / FOLDER, repo)
    assert not half.exists()
    (root / FOLDER / "STAGED.json").unlink()
    before = len([line for line in fake.server.requests if "/cdn/" in line])
    assert stage(ID, "--target", target, "--here").exit_code == 0
    after = [line for line in fake.server.requests if "/cdn/" in line]
    assert len(after) - before == 2 * 2, "two ranges of each header"
    assert staged_problems(LocalCloud(root).bucket, FOLDER) == []


def test_through_this_machine_it_goes_on_after_kill_9(
    stage: Stage, google: FakeGoogleCloud, fake: FakeHub, repo: Repo
) -> None:
    fake.pause_s = 0.05
    command = [sys.executable, "-m", "g4kit", "stage", "model", ID, "--here"]
    process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "0"}, stderr=subprocess.DEVNULL)
    wait_until(lambda: fake.sent_bytes, lambda count: count > 3_000_000)
    process.kill()
    process.wait()
    fake.pause_s = 0.0
    result = stage(ID, "--here")
    assert result.exit_code == 0, result.stderr
    assert_staged(google.mount / FOLDER, repo)
    again = fake.sent_bytes - sum(path.stat().st_size for path in repo.folder.glob("*.safetensors"))
    print(f"{again} bytes sent again")
    assert again < 2 * (1 << 20) + 4 * BLOCK_BYTES, "what was on its way of each of two files, and their headers"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such-model", "--here"], "no/such-model: is neither a folder here nor on the hub, or it is private"),
        ([ID, "--revision", "v9"], "has no such revision"),
        (["builtin:tiny-gemma4", "--revision", "v9"], "--revision: got builtin:tiny-gemma4, which is no hub id"),
        (["builtin:tiny-gemma4", "--here"], "--here: got builtin:tiny-gemma4"),
        ([ID, "--name", "../x"], "name: got '../x'"),
    ],
)
def test_bad_requests(stage: Stage, google: FakeGoogleCloud, repo: Repo, arguments: list[str], message: str) -> None:
    result = stage(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert google.run.names == []


def test_what_only_the_jobs_token_may_see_is_looked_for_by_the_job(stage: Stage, google: FakeGoogleCloud) -> None:
    """The hub does not tell what is private from what is not there."""
    result = stage("no/such-model")
    assert result.exit_code == 2
    assert "is neither a folder here nor on the hub" in result.stderr, "the job's own words"
    assert "the job refused it; its last lines above say why" in result.stderr
    assert len(google.run.names) == 1


def test_offline_is_said(stage: Stage, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = stage(ID)
    assert (result.exit_code, "got HF_HUB_OFFLINE=1" in result.stderr) == (2, True)
