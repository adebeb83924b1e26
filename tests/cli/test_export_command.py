"""`g4kit export` on the local target. The trainer is the stand-in; what it merges is tested in tests/trainer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.bench import Bench
from g4trainer.rundir import manifest

Launched = Callable[..., str]


def test_the_adapter_alone(g4kit: Bench, launched: Launched, tmp_path: Path) -> None:
    run_id, out = launched(), tmp_path / "adapter"
    told = g4kit("export", run_id, "--format", "adapter", "--out", out, "--json")
    assert told.exit_code == 0, told.stderr
    document = json.loads(told.stdout)
    assert sorted(document["files"]) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert manifest(out, leave_out=frozenset({"EXPORTED.json"})) == document["files"]
    there = g4kit.root / "runs" / run_id / "adapter" / "adapter_model.safetensors"
    assert (out / "adapter_model.safetensors").read_bytes() == there.read_bytes()
    card = (out / "README.md").read_text()
    assert "PeftModel.from_pretrained(model, FOLDER)" in card
    assert "base_model_relation: adapter" in card
    again = g4kit("export", run_id, "--format", "adapter", "--out", out)
    assert again.exit_code == 0
    assert "exported already" in again.stderr


def test_a_merged_model(
    g4kit: Bench, launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_id = launched()
    told = g4kit("export", run_id, "--onto", "nf4")
    assert (told.exit_code, told.stdout) == (0, f"{run_id}-merged\n"), told.stderr
    assert f"how to serve it: {run_id}-merged/README.md" in told.stderr
    assert json.loads((tmp_path / f"{run_id}-merged" / "EXPORTED.json").read_text())["base"]["weights"] == "nf4"
    failed = g4kit("export", run_id, "--out", "other", env={"STANDIN_EXPORT_FAILS": "1"})
    assert failed.exit_code == 1
    assert "was not exported; the lines above say why" in failed.stderr
    assert "the base model is damaged" in capfd.readouterr().err


def test_a_run_without_an_adapter_is_refused(g4kit: Bench, launched: Launched, tmp_path: Path) -> None:
    run_id = launched([{"steps": 3, "exit": 2}])
    for kind in ("merged", "adapter"):
        told = g4kit("export", run_id, "--format", kind, "--out", tmp_path / "out")
        assert told.exit_code == 2
        assert f"run {run_id}: has no adapter yet" in told.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(g4kit: Bench, launched: Launched, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    told = g4kit("export", launched(), "--format", "adapter", "--out", tmp_path / "mine")
    assert told.exit_code == 2
    assert "mine, which is not empty (notes.txt); write an empty or missing folder" in told.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_damaged_bytes_are_not_exported(g4kit: Bench, launched: Launched, tmp_path: Path) -> None:
    run_id = launched()
    (g4kit.root / "runs" / run_id / "adapter" / "adapter_config.json").write_text("{}")
    told = g4kit("export", run_id, "--format", "adapter", "--out", tmp_path / "out")
    assert told.exit_code == 1
    assert "adapter_config.json: damaged" in told.stderr
    assert not (tmp_path / "out" / "EXPORTED.json").exists()
