"""`g4kit export` on the fakes: one execution merges into the bucket, and its result is copied here, checked."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fakes.google_cloud import FakeGoogleCloud
from g4kit import exporting
from g4kit.main import cli

Call = Callable[..., Result]


@pytest.fixture
def google(standins: FakeGoogleCloud) -> FakeGoogleCloud:
    return standins


@pytest.fixture
def run_id(staged: Call, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(exporting, "POLL_S", 0.1)
    return staged("launch", "tiny.toml", "--wait", "--yes").stdout.strip()


def test_a_merged_model_comes_back_whole(call: Call, google: FakeGoogleCloud, run_id: str, tmp_path: Path) -> None:
    told = call("export", run_id, "--out", "merged", "--yes")
    assert told.exit_code == 0, told.stderr
    there = google.mount / "runs" / run_id / "export"
    started = google.run.started(google.run.names[1])
    assert started is not None
    assert started.template["containers"][0]["args"][:4] == ["export", str(there.parent), "--out", str(there)]
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "merged" / name).read_bytes() == (there / name).read_bytes()
    assert json.loads((tmp_path / "merged" / "EXPORTED.json").read_text())["run_id"] == run_id
    assert "USD an hour" in told.stderr
    again = call("export", run_id, "--out", "again")
    assert again.exit_code == 0, again.stderr
    assert len(google.run.names) == 2, "what is in the bucket is not merged again"
    fetched = call("fetch", run_id, "--only", "export", "--out", "fetched")
    assert fetched.exit_code == 0, fetched.stderr
    assert (tmp_path / "fetched" / "export" / "model.safetensors").exists()
    assert call("fetch", run_id, "--out", "all").exit_code == 0
    assert not (tmp_path / "all" / "export").exists(), "62 GB are copied only when they are asked for"
    other = call("export", run_id, "--out", "other", "--onto", "nf4", "--yes")
    assert other.exit_code == 0, other.stderr
    assert (there.parent / "export-nf4" / "EXPORTED.json").exists()


def test_without_an_export_there_is_none_to_fetch(call: Call, run_id: str) -> None:
    told = call("fetch", run_id, "--only", "export")
    assert told.exit_code == 2
    assert f"write: g4kit export {run_id}" in told.stderr


def test_a_failure_is_told(call: Call, google: FakeGoogleCloud, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_EXPORT_FAILS", "1")
    told = call("export", run_id, "--out", "merged", "--yes")
    assert told.exit_code == 1
    assert "the base model is damaged" in told.stderr
    assert not Path("merged").exists()


def test_ctrl_c_leaves_the_export_going_and_the_same_command_comes_back(
    call: Call,
    google: FakeGoogleCloud,
    run_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STANDIN_EXPORT_S", "1.5")

    def interrupt() -> None:
        while len(google.run.names) < 2:
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), 2)

    threading.Thread(target=interrupt, daemon=True).start()
    left = CliRunner().invoke(cli, ["export", run_id, "--out", "merged", "--yes"])
    assert left.exit_code == 130
    assert "left; what was begun goes on: the same command comes back to it" in left.stderr
    back = call("export", run_id, "--out", "merged")
    assert back.exit_code == 0, back.stderr
    assert len(google.run.names) == 2
    assert Path("merged/EXPORTED.json").exists()
