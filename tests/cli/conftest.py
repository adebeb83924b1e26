"""A bucket in a temporary folder, the stand-in trainer, and commands run in this process."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import made_up_model
from cli.bench import RECIPE, STANDIN, Bench
from contract.waiting import wait
from g4kit import following
from g4kit.cloud.local import LocalCloud
from g4kit.staging import stage
from g4trainer.hub import Kind


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the stand-in trainer take a tenth of a second."""
    monkeypatch.setattr(following, "INTERVAL_S", 0.1)


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Bench]:
    """Nothing staged."""
    made = Bench(tmp_path, LocalCloud(tmp_path / "root", command=STANDIN))
    made.recipe.write_text(RECIPE)
    yield made
    for execution in made.cloud.jobs.find():
        made.cloud.jobs.cancel(execution.name)
    for execution in made.cloud.jobs.find():
        wait(made.cloud, execution.name)


@pytest.fixture
def g4kit(bare: Bench) -> Bench:
    """With the model and the data of RECIPE staged."""
    sources = bare.folder / "sources"
    made_up_model.write(sources / "tiny-gemma4")
    (sources / "digits").mkdir()
    for split in ("train", "test"):
        (sources / "digits" / f"{split}.parquet").write_bytes(os.urandom(1000))
    staged: tuple[tuple[Kind, str], ...] = (("model", "tiny-gemma4"), ("data", "digits"))
    for kind, name in staged:
        stage(bare.cloud.bucket, kind, str(sources / name), name, trainer=(), say=lambda _: None)
    return bare


@pytest.fixture
def launched(g4kit: Bench) -> Callable[..., str]:
    """Launches RECIPE and waits for its execution's end; returns the run id."""

    def launch(plan: list[dict[str, Any]] | None = None, *arguments: str, ended: bool = True) -> str:
        result = g4kit("launch", g4kit.recipe, *arguments, plan=plan)
        assert result.exit_code == 0, result.stderr
        run_id = result.stdout.strip()
        if ended:
            for execution in g4kit.cloud.jobs.find(run_id):
                wait(g4kit.cloud, execution.name)
        return run_id

    return launch
