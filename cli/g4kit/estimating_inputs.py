"""Where an estimate gets what it goes by: the recipe, the staged model, the card or this machine, the prices."""

from pathlib import Path

from g4kit.cloud.base import Bucket
from g4kit.errors import UserError
from g4kit.estimating import Estimate, estimate, expected_samples, read_config
from g4kit.machine import of_accelerator, this_machine
from g4kit.pricing import prices_of
from g4trainer.limits import ACCELERATORS
from g4trainer.planner import with_changes
from g4trainer.recipe import Recipe, RecipeError, load_recipe


def load(path: Path, overrides: tuple[str, ...]) -> Recipe:
    """Raises UserError with every problem of the recipe."""
    try:
        return load_recipe(path, overrides)
    except RecipeError as error:
        raise UserError(str(error)) from error


def estimate_for(bucket: Bucket, recipe: Recipe, *, on_this_machine: bool) -> Estimate:
    """For the recipe's accelerator, or for this machine, where nothing is billed."""
    return estimate(
        recipe,
        read_config(bucket, recipe),
        this_machine() if on_this_machine else of_accelerator(recipe.job.accelerator),
        prices=None if on_this_machine else prices_of(recipe.job.accelerator),
        samples=expected_samples(recipe),
    )


def compare_cards(bucket: Bucket, recipe: Recipe) -> list[tuple[str, Estimate]]:
    """For every accelerator that can have as many GPUs as the recipe asks for, by name."""
    config, samples = read_config(bucket, recipe), expected_samples(recipe)
    names = [name for name, gpu in ACCELERATORS.items() if recipe.job.gpus == 1 or "vertex" in gpu.platforms]
    return [
        (
            name,
            estimate(
                with_changes(recipe, [f'job.accelerator="{name}"']),
                config,
                of_accelerator(name),
                prices=prices_of(name),
                samples=samples,
            ),
        )
        for name in names
    ]
