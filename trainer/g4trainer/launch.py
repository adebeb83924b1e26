"""Makes a run directory from a recipe, for runs that are started without the command line."""

import datetime
from pathlib import Path

from g4trainer import __version__
from g4trainer.recipe import FrozenRecipe, Recipe, load_recipe
from g4trainer.rundir import RunDir, create_json, new_run_id


def make_run(recipe_path: Path, root: Path, *, target: str = "trainer") -> Path:
    """Validates a recipe and freezes it into a new run directory under `root/runs`; returns its path.

    Raises RecipeError where the recipe is wrong.
    """
    recipe = load_recipe(recipe_path)
    run_id = new_run_id(recipe.name)
    run = RunDir(root / "runs" / run_id)
    create_json(run.recipe, freeze(recipe, run_id, target=target).model_dump(mode="json"))
    return run.path


def freeze(recipe: Recipe, run_id: str, *, target: str) -> FrozenRecipe:
    """The `recipe.json` of a new run."""
    return FrozenRecipe(
        run_id=run_id,
        recipe=recipe,
        recipe_hash=recipe.hash,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        g4kit_version=__version__,
        target=target,
    )
