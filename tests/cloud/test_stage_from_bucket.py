"""g4kit stage model gs://...: copied by the server, at one generation, checked, and no weights through this machine."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

import made_up_model
from fakes.faults import Fault, Kind
from fakes.google_cloud import FakeGoogleCloud
from g4kit.cloud.base import PreconditionError, crc32c_of_file
from g4kit.cloud.google_bucket import GoogleBucket

FOLDER = "models/gemma"
REWRITE = "^POST .*/rewriteTo/"
Stage = Callable[..., Result]


@pytest.fixture
def source(google: FakeGoogleCloud) -> Path:
    """A model in another bucket."""
    folder = made_up_model.write(google.storage.make_bucket("public") / "gemma4" / "gemma", shards=2, weights=1_500_000)
    (folder / ".hidden").touch()
    return folder


def assert_staged(google: FakeGoogleCloud, source: Path) -> None:
    marker = json.loads((google.mount / FOLDER / "STAGED.json").read_text())
    wanted = {path.name: path for path in source.iterdir() if not path.name.startswith(".")}
    assert len(wanted) == 7
    assert marker["files"] == {
        name: {"size": path.stat().st_size, "crc32c": crc32c_of_file(path)} for name, path in wanted.items()
    }
    assert marker["source"] == "gs://public/gemma4/gemma"
    assert all((google.mount / FOLDER / name).read_bytes() == path.read_bytes() for name, path in wanted.items())


def test_the_server_copies_it(stage: Stage, google: FakeGoogleCloud, source: Path) -> None:
    result = stage("gs://public/gemma4/gemma/")
    assert (result.exit_code, result.stdout) == (0, f"{FOLDER}\n"), result.stderr
    assert "left out: 1 files, for example .hidden" in result.stderr
    assert_staged(google, source)
    rewrites = [line for line in google.server.requests if "/rewriteTo/" in line]
    assert len(rewrites) == 5 + 2 * 3, "3 MB in calls of 1 MiB"
    assert google.storage.sent_bytes < 50_000, "headers and JSON files, to check them"
    assert google.storage.uploads.received_bytes == 0
    again = stage("gs://public/gemma4/gemma", "--json")
    assert json.loads(again.stdout)["already"] is True
    assert len([line for line in google.server.requests if "/rewriteTo/" in line]) == len(rewrites)


@pytest.mark.parametrize("kind", [Kind.RETURN_503, Kind.RETURN_408, Kind.RETURN_429, Kind.RESET, Kind.ANSWER_LOST])
def test_it_outlives_faults(stage: Stage, google: FakeGoogleCloud, source: Path, kind: Kind) -> None:
    google.server.faults.add(*[Fault(kind, REWRITE)] * 4)
    result = stage("gs://public/gemma4/gemma")
    assert result.exit_code == 0, result.stderr
    assert google.server.faults.waiting == 0
    assert_staged(google, source)


def test_what_an_ended_stage_has_copied_is_not_copied_again(
    stage: Stage, google: FakeGoogleCloud, source: Path
) -> None:
    google.storage.denied.add("storage.objects.create")
    refused = stage("gs://public/gemma4/gemma")
    assert (refused.exit_code, "storage.objects.create is not allowed" in refused.stderr) == (2, True)
    google.storage.denied.clear()
    first = next(source.glob("*.safetensors"))
    (google.mount / FOLDER).mkdir(parents=True)
    (google.mount / FOLDER / first.name).write_bytes(first.read_bytes())
    google.server.requests.clear()
    assert stage("gs://public/gemma4/gemma").exit_code == 0
    assert [
        line for line in google.server.requests if "/rewriteTo/" in line and f"gemma%2F{first.name}/rew" in line
    ] == []
    assert_staged(google, source)


def test_an_object_that_is_replaced_meanwhile_is_refused(google: FakeGoogleCloud, source: Path) -> None:
    bucket = GoogleBucket(google.access())
    there = bucket.other("public")
    item = there.stat("gemma4/gemma/config.json")
    there.write("gemma4/gemma/config.json", b"{}")
    with pytest.raises(PreconditionError):
        bucket.rewrite_from(there, item, "x", lambda _: None)
    assert list(bucket.objects("x")) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gs://public/no/such"], "gs://public/no/such: got an empty folder"),
        (["gs://nobody/x"], "gs://nobody/x/: .*bucket does not exist"),
        (["gs://"], "got gs://; write gs://BUCKET/FOLDER"),
        (["gs://public/gemma4/gemma", "--target", "local"], "write --target cloudrun, or copy it to a folder first"),
        (["gs://public/gemma4/gemma", "--here"], "--here: got gs://public/gemma4/gemma, which is no hub id"),
    ],
)
def test_bad_sources(stage: Stage, google: FakeGoogleCloud, source: Path, arguments: list[str], message: str) -> None:
    result = stage(*arguments)
    assert result.exit_code == 2
    assert re.search(message, result.stderr), result.stderr
    assert not (google.mount / "models").exists()


def test_wrong_files_are_refused_before_any_is_copied(stage: Stage, google: FakeGoogleCloud, source: Path) -> None:
    (source / "tokenizer.json").unlink()
    (source / "model.pt").touch()
    result = stage("gs://public/gemma4/gemma")
    assert result.exit_code == 2
    assert "model.pt: got pickled files" in result.stderr
    assert "tokenizer.json: missing" in result.stderr
    assert not (google.mount / "models").exists()
