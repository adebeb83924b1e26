"""g4kit stage model SOURCE --quantize nf4: the copy beside the model, by the real trainer, here and in the job."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

import made_up_model
from fakes.google_cloud import FakeGoogleCloud
from g4kit.cloud.local import TRAINER, LocalCloud
from g4kit.staging import stage as stage_model
from g4kit.staging import staged_problems

pytest.importorskip("torch", reason="needs the extra `train`")

SOURCE = "builtin:tiny-gemma4"
MODEL, COPY = "models/tiny-gemma4", "models/tiny-gemma4-nf4"
TOOLS = "g4kit-tools"
Stage = Callable[..., Result]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, staged."""
    root = tmp_path_factory.mktemp("root")
    staged = stage_model(LocalCloud(root).bucket, "model", SOURCE, None, trainer=TRAINER, say=lambda _: None)
    return root / staged.folder


def assert_copied(root: Path) -> None:
    bucket = LocalCloud(root).bucket
    assert staged_problems(bucket, COPY) == []
    base, copy = (json.loads((root / folder / "STAGED.json").read_text()) for folder in (MODEL, COPY))
    assert (copy["source"], copy["revision"]) == (f"{SOURCE} at NF4", base["revision"])
    assert len(copy["files"]) == len(base["files"]) + 1, "the index"


def test_on_this_machine(stage: Stage, tmp_path: Path, tiny: Path) -> None:
    """What a killed attempt left is finished, and then left alone."""
    root = tmp_path / "local"
    shutil.copytree(tiny, root / MODEL)
    half = root / COPY / "model-00001.safetensors"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"cut short")
    result = stage(SOURCE, "--quantize", "nf4", "--target", "local")
    assert (result.exit_code, result.stdout) == (0, f"{MODEL}\n{COPY}\n"), result.stderr
    assert "50 weights at NF4" in result.stderr, "the trainer's own words"
    assert_copied(root)
    before = half.stat().st_mtime_ns
    again = json.loads(stage(SOURCE, "--quantize", "nf4", "--target", "local", "--json").stdout)
    assert (again["folder"], again["already"]) == (MODEL, True)
    sizes = [path.stat().st_size for path in (root / COPY).iterdir() if path.name != "STAGED.json"]
    assert again["nf4"] == {"folder": COPY, "files": len(sizes), "size": sum(sizes), "already": True}
    assert half.stat().st_mtime_ns == before


def test_in_the_tools_job(stage: Stage, google: FakeGoogleCloud, tiny: Path) -> None:
    shutil.copytree(tiny, google.mount / MODEL)
    result = stage(SOURCE, "--quantize", "nf4", "--target", "cloudrun")
    assert (result.exit_code, result.stdout) == (0, f"{MODEL}\n{COPY}\n"), result.stderr
    [execution] = google.run.names
    assert execution.startswith(f"{TOOLS}-")
    started = google.run.started(execution)
    assert started is not None
    assert started.request.args == ("quantize", MODEL)
    assert_copied(google.mount)
    assert stage(SOURCE, "--quantize", "nf4", "--target", "cloudrun").exit_code == 0
    assert google.run.names == [execution]
    shard = google.mount / COPY / "model-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    google.run.jobs[TOOLS].hidden["G4KIT_ROOT"] = "/proc/no-mount"
    again = stage(SOURCE, "--quantize", "nf4", "--target", "cloudrun")
    assert f"{COPY} is incomplete: model-00001.safetensors: has checksum" in again.stderr
    assert len(google.run.names) == 2
    assert not (google.mount / COPY / "STAGED.json").exists(), "no run takes it before it is made again"


@pytest.mark.parametrize("target", ["cloudrun", "vertex"])
def test_a_job_that_fails_is_told(stage: Stage, google: FakeGoogleCloud, tiny: Path, target: str) -> None:
    shutil.copytree(tiny, google.mount / MODEL)
    google.run.jobs[TOOLS].hidden["G4KIT_ROOT"] = "/proc/no-mount"
    google.run.jobs[TOOLS].max_retries = 0
    result = stage(SOURCE, "--quantize", "nf4", "--target", target)
    assert result.exit_code == 2
    assert "quantize: models/tiny-gemma4: not staged" in result.stderr, "the job's own words"
    assert f"{COPY}: the job refused it; its last lines above say why" in result.stderr
    assert len(google.run.names) == 1


def test_a_model_that_is_quantized_already(stage: Stage, tmp_path: Path, google: FakeGoogleCloud) -> None:
    folder = made_up_model.write(tmp_path / "mine")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    result = stage(str(folder), "--quantize", "nf4", "--target", "cloudrun")
    assert result.exit_code == 2
    assert "error: --quantize: got models/mine, whose weights are quantized already (gptq)" in result.stderr
    assert google.run.names == []


def test_another_model_with_the_copys_name(stage: Stage, tmp_path: Path) -> None:
    other = made_up_model.write(tmp_path / "other")
    model = made_up_model.write(tmp_path / "mine")
    assert stage(str(other), "--name", "mine-nf4", "--target", "local").exit_code == 0
    result = stage(str(model), "--quantize", "nf4", "--target", "local")
    assert result.exit_code == 2
    assert f"error: models/mine-nf4: staged from {other}, got {model} at NF4; write another --name" in result.stderr


def test_without_the_trainer_nothing_is_staged(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made_up_model.write(tmp_path / "mine")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = stage(str(model), "--quantize", "nf4", "--target", "local")
    assert result.exit_code == 2
    assert "error: trainer: got a Python without torch; write: pip install 'g4kit[train]'" in result.stderr
    assert not (tmp_path / "local" / "models").exists()
