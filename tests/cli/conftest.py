"""A bucket in a temporary folder, the stand-in trainer, and commands run in this process."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from contract.waiting import wait
from g4kit.cloud.local import LocalCloud
from g4kit.main import cli
from g4kit.staging import stage

STANDIN = (sys.executable, str(Path(__file__).with_name("standin_trainer.py")))
RECIPE = """\
name = "tiny"
[model]
id = "tiny-gemma4"
[data]
dataset = "digits"
[job]
accelerator = "nvidia-l4"
timeout_s = 60
max_attempts = 2
"""


@dataclass
class Bench:
    """What a test of the command line works with."""

    folder: Path
    cloud: LocalCloud

    @property
    def root(self) -> Path:
        return self.cloud.bucket.root

    @property
    def recipe(self) -> Path:
        return self.folder / "tiny.toml"

    def environ(self, plan: list[dict[str, Any]] | None = None) -> dict[str, str]:
        """Environment of a command; plan: what the stand-in trainer does, see standin_trainer.py."""
        own = {"G4KIT_ROOT": str(self.root), "G4KIT_TRAINER": " ".join(STANDIN)}
        return own | ({"STANDIN_PLAN": json.dumps(plan)} if plan else {})

    def __call__(
        self, *arguments: str | Path, plan: list[dict[str, Any]] | None = None, env: dict[str, str] | None = None
    ) -> Result:
        """Runs a command. An exception that is no exit would be a traceback: it is raised here."""
        result = CliRunner().invoke(
            cli, [str(argument) for argument in arguments], env=self.environ(plan) | (env or {})
        )
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    def files(self) -> list[str]:
        """Every file below the root, but for the target's own."""
        paths = (path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file())
        return sorted(path.as_posix() for path in paths if path.parts[0] != "local")


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
    for kind, name, file in (("model", "tiny-gemma4", "model.safetensors"), ("data", "digits", "train.parquet")):
        source = bare.folder / "sources" / name
        source.mkdir(parents=True)
        (source / file).write_bytes(os.urandom(1000))
        (source / "config.json").write_text("{}")
        stage(bare.cloud.bucket, kind, str(source), name, trainer=(), say=lambda _: None)
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
