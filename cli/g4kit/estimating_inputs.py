"""Where an estimate gets what it goes by: the recipe, the staged model, the card or this machine, the prices."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from g4kit.cloud.base import Bucket
from g4kit.errors import UserError
from g4kit.estimating import Estimate, estimate, expected_samples, read_config
from g4kit.machine import of_accelerator, this_machine
from g4kit.pricing import Prices, prices_of
from g4trainer.limits import ACCELERATORS
from g4trainer.planner import with_changes
from g4trainer.recipe import Recipe, RecipeError, load_recipe

if TYPE_CHECKING:
    from g4kit.deployment import GpuJob


def load(path: Path, overrides: tuple[str, ...]) -> Recipe:
    """Raises UserError with every problem of the recipe."""
    try:
        return load_recipe(path, overrides)
    except RecipeError as error:
        raise UserError(str(error)) from error


def estimate_for(
    bucket: Bucket, recipe: Recipe, *, target: str | None, environ: Mapping[str, str] = os.environ
) -> Estimate:
    """For a target: `local` is this machine, where nothing is billed; `cloudrun` the deployment's own job.

    target: None takes the recipe's accelerator by the tables alone.
    """
    here = target == "local"
    job = deployed_job(recipe, environ) if target == "cloudrun" else None
    if job:
        recipe = with_changes(recipe, [f"job.max_attempts={job.max_retries + 1}"])
    return estimate(
        recipe,
        read_config(bucket, recipe),
        this_machine() if here else of_accelerator(recipe.job.accelerator),
        prices=None if here else _prices(recipe, job),
        samples=expected_samples(recipe),
    )


def deployed_job(recipe: Recipe, environ: Mapping[str, str]) -> "GpuJob | None":
    """The deployment's job that has the recipe's accelerator: its CPU, memory and retries count. None without one."""
    from g4kit.deployment import read_deployment

    return next(iter(read_deployment(environ).jobs_with(recipe.job.accelerator)), None)


def _prices(recipe: Recipe, job: "GpuJob | None") -> Prices | None:
    if job is None:
        return prices_of(recipe.job.accelerator)
    return prices_of(
        job.accelerator,
        cpu=job.cpu,
        memory_gib=job.memory_gib,
        zonal_redundancy=not job.gpu_zonal_redundancy_disabled,
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
