"""Starting runs: decided as a plan, then written create-only, so that nothing is ever started twice."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g4kit.budget import describe as describe_limits
from g4kit.capping import cap_of, environment_of, limits_of_first, limits_of_next, under_limits
from g4kit.cloud.base import Bucket, Cloud, Execution, JobRequest, ObjectNotFoundError, PreconditionError
from g4kit.errors import UserError
from g4kit.estimating import PUBLISHED, Estimate
from g4kit.launches import Launch, read_launches, write_intent, write_started
from g4kit.runs import (
    DamagedError,
    executions_of,
    not_found,
    read_document,
    read_run,
    require_here,
    run_folder,
    sweep_folder,
)
from g4kit.staging import BUILTIN, staged_problems
from g4trainer.hub import Kind
from g4trainer.launch import freeze
from g4trainer.recipe import FrozenRecipe, Recipe, RecipeError, SweepPlace, load_recipe
from g4trainer.rundir import new_run_id
from g4trainer.staging import FOLDERS


class LaunchError(UserError):
    """A run that cannot be started as asked."""


@dataclass(frozen=True)
class LaunchPlan:
    """What `launch` would do."""

    run_id: str
    recipe: Recipe
    target: str
    path: str
    """The run directory as the job sees it."""
    prices: dict[str, Any] | None = None
    """Frozen into recipe.json, with the estimate and the cap on the cost; None where nothing is billed."""
    sweep: SweepPlace | None = None
    """Where in a sweep the run belongs."""
    image: str | None = None
    """What the job runs, by its digest; None on this machine."""


def plan_launch(cloud: Cloud, recipe_path: Path, overrides: tuple[str, ...], run_id: str | None) -> LaunchPlan:
    """Reads and checks everything, writes nothing. Raises LaunchError with all problems."""
    try:
        recipe = load_recipe(recipe_path, overrides)
    except RecipeError as error:
        raise LaunchError(str(error)) from error
    run_id = run_id or new_run_id(recipe.name)
    plan = LaunchPlan(run_id, recipe, cloud.target, cloud.bucket.job_path(run_folder(run_id)))
    problems = [
        *_name_problems(cloud.bucket, run_id),
        *staging_problems(cloud.bucket, recipe),
        *cloud.jobs.problems(run_request(plan.run_id, "none", plan.path, recipe)),
    ]
    if problems:
        raise LaunchError("\n".join(problems))
    return dataclasses.replace(plan, image=cloud.jobs.image(recipe.job.accelerator))


def priced(plan: LaunchPlan, estimate: Estimate, max_cost: float | None, *, runs: int = 1) -> LaunchPlan:
    """The plan with its prices; with a cap on the cost, its timeout and attempts lowered until the worst is within.

    runs: how many such runs share the cap. Raises BudgetError where the cap leaves too little, or no price is known.
    """
    if max_cost is None or plan.target == "local":
        return dataclasses.replace(plan, prices=estimate.frozen(max_cost))
    job = plan.recipe.job
    limits = limits_of_first(estimate, plan.target, max_cost, runs=runs)
    capped = under_limits(plan.recipe, limits)
    asked = {"timeout_s": job.timeout_s, "max_attempts": job.max_attempts}
    frozen = (estimate.frozen(max_cost / runs) or {}) | {"asked": asked, "limits": dataclasses.asdict(limits)}
    return dataclasses.replace(plan, recipe=capped, prices=frozen)


def launch(cloud: Cloud, plan: LaunchPlan) -> Execution:
    """Writes the run directory and starts it; a run that is there with the same recipe is returned, or started.

    Raises LaunchError where the id belongs to a run with another recipe.
    """
    write_run(cloud.bucket, plan)
    launches = read_launches(cloud.bucket, run_folder(plan.run_id))
    if launches and launches[-1].execution:
        return cloud.jobs.get(launches[-1].execution)
    intent = launches[-1] if launches else write_intent(cloud, run_folder(plan.run_id), 1)
    if intent is None:  # another process launches the same run right now: both get its one execution
        intent = read_launches(cloud.bucket, run_folder(plan.run_id))[-1]
    return _start(cloud, plan.run_id, intent)


def write_run(bucket: Bucket, plan: LaunchPlan) -> None:
    """recipe.json of a new run. Raises LaunchError where the id belongs to a run with another recipe."""
    frozen = freeze(
        plan.recipe,
        plan.run_id,
        target=plan.target,
        prices=plan.prices,
        sweep=plan.sweep,
        image_digest=plan.image,
    )
    document = (frozen.model_dump_json(indent=2) + "\n").encode()
    try:
        bucket.write(f"{run_folder(plan.run_id)}/recipe.json", document, if_generation_match=0)
    except PreconditionError:
        _refuse_another_recipe(bucket, plan)


def resume(
    cloud: Cloud, run_id: str, *, max_cost: float | None = None, say: Callable[[str], None] = lambda _: None
) -> Execution:
    """Starts another execution of an unfinished run.

    max_cost: USD that all executions of the run may cost together, in place of what its launch said.
    Raises RunNotFoundError, ElsewhereError, LaunchError where the run goes on or has finished, BudgetError where its
    cost is capped and what is left does not do.
    """
    require_here(cloud, run_id)
    if any(execution.active for execution in executions_of(cloud, run_id)):
        raise LaunchError(f"run {run_id}: is going on; wait for it, or write: g4kit cancel {run_id}")
    if read_run(cloud, run_id).state == "succeeded":
        raise LaunchError(f"run {run_id}: has finished; write: g4kit fetch {run_id}")
    launches = read_launches(cloud.bucket, run_folder(run_id))
    begun = launches[-1] if launches and launches[-1].execution is None else None
    intent = begun or _next_intent(cloud, run_id, launches, max_cost, say)
    if intent is None:
        raise LaunchError(f"run {run_id}: another process has just resumed it; write: g4kit runs {run_id}")
    with contextlib.suppress(ObjectNotFoundError):  # there only if a retry could not help
        cloud.bucket.delete(f"{run_folder(run_id)}/failed.json")
    return _start(cloud, run_id, intent)


def _next_intent(
    cloud: Cloud, run_id: str, launches: list[Launch], max_cost: float | None, say: Callable[[str], None]
) -> Launch | None:
    """None where another process has written it first. Raises BudgetError."""
    frozen = read_frozen(cloud, run_id)
    cap = cap_of(frozen, launches, max_cost)
    found = None if cap is None else limits_of_next(cloud, frozen, launches, cap)
    if found is None:
        return write_intent(cloud, run_folder(run_id), len(launches) + 1)
    limits, spent = found
    say(f"${spent:.2f} of --max-cost {cap:g} is spent: {describe_limits(dataclasses.asdict(limits))}")
    return write_intent(cloud, run_folder(run_id), len(launches) + 1, limits=limits, max_cost_usd=cap)


def _start(cloud: Cloud, run_id: str, intent: Launch) -> Execution:
    """Idempotent: whoever finishes a launch that someone else began gets the same execution."""
    frozen = read_frozen(cloud, run_id)
    path = cloud.bucket.job_path(run_folder(run_id))
    recipe = under_limits(frozen.recipe, intent.limits)
    env = environment_of(frozen, recipe, intent.limits)
    execution = cloud.jobs.run(run_request(run_id, intent.launch_id, path, recipe, env))
    write_started(cloud.bucket, run_folder(run_id), intent, execution)
    return execution


def run_request(
    run_id: str, launch_id: str, path: str, recipe: Recipe, env: Mapping[str, str] | None = None
) -> JobRequest:
    """One task that trains. path: of the run directory, as the job sees it."""
    return JobRequest(
        run_id=run_id,
        launch_id=launch_id,
        args=("run", path),
        timeout_s=recipe.job.timeout_s,
        max_attempts=recipe.job.max_attempts,
        accelerator=recipe.job.accelerator,
        gpus=recipe.job.gpus,
        hosts=recipe.job.hosts,
        provisioning=recipe.job.provisioning,
        max_wait_s=recipe.job.max_wait_s,
        env=env or {},
    )


def _name_problems(bucket: Bucket, run_id: str) -> list[str]:
    taken = read_document(bucket, f"{sweep_folder(run_id)}/sweep.json") is not None
    return [f"--id: got {run_id}, which is a sweep's; write another, or leave it out."] if taken else []


def staging_problems(bucket: Bucket, recipe: Recipe) -> list[str]:
    """Why the recipe's model or data cannot be used from the bucket, each with what to do; empty where they can."""
    return [
        *_staging_problems(bucket, "model", recipe.model.id),
        *_staging_problems(bucket, "data", recipe.data.dataset),
    ]


def _staging_problems(bucket: Bucket, kind: Kind, name: str) -> list[str]:
    folder = f"{FOLDERS[kind]}/{name}"
    field = {"model": "model.id", "data": "data.dataset"}[kind]
    problems = staged_problems(bucket, folder)
    if not problems:
        return []
    builtin = f"builtin:{name}"
    published = kind == "model" and PUBLISHED.fullmatch(name.removesuffix("-it"))
    elsewhere = f"google/{name}" if published else f"FOLDER --name {name}"
    source = builtin if builtin in BUILTIN else elsewhere
    how = "is not staged" if len(problems) == 1 and "STAGED.json" in problems[0] else f"is incomplete: {problems[0]}"
    others = bucket.folders(f"{FOLDERS[kind]}/") if how == "is not staged" else []
    known = f" (staged: {', '.join(others)})" if others else ""
    return [f'{field}: got "{name}", and {bucket.url}/{folder} {how}{known}; write: g4kit stage {kind} {source}']


def _refuse_another_recipe(bucket: Bucket, plan: LaunchPlan) -> None:
    there = read_document(bucket, f"{run_folder(plan.run_id)}/recipe.json") or {}
    if there.get("recipe_hash") != plan.recipe.hash:
        raise LaunchError(
            f"run {plan.run_id}: is there with another recipe; write another --id, or leave it out for a new one."
        )


def read_frozen(cloud: Cloud, run_id: str) -> FrozenRecipe:
    """A run's recipe.json. Raises RunNotFoundError, DamagedError."""
    name = f"{run_folder(run_id)}/recipe.json"
    try:
        return FrozenRecipe.model_validate_json(cloud.bucket.read(name))
    except ObjectNotFoundError:
        raise not_found(cloud, run_id) from None
    except ValueError as error:
        raise DamagedError(f"{cloud.bucket.url}/{name}: damaged: {error}; launch the run anew.") from error
