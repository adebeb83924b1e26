"""The image is built and run for real: as its own user, with a read-only root and without network, it trains.

IMAGE_BUILDER names a script for machines without a Docker engine: SCRIPT CONTEXT [--build-option=...]
[--run-option=...] -- ARGUMENT... builds the context and runs the image like that. With Docker it is not needed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from infra.terraform_cli import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

TAG = "localhost/g4trainer:test"
DOCKER = shutil.which("docker")
Run = Callable[..., "subprocess.CompletedProcess[str]"]

PROBE = """
import json, os, pathlib, shutil, socket
def refused(action):
    try:
        action()
    except OSError:
        return True
    return False
print(json.dumps({
    "user": [os.getuid(), os.getgid()],
    "root_is_read_only": refused(lambda: pathlib.Path("/opt/g4kit/probe").write_text("x")),
    "tmp_is_writable": not refused(lambda: pathlib.Path("/tmp/probe").write_text("x")),
    "no_network": refused(lambda: socket.create_connection(("192.0.2.1", 443), timeout=3)),
    "compilers": [name for name in ("gcc", "g++", "make", "git") if shutil.which(name)],
    "python_headers": any(pathlib.Path("/usr/local/include").glob("python3.11/Python.h")),
    "secrets": [name for name in os.environ if any(word in name for word in ("TOKEN", "KEY", "PASSWORD", "SECRET"))],
    "tests_in_image": pathlib.Path("/opt/g4kit/tests").exists(),
}))
"""


@pytest.fixture(scope="module")
def run() -> Run:
    """Returns a function that runs the image, built from the Dockerfile as it is."""
    builder = os.environ.get("IMAGE_BUILDER")
    if builder:
        build = [builder, str(ROOT), "--build-option=--build-arg=TORCH=local", f"--tag={TAG}"]
        # It builds before it runs, from its cache when nothing changed.
        return lambda *arguments, options=(): must([*build, *(f"--run-option={o}" for o in options), "--", *arguments])
    if DOCKER is None or subprocess.run([DOCKER, "info"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker engine answers, and IMAGE_BUILDER names no builder")
    must([DOCKER, "build", "--tag", TAG, str(ROOT)])
    start = [DOCKER, "run", "--rm", "--network=none", "--read-only", "--tmpfs=/tmp"]
    return lambda *arguments, options=(): must([*start, *options, TAG, *arguments])


def must(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}\n{done.stderr[-5000:]}"
    return done


def test_the_image_is_locked_down(run: Run) -> None:
    assert json.loads(run("-c", PROBE, options=["--entrypoint=python"]).stdout) == {
        "user": [10001, 10001],
        "root_is_read_only": True,
        "tmp_is_writable": True,
        "no_network": True,
        "compilers": ["gcc"],
        "python_headers": True,
        "secrets": [],
        "tests_in_image": False,
    }


def test_the_selftest_trains_in_the_image(run: Run) -> None:
    assert "selftest: passed" in run("selftest").stdout


def test_a_mounted_run_directory_is_trained_to_its_results(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "bucket"
    make_run(root, "smoke")
    for path in [root, *root.rglob("*")]:
        os.chown(path, 10001, 10001)  # as the bucket's mount options do

    run("run", "/mnt/gcs/runs/smoke", options=[f"--volume={root}:/mnt/gcs", "--env=G4KIT_ROOT=/mnt/gcs"])

    folder = root / "runs/smoke"
    results = json.loads((folder / "results.json").read_text())
    assert results["state"] == "succeeded"
    assert results["train"]["steps"] == 4
    assert 0 <= results["final"]["accuracy"] <= 1
    assert {path.stat().st_uid for path in folder.rglob("*") if path.is_file()} == {10001}
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "status.json"} <= written
    assert set(results["artifacts"]) <= written


def make_run(root: Path, run_id: str) -> None:
    """Stages the embedded model and data, and makes a run directory as a launch does."""
    from g4trainer import torchvision_operators

    torchvision_operators.declare()
    from g4trainer import tiny
    from g4trainer.launch import freeze
    from g4trainer.recipe import Recipe
    from g4trainer.rundir import RunDir, create_json
    from g4trainer.selftest import mark_staged

    tiny.write_model(root / "models/tiny-gemma4")
    tiny.write_digits(root / "datasets/digits")
    for folder in (root / "models/tiny-gemma4", root / "datasets/digits"):
        mark_staged(folder, source="builtin")
    recipe = Recipe.model_validate(
        {
            "name": "smoke",
            "model": {"id": "tiny-gemma4", "max_soft_tokens": 70},
            "data": {"dataset": "digits", "prompt": "Which digit is it?", "train_size": 36, "test_size": 8},
            "training": {"learning_rate": 2e-3, "num_train_epochs": 2, "effective_batch_size": 16},
        }
    )
    create_json(RunDir(root / "runs" / run_id).recipe, freeze(recipe, run_id, target="trainer").model_dump(mode="json"))
