"""Asking before one execution is paid for that does something other than training."""

import dataclasses
import os

import click

from g4kit.cloud.base import Cloud
from g4kit.estimating_inputs import deployed_job, region_of, what_is_priced
from g4kit.one_gpu import OneGpu
from g4kit.output import say
from g4kit.pricing import MINIMUM_S, find_prices, price_table


def confirm_execution(cloud: Cloud, where: OneGpu, *, yes: bool) -> None:
    """Says what an execution on the one GPU costs, and asks unless `yes`. Nothing on the local target.

    Raises click.Abort where the user declines.
    """
    if cloud.target == "local":
        return
    recipe = where.recipe
    job = deployed_job(recipe, os.environ) if cloud.target == "cloudrun" else None
    wanted = what_is_priced(recipe, job, region_of(cloud.target, os.environ))
    prices = find_prices(dataclasses.replace(wanted, gpus=where.gpus), price_table())
    price = f"{prices.hour:.2f} USD an hour, billed for {MINIMUM_S} s at least" if prices else "a price not known here"
    say(f"one execution on {recipe.job.accelerator}: {price}{where.note}")
    if not yes:
        click.confirm("start it?", abort=True, err=True)
