"""`python -m g4trainer stage`: a repository of the hub in the bucket, pinned, checked and complete, or not at all."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import made_up_model
from fakes.faults import Fault, Kind
from fakes.hub import FakeHub, Repo
from g4kit.cloud.base import crc32c_of_file
from g4trainer import hub, staging
from g4trainer.hub import HubError, HubUnavailableError

ID = "google/gemma-4-made-up"
Stage = Callable[..., dict[str, object]]


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    made = FakeHub()
    yield made
    made.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with large shards, and what no run needs."""
    folder = made_up_model.write(tmp_path / "source", shards=2, weights=1_500_000)
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / "README.md").write_text("# A model")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


@pytest.fixture
def repo(fake: FakeHub, source: Path) -> Repo:
    return fake.add("models", ID, source)


@pytest.fixture
def stage(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Stages ID as `mine` in this process; keywords replace what is asked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.5)
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def stage(kind: str = "model", repo_id: str = ID, revision: str | None = None) -> dict[str, object]:
        return staging.stage(kind, repo_id, revision, tmp_path / "bucket" / "mine", lambda _: None)  # type: ignore[arg-type]

    return stage


def names_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_model_is_staged_at_a_commit(stage: Stage, repo: Repo, source: Path, tmp_path: Path) -> None:
    listing = stage()
    there = tmp_path / "bucket" / "mine"
    wanted = [name for name in names_below(source) if name not in (".gitattributes", "pytorch_model.bin")]
    assert names_below(there) == sorted([*wanted, "STAGED.json"])
    assert (
        json.loads((there / "STAGED.json").read_text())
        == listing
        == {
            "files": {
                name: {"size": (source / name).stat().st_size, "crc32c": crc32c_of_file(source / name)}
                for name in wanted
            },
            "source": f"hf://{ID}",
            "revision": repo.commit,
        }
    )
    assert {name: (there / name).read_bytes() for name in wanted} == {
        name: (source / name).read_bytes() for name in wanted
    }


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in (Kind.STALE_GENERATION, Kind.RETURN_503_AFTER)])
def test_no_fault_leaves_a_wrong_file(
    stage: Stage, fake: FakeHub, repo: Repo, source: Path, tmp_path: Path, kind: Kind
) -> None:
    """Each fault twice, on the large files' way; bytes that changed are refused, and the next attempt mends them."""
    fake.server.faults.add(*[Fault(kind, "/cdn/", after_bytes=1 << 20, seconds=1.0)] * 2)
    if kind is Kind.WRONG_CHECKSUM:
        with pytest.raises(HubError, match=r"digest|damaged|header"):
            stage()
        assert not (tmp_path / "bucket/mine/STAGED.json").exists()
        fake.server.faults.clear()
    stage()
    for name in names_below(tmp_path / "bucket" / "mine"):
        if name != "STAGED.json":
            assert (tmp_path / "bucket" / "mine" / name).read_bytes() == (source / name).read_bytes()


def test_what_an_ended_attempt_left_is_kept_where_it_is_right(
    stage: Stage, fake: FakeHub, repo: Repo, source: Path, tmp_path: Path
) -> None:
    there = tmp_path / "bucket" / "mine"
    there.mkdir(parents=True)
    first, second = sorted(source.glob("*.safetensors"))
    (there / first.name).write_bytes(first.read_bytes())
    (there / second.name).write_bytes(bytes(second.stat().st_size))  # as long, and wrong
    stage()
    assert (there / second.name).read_bytes() == second.read_bytes()
    sent = [line for line in fake.server.requests if "/cdn/" in line]
    assert len(sent) == 2 * 2 + 1, "two ranges of each header, and one whole file"
    before = len(fake.server.requests)
    stage()
    assert len(fake.server.requests) == before + 1, "what is complete is not read again"


def test_another_commit_under_the_same_name_is_refused(stage: Stage, fake: FakeHub, repo: Repo, tmp_path: Path) -> None:
    stage()
    other = fake.add("models", ID, made_up_model.write(tmp_path / "newer"))
    with pytest.raises(HubError, match="write another --name"):
        stage(revision=other.commit)
    assert stage(revision=repo.commit)["revision"] == repo.commit


def test_wrong_files_are_refused_before_any_is_written(
    stage: Stage, fake: FakeHub, repo: Repo, source: Path, tmp_path: Path
) -> None:
    (source / "tokenizer.json").unlink()
    with next(source.glob("*.safetensors")).open("ab") as file:
        file.write(b"more")
    with pytest.raises(HubError, match=r"(?s)tokenizer.json: missing.*safetensors: too long"):
        stage()
    assert not (tmp_path / "bucket").exists()


def test_a_gated_model_takes_the_token_of_the_environment_and_sends_it_nowhere_else(
    stage: Stage, fake: FakeHub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.gated = True
    with pytest.raises(HubError, match=f"{ID}: is gated; accept its terms at {fake.url}/{ID}, and set HF_TOKEN"):
        stage()
    monkeypatch.setenv("HF_TOKEN", fake.token)
    stage()
    sent = {value for path, value in fake.authorizations if not path.startswith("/cdn/")}
    assert sent == {"", f"Bearer {fake.token}"}
    for path in (tmp_path / "bucket").rglob("*"):
        assert not path.is_file() or fake.token.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"repo_id": "google/no-such"}, "google/no-such: is neither a folder here nor on the hub, or it is private"),
        ({"revision": "v9"}, f"{ID}: has no such revision; .*/commits lists"),
        ({"repo_id": "gemma"}, "got 'gemma'; write a hub id, for example google/gemma-4-E2B-it"),
    ],
)
def test_what_is_not_there(stage: Stage, repo: Repo, asked: dict[str, str], message: str) -> None:
    with pytest.raises(HubError, match=message):
        stage(**asked)


def test_a_hub_that_stays_away_may_be_tried_again(stage: Stage, fake: FakeHub, repo: Repo) -> None:
    fake.server.faults.add(*[Fault(Kind.RETURN_503)] * 50)
    with pytest.raises(HubUnavailableError, match="no answer"):
        stage()


def test_a_data_set_as_a_process(fake: FakeHub, tmp_path: Path) -> None:
    """As the job does it: by arguments and environment, with an exit code."""
    photos = tmp_path / "photos" / "data"
    photos.mkdir(parents=True)
    (photos / "train.parquet").write_bytes(os.urandom(100_000))
    fake.add("datasets", "me/half", tmp_path / "photos")
    environ = os.environ | {"HF_ENDPOINT": fake.url, "G4KIT_ROOT": str(tmp_path / "bucket"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "g4trainer", "stage", "data", "me/photos", "--name", "pictures"]
    half = subprocess.run(
        [*command[:5], "me/half", *command[6:]], env=environ, capture_output=True, text=True, check=False
    )
    assert (half.returncode, "test: missing; write test.parquet" in half.stderr) == (2, True)
    (photos / "test.parquet").touch()
    made = fake.add("datasets", "me/photos", tmp_path / "photos")
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    marker = json.loads((tmp_path / "bucket/datasets/pictures/STAGED.json").read_text())
    assert (marker["source"], marker["revision"]) == ("hf://datasets/me/photos", made.commit)
    assert f"commit {made.commit}, 2 files" in ended.stdout
    refused = subprocess.run([*command[:-1], "../x"], env=environ, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("g4trainer: stage: got --name '../x'; write letters")
