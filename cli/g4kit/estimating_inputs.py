"""Where an estimate gets what it goes by: the recipe, the staged model, the card or this machine, the prices."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from g4kit.cloud.base import Bucket
from g4kit.errors import UserError
from g4kit.estimating import Estimate, estimate, expected_samples, read_config, read_rows
from g4kit.machine import of_accelerator, this_machine
from g4kit.pricing import REGION, Table, Wanted, find_prices, missing_prices, price_table
from g4kit.variables import DEPLOYMENT
from g4trainer.limits import ACCELERATORS, machine_type, smallest_machine
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
    bucket: Bucket,
    recipe: Recipe,
    *,
    target: str | None,
    table: Table | None = None,
    region: str | None = None,
    machine_gpus: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Estimate:
    """For a target: `local` is this machine, where nothing is billed; `cloudrun` the deployment's own job.

    target: None takes the recipe's accelerator by the tables alone.
    table: None takes the project's own prices. region: None takes the deployment's, or without one REGION.
    machine_gpus: paid for, where they are more than work; None takes the recipe's.
    """
    here = target == "local"
    job = deployed_job(recipe, environ) if target == "cloudrun" else None
    if job:
        recipe = with_changes(recipe, [f"job.max_attempts={job.max_retries + 1}"])
    wanted = None if here else what_is_priced(recipe, job, region or region_of(target, environ))
    if wanted and machine_gpus:
        wanted = dataclasses.replace(wanted, gpus=machine_gpus)
    table = table or price_table(environ=environ)
    return estimate(
        recipe,
        read_config(bucket, recipe),
        this_machine() if here else of_accelerator(recipe.job.accelerator),
        prices=find_prices(wanted, table) if wanted else None,
        price_problem=missing_prices(wanted, table) if wanted else "",
        samples=expected_samples(recipe, read_rows(bucket, recipe)),
    )


def deployed_job(recipe: Recipe, environ: Mapping[str, str]) -> "GpuJob | None":
    """The deployment's job that has the recipe's accelerator: its CPU, memory and retries count. None without one."""
    from g4kit.deployment import read_deployment

    return next(iter(read_deployment(environ).jobs_with(recipe.job.accelerator)), None)


def region_of(target: str | None, environ: Mapping[str, str]) -> str:
    """Where a run of that target is billed: the deployment's region; without a deployment REGION, to have a figure."""
    from g4kit.deployment import read_deployment

    if target in (None, "local") and not environ.get(DEPLOYMENT):
        return REGION
    return read_deployment(environ).region


def what_is_priced(recipe: Recipe, job: "GpuJob | None", region: str) -> Wanted:
    """job: the deployment's own, whose CPU, memory and redundancy count; None takes the least of each."""
    own = recipe.job
    least = Wanted(own.accelerator, region, gpus=own.gpus, hosts=own.hosts, provisioning=own.provisioning)
    if job is None:
        return least
    redundancy = not job.gpu_zonal_redundancy_disabled
    return dataclasses.replace(least, cpu=job.cpu, memory_gib=job.memory_gib, zonal_redundancy=redundancy)


def compare_cards(
    bucket: Bucket, recipe: Recipe, *, table: Table | None = None, region: str = REGION
) -> list[tuple[str, Estimate]]:
    """For every accelerator that can be had with as many GPUs as the recipe asks for, at the prices of one region."""
    config, samples = read_config(bucket, recipe), expected_samples(recipe, read_rows(bucket, recipe))
    table = table or price_table()
    found = []
    for name in filter(lambda name: _can_be_had(name, recipe), ACCELERATORS):
        changed = with_changes(recipe, [f'job.accelerator="{name}"'])
        wanted = what_is_priced(changed, None, region)
        prices, problem = find_prices(wanted, table), missing_prices(wanted, table)
        card = of_accelerator(name)
        found.append((name, estimate(changed, config, card, prices=prices, price_problem=problem, samples=samples)))
    return found


def not_compared(recipe: Recipe) -> list[str]:
    """A line for each accelerator that `compare_cards` leaves out: what to ask for to have it."""
    machines = {name: smallest_machine(name) for name in ACCELERATORS if not _can_be_had(name, recipe)}
    return [
        f"{name}: a machine has {machine.gpus} of them or more; compare them by --set job.gpus={machine.gpus}"
        for name, machine in machines.items()
        if machine and machine.gpus > recipe.job.gpus
    ]


def _can_be_had(accelerator: str, recipe: Recipe) -> bool:
    """Whether a machine has as many of these GPUs as the recipe asks for on a host."""
    job, platforms = recipe.job, ACCELERATORS[accelerator].platforms
    return (job.gpus == 1 and "cloudrun" in platforms) or machine_type(accelerator, job.gpus // job.hosts) is not None
