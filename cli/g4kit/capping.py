"""The cap on a run's cost over all its executions: what is spent, and what the next one may use."""

import math
import os
from collections.abc import Sequence

from g4kit.billing import read_bill
from g4kit.budget import (
    BudgetError,
    Limits,
    attempt_at_worst_s,
    least_usd,
    least_useful_s,
    within_budget,
)
from g4kit.cloud.base import Cloud
from g4kit.estimating import Estimate
from g4kit.estimating_inputs import deployed_job
from g4kit.launches import Launch
from g4kit.pricing import MINIMUM_S
from g4trainer.deadline import ATTEMPTS_VARIABLE
from g4trainer.planner import with_changes
from g4trainer.recipe import FrozenRecipe, Recipe


def cap_of(frozen: FrozenRecipe, launches: Sequence[Launch], max_cost: float | None) -> float | None:
    """USD that all executions of a run may cost together: as stated now, else by its newest launch that says one."""
    stated = [max_cost, *(launch.max_cost_usd for launch in reversed(launches))]
    first = (frozen.prices or {}).get("max_cost_usd")
    return next((usd for usd in (*stated, first) if usd is not None), None)


def limits_of_first(estimate: Estimate, target: str, max_cost: float, *, runs: int = 1) -> Limits:
    """What each of so many runs may use that share a cap, before anything is spent.

    Raises BudgetError where the cap leaves too little, or no price is known.
    """
    if estimate.prices is None:
        raise BudgetError(f"--max-cost: got {max_cost:g}, which cannot hold: {estimate.price_problem}.")
    second, least_s = estimate.prices.second, least_useful_s(estimate.time)
    timeout_s, attempts = estimate.recipe.job.timeout_s, estimate.recipe.job.max_attempts
    fewer = target != "cloudrun"  # there retries are the job's own and cannot be overridden
    try:
        return within_budget(
            second,
            max_cost / runs,
            timeout_s=timeout_s,
            max_attempts=attempts,
            fewer_attempts=fewer,
            least_s=least_s,
        )
    except BudgetError as error:
        least = runs * least_usd(second, timeout_s, attempts, fewer_attempts=fewer, least_s=least_s)
        each = f" of each of {runs} runs" if runs > 1 else ""
        raise BudgetError(f"--max-cost: got {max_cost:g}, and {error}{each}; write at least {least:.2f}.") from error


def under_limits(recipe: Recipe, limits: Limits | None) -> Recipe:
    """The recipe with its timeout and attempts as the limits have them; as it is without."""
    if limits is None:
        return recipe
    return with_changes(recipe, [f"job.timeout_s={limits.timeout_s}", f"job.max_attempts={limits.attempts}"])


def environment_of(frozen: FrozenRecipe, recipe: Recipe, limits: Limits | None = None) -> dict[str, str]:
    """What tells the trainer how many attempts may work, where a cap limits them. recipe: as it is launched."""
    capped = limits is not None or "max_cost_usd" in (frozen.prices or {})
    return {ATTEMPTS_VARIABLE: str(recipe.job.max_attempts)} if capped else {}


def limits_of_next_sweep(cloud: Cloud, runs: Sequence[FrozenRecipe]) -> Limits | None:
    """What each of some runs of a sweep may use in an execution that they share: no more than any of them alone.

    None where no cap was given, or nothing is billed. Raises BudgetError as limits_of_next does.
    """
    caps = [(frozen, cap_of(frozen, [], None)) for frozen in runs]
    found = [limits_of_next(cloud, frozen, [], cap) for frozen, cap in caps if cap is not None]
    each = [limits for one in found if one is not None for limits in one[:1]]
    if not each:
        return None
    timeout_s, attempts = min(one.timeout_s for one in each), min(one.attempts for one in each)
    return Limits(timeout_s, attempts, sum(one.worst_usd for one in each))


def limits_of_next(
    cloud: Cloud, frozen: FrozenRecipe, launches: Sequence[Launch], cap_usd: float
) -> tuple[Limits, float] | None:
    """What the next execution may use, and the USD spent so far; None where nothing is billed.

    Raises BudgetError, with the command that goes on, where what is left pays no attempt that gets anywhere.
    """
    if frozen.target == "local":
        return None
    run_id, prices = frozen.run_id, frozen.prices
    if prices is None:
        raise BudgetError(
            f"run {run_id}: --max-cost cannot hold, for no price was known at its launch; resume it without, or launch "
            "it anew with --price-table."
        )
    second, job = float(prices["usd_a_second"]), frozen.recipe.job
    asked = prices.get("asked") or {"timeout_s": job.timeout_s, "max_attempts": job.max_attempts}
    attempts, fewer = _attempts(frozen, asked["max_attempts"])
    spent = spent_usd(cloud, frozen, launches)
    try:
        limits = within_budget(
            second,
            cap_usd - spent,
            timeout_s=asked["timeout_s"],
            max_attempts=attempts,
            fewer_attempts=fewer,
            least_s=prices.get("least_attempt_s", MINIMUM_S),
        )
    except BudgetError as error:
        whole = least_usd(
            second, asked["timeout_s"], attempts, fewer_attempts=fewer, least_s=max(asked["timeout_s"], MINIMUM_S)
        )
        raise BudgetError(
            f"run {run_id}: ${spent:.2f} of --max-cost {cap_usd:g} is spent, and {error}: nothing was started. "
            f"To go on: g4kit resume {run_id} --max-cost {math.ceil(100 * (spent + whole)) / 100:g}"
        ) from error
    return limits, spent


def spent_usd(cloud: Cloud, frozen: FrozenRecipe, launches: Sequence[Launch]) -> float:
    """Never too little: the most that an execution's times allow, but no more than its own limits did.

    Of an execution that nobody remembers, every attempt counts until its timeout.
    """
    prices = frozen.prices or {}
    second, first = float(prices["usd_a_second"]), prices.get("limits")
    worst = {one.execution: one.limits.worst_usd for one in launches if one.limits}
    if first and launches:
        worst.setdefault(launches[0].execution, first["worst_usd"])
    known = {one.execution: one.at_most_s * second for one in read_bill(cloud, frozen.run_id).executions}
    attempts = _attempts(frozen, frozen.recipe.job.max_attempts)[0]
    forgotten = {
        one.execution: attempts * attempt_at_worst_s(frozen.recipe.job.timeout_s) * second
        for one in launches
        if one.execution and one.execution not in known
    }
    return sum(min(usd, worst.get(name, usd)) for name, usd in (known | forgotten).items())


def _attempts(frozen: FrozenRecipe, asked: int) -> tuple[int, bool]:
    """Attempts that an execution has, and whether it may have fewer: on Cloud Run they are the job's own."""
    if frozen.target != "cloudrun":
        return asked, True
    job = deployed_job(frozen.recipe, os.environ)
    return (job.max_retries + 1 if job else asked), False
