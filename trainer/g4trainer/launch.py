"""Makes a run from a recipe: recipe.json, and the whole run directory where no command line does."""

import datetime
import hashlib
import os
from pathlib import Path
from typing import Any

from g4trainer import __version__
from g4trainer.recipe import FrozenRecipe, Recipe, load_recipe
from g4trainer.rundir import RunDir, create_json, new_run_id, read_json


def make_run(recipe_path: Path, root: Path, *, target: str = "trainer") -> Path:
    """Validates a recipe and freezes it into a new run directory under `root/runs`; returns its path.

    A retried attempt of the same Cloud Run task finds the run directory that the first one made.
    Raises RecipeError where the recipe is wrong.
    """
    recipe = load_recipe(recipe_path)
    task = cloud_run_task()
    earlier = _run_of(root, recipe.name, task) if task else None
    if earlier:
        return earlier
    run_id = new_run_id(recipe.name, token=_token(task) if task else None)
    run = RunDir(root / "runs" / run_id)
    create_json(run.recipe, freeze(recipe, run_id, target=target).model_dump(mode="json"))
    if task:
        time = _now()
        create_json(run.launches / "0001.json", {"target": target, "launch_id": task, "time": time})
        create_json(run.launches / "0001.started.json", {"execution": task.partition("/")[0], "time": time})
    return run.path


def freeze(recipe: Recipe, run_id: str, *, target: str, **more: Any) -> FrozenRecipe:
    """The `recipe.json` of a new run, for the command line too. more: fields of FrozenRecipe that a target knows."""
    return FrozenRecipe(
        run_id=run_id,
        recipe=recipe,
        recipe_hash=recipe.hash,
        created_at=_now(),
        g4kit_version=__version__,
        target=target,
        **more,
    )


def cloud_run_task() -> str | None:
    """`<execution>/<task index>` of this Cloud Run task, the same for all its attempts; None elsewhere."""
    execution = os.environ.get("CLOUD_RUN_EXECUTION")
    return f"{execution}/{os.environ.get('CLOUD_RUN_TASK_INDEX', '0')}" if execution else None


def _run_of(root: Path, recipe_name: str, task: str) -> Path | None:
    """The run directory that an earlier attempt of this task made. Its id ends with a token of the task's name."""
    for path in sorted((root / "runs").glob(f"{recipe_name}-*-{_token(task)}")):
        intent = path / "launches" / "0001.json"
        if intent.exists() and read_json(intent)["launch_id"] == task:
            return path
    return None


def _token(task: str) -> str:
    return hashlib.sha256(task.encode()).hexdigest()[:4]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
