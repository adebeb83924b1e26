"""Starting sweeps: each point decided and priced as a run, all written create-only, then one execution with a task for
each. Nothing is written before every point is known to be right."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g4kit import __version__
from g4kit.budget import Cost
from g4kit.capping import environment_of, limits_of_next_sweep, under_limits
from g4kit.cloud.base import Bucket, Cloud, Execution, JobRequest, ObjectNotFoundError
from g4kit.estimating import DoesNotFitError, Estimate
from g4kit.estimating_inputs import deployed_job
from g4kit.grid import as_overrides, describe
from g4kit.launches import Launch, create, read_launches, time, write_intent, write_started
from g4kit.launching import LaunchError, LaunchPlan, priced, read_frozen, run_request, staging_problems, write_run
from g4kit.runs import read_document, require_here, run_folder, sweep_folder
from g4kit.sweeps import SweepView, point_id, read_sweep, require_sweep
from g4kit.transfer import in_parallel
from g4trainer.recipe import Recipe, RecipeError, SweepPlace, load_recipe
from g4trainer.rundir import new_run_id

MAX_ID = 60
"""Characters of a sweep's id: its runs' ids are longer by three."""
NO_MATTER = ("learning_rate", "lr_scheduler_type", "max_grad_norm", "seed", "warmup_ratio", "weight_decay")
"""Of [training], what changes neither memory nor time: points that differ in nothing else share an estimate."""


@dataclass(frozen=True)
class PlannedPoint:
    values: Mapping[str, Any]
    """By path, `section.key`."""
    launch: LaunchPlan
    estimate: Estimate


@dataclass(frozen=True)
class SweepPlan:
    """What `sweep` would do."""

    sweep_id: str
    recipe: str
    """Name of the recipe."""
    target: str
    points: tuple[PlannedPoint, ...]
    drawn: Mapping[str, int] | None = None
    """Count and seed, where the points were drawn from a larger grid."""

    @property
    def seconds(self) -> float | None:
        """Expected, of all points one after the other; None where one's time is not predicted."""
        times = [point.estimate.time for point in self.points]
        return None if None in times else sum(time.total for time in times if time)

    @property
    def cost(self) -> Cost | None:
        """USD of all points; None where nothing is billed or one's cost is not known."""
        costs = [point.estimate.cost for point in self.points if point.estimate.cost]
        if len(costs) < len(self.points):
            return None
        names = [field.name for field in dataclasses.fields(Cost)]
        return Cost(**{name: sum(getattr(cost, name) for cost in costs) for name in names})


def plan_sweep(
    cloud: Cloud,
    recipe_path: Path,
    points: Sequence[Mapping[str, Any]],
    overrides: tuple[str, ...],
    *,
    sweep_id: str | None,
    estimate: Callable[[Recipe], Estimate],
    drawn: Mapping[str, int] | None = None,
) -> SweepPlan:
    """Reads and checks everything, writes nothing. Raises LaunchError with all problems of all points."""
    problems: dict[str, None] = {}  # in order, each once: many points share theirs
    recipes: list[Recipe | None] = []
    for point in points:
        try:
            recipes.append(load_recipe(recipe_path, (*overrides, *as_overrides(point))))
        except RecipeError as error:
            recipes.append(None)
            problems |= dict.fromkeys(error.problems)
    valid = [recipe for recipe in recipes if recipe]
    if not valid:
        raise LaunchError(_listed(recipe_path, problems))
    problems |= dict.fromkeys(_same_recipes(points, recipes))
    sweep_id = sweep_id or new_run_id(valid[0].name[:39].rstrip("-"))
    problems |= dict.fromkeys(_id_problems(cloud.bucket, sweep_id))
    problems |= dict.fromkeys(cloud.jobs.problems(_request(cloud, sweep_id, "none", valid[0], range(len(points)))))
    bases = {(recipe.model.id, recipe.data.dataset): recipe for recipe in valid}
    staging = {names: staging_problems(cloud.bucket, recipe) for names, recipe in bases.items()}
    problems |= dict.fromkeys(problem for found in staging.values() for problem in found)
    estimates: dict[str, Estimate] = {}
    planned = []
    for index, (values, recipe) in enumerate(zip(points, recipes, strict=True)):
        if recipe is None or staging[recipe.model.id, recipe.data.dataset]:
            continue
        found = _estimate(recipe, estimates, estimate)
        try:
            found.refuse()
        except DoesNotFitError as error:
            problems[f"{describe(values)}: {error}"] = None
        run_id = point_id(sweep_id, index)
        path = cloud.bucket.job_path(run_folder(run_id))
        place = SweepPlace(id=sweep_id, task=index)
        planned.append(PlannedPoint(values, LaunchPlan(run_id, found.recipe, cloud.target, path, sweep=place), found))
    if problems:
        raise LaunchError(_listed(recipe_path, problems))
    image = cloud.jobs.image(valid[0].job.accelerator)
    planned = [dataclasses.replace(one, launch=dataclasses.replace(one.launch, image=image)) for one in planned]
    plan = SweepPlan(sweep_id, valid[0].name, cloud.target, tuple(planned), drawn)
    _refuse_another_sweep(cloud.bucket, plan)
    return plan


def priced_sweep(plan: SweepPlan, max_cost: float | None) -> SweepPlan:
    """The plan with its prices; a cap on the cost holds for all points together. Raises BudgetError."""
    count = len(plan.points)
    points = [
        dataclasses.replace(point, launch=priced(point.launch, point.estimate, max_cost, runs=count))
        for point in plan.points
    ]
    return dataclasses.replace(plan, points=tuple(points))


def parallelism_of(target: str, recipe: Recipe, count: int) -> int:
    """How many of so many points run at a time: the deployed job's, all on Vertex AI, 1 on this machine."""
    if target == "vertex":
        return count
    job = deployed_job(recipe, os.environ) if target == "cloudrun" else None
    return job.parallelism if job else 1


def launch_sweep(cloud: Cloud, plan: SweepPlan) -> Execution:
    """Writes the sweep and its runs, and starts them; a sweep that is there with the same points is returned.

    Raises LaunchError where the id belongs to another sweep.
    """
    folder = sweep_folder(plan.sweep_id)
    if not create(cloud.bucket, f"{folder}/sweep.json", _document(plan) | {"created_at": time()}):
        _refuse_another_sweep(cloud.bucket, plan)
    in_parallel(lambda point: write_run(cloud.bucket, point.launch), plan.points)
    run_ids = [point.launch.run_id for point in plan.points]
    create(cloud.bucket, f"{folder}/tasks.json", {"sweep_id": plan.sweep_id, "tasks": run_ids})
    launches = read_launches(cloud.bucket, folder)
    if launches and launches[-1].execution:
        return cloud.jobs.get(launches[-1].execution)
    intent = launches[-1] if launches else write_intent(cloud, folder, 1, tuple(range(len(run_ids))))
    if intent is None:  # another process launches the same sweep right now: both get its one execution
        intent = read_launches(cloud.bucket, folder)[-1]
    return _start(cloud, plan.sweep_id, intent)


def resume_sweep(cloud: Cloud, sweep_id: str, tasks: Collection[int] | None = None) -> Execution:
    """Starts an execution of the unfinished points, or of those of them that `tasks` names.

    Raises SweepNotFoundError, LaunchError where it goes on or has finished, BudgetError where what is left of a cap on
    the cost does not do for each of them.
    """
    require_sweep(cloud, sweep_id)
    require_here(cloud, sweep_id)
    if any(execution.active for execution in cloud.jobs.find(sweep_id)):
        raise LaunchError(f"sweep {sweep_id}: is going on; wait for it, or write: g4kit cancel {sweep_id}")
    wanted = _unfinished(read_sweep(cloud, sweep_id), tasks)
    folder = sweep_folder(sweep_id)
    launches = read_launches(cloud.bucket, folder)
    begun = launches[-1] if launches and launches[-1].execution is None else None
    limits = None if begun else limits_of_next_sweep(cloud, [read_frozen(cloud, point_id(sweep_id, n)) for n in wanted])
    intent = begun or write_intent(cloud, folder, len(launches) + 1, wanted, limits=limits)
    if intent is None:
        raise LaunchError(f"sweep {sweep_id}: another process has just resumed it; write: g4kit runs {sweep_id}")
    for task in intent.tasks or ():
        with contextlib.suppress(ObjectNotFoundError):  # there only if a retry could not help
            cloud.bucket.delete(f"{run_folder(point_id(sweep_id, task))}/failed.json")
    return _start(cloud, sweep_id, intent)


def _unfinished(view: SweepView, tasks: Collection[int] | None) -> tuple[int, ...]:
    """Points that an execution of their own runs right now are left to it."""
    unfinished = [point.task for point in view.points if point.run.state != "succeeded"]
    wanted = [point.task for point in view.points if point.task in unfinished and not point.run.live]
    wanted = [task for task in wanted if tasks is None or task in tasks]
    if not unfinished:
        raise LaunchError(f"sweep {view.sweep_id}: has finished; write: g4kit runs {view.sweep_id}")
    if not wanted:
        raise LaunchError(f"sweep {view.sweep_id}: what is left is going on; write: g4kit runs {view.sweep_id}")
    return tuple(wanted)


def _start(cloud: Cloud, sweep_id: str, intent: Launch) -> Execution:
    """Idempotent: whoever finishes a launch that someone else began gets the same execution."""
    tasks = intent.tasks or ()
    frozen = read_frozen(cloud, point_id(sweep_id, 0))  # job and cap are those of all points: no grid holds [job]
    recipe = under_limits(frozen.recipe, intent.limits)
    env = environment_of(frozen, recipe)
    only = intent.number > 1
    execution = cloud.jobs.run(_request(cloud, sweep_id, intent.launch_id, recipe, tasks, only=only, env=env))
    write_started(cloud.bucket, sweep_folder(sweep_id), intent, execution)
    return execution


def _request(
    cloud: Cloud,
    sweep_id: str,
    launch_id: str,
    recipe: Recipe,
    tasks: Sequence[int],
    *,
    only: bool = False,
    env: Mapping[str, str] | None = None,
) -> JobRequest:
    path = cloud.bucket.job_path(f"{sweep_folder(sweep_id)}/tasks.json")
    chosen = ("--only", ",".join(map(str, tasks))) if only else ()
    return dataclasses.replace(
        run_request(sweep_id, launch_id, path, recipe, env),
        args=("run", "--sweep", path, *chosen),
        task_count=len(tasks),
        folder=sweep_folder(sweep_id),
    )


def _estimate(recipe: Recipe, known: dict[str, Estimate], estimate: Callable[[Recipe], Estimate]) -> Estimate:
    """The recipe's, from that of one like it where there is one."""
    content = recipe.model_dump(mode="json")
    key = str({**content, "training": {k: v for k, v in content["training"].items() if k not in NO_MATTER}})
    if key not in known:
        known[key] = estimate(recipe)
    job = known[key].recipe.job  # an estimate takes the deployed job's attempts
    return dataclasses.replace(known[key], recipe=recipe.model_copy(update={"job": job}))


def _listed(recipe_path: Path, problems: Collection[str]) -> str:
    return "\n".join([f"{recipe_path}: cannot be swept like this:", *(f"  {problem}" for problem in problems)])


def _same_recipes(points: Sequence[Mapping[str, Any]], recipes: Sequence[Recipe | None]) -> list[str]:
    """Points that differ as text and come to the same run, such as 1e-4 and "0.0001" would."""
    seen: dict[str, Mapping[str, Any]] = {}
    problems = []
    for point, recipe in zip(points, recipes, strict=True):
        content = recipe.model_dump_json() if recipe else describe(point)
        if content in seen:
            problems.append(f"{describe(point)}: is the same run as {describe(seen[content])}; write one of them.")
        seen.setdefault(content, point)
    return problems


def _id_problems(bucket: Bucket, sweep_id: str) -> list[str]:
    problems = []
    if len(sweep_id) > MAX_ID:
        problems.append(f"--id: got {len(sweep_id)} characters; write at most {MAX_ID}.")
    elif read_document(bucket, f"{run_folder(sweep_id)}/recipe.json") is not None:
        problems.append(f"--id: got {sweep_id}, which is a run's; write another, or leave it out.")
    return problems


def _document(plan: SweepPlan) -> dict[str, Any]:
    """sweep.json, less its time."""
    points = [
        {"run_id": point.launch.run_id, "values": dict(point.values), "recipe_hash": point.launch.recipe.hash}
        for point in plan.points
    ]
    return {
        "sweep_id": plan.sweep_id,
        "recipe": plan.recipe,
        "target": plan.target,
        "g4kit_version": __version__,
        "drawn": dict(plan.drawn) if plan.drawn else None,
        "points": points,
    }


def _refuse_another_sweep(bucket: Bucket, plan: SweepPlan) -> None:
    there = read_document(bucket, f"{sweep_folder(plan.sweep_id)}/sweep.json")
    if there is not None and there.get("points") != _document(plan)["points"]:
        raise LaunchError(
            f"sweep {plan.sweep_id}: is there with other points; write another --id, or leave it out for a new one."
        )
