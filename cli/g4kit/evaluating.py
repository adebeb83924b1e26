"""Evaluating a finished run's adapter again, its test samples shared among the tasks of one execution.

g4trainer.sharding says what the tasks write. Asked again, what is whole is kept and what is going on is followed.
"""

import contextlib
import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from g4kit import following
from g4kit.budget import Limits, attempt_at_worst_s
from g4kit.capping import limits_of_first, under_limits
from g4kit.cloud.base import Cloud, Execution, JobRequest, ObjectNotFoundError
from g4kit.errors import FAILED, UserError
from g4kit.estimating_inputs import estimate_for
from g4kit.launches import read_launches, write_intent, write_started
from g4kit.launching import staging_problems
from g4kit.one_gpu import OneGpu, on_one_gpu
from g4kit.predicting import require_finished
from g4kit.pricing import MINIMUM_S, Prices
from g4kit.runs import evaluation_id, read_document, run_folder
from g4trainer.deadline import ATTEMPTS_VARIABLE
from g4trainer.planner import with_changes
from g4trainer.recipe import Recipe

LOG_LINES = 12
Say = Callable[[str], None]


class EvaluateError(UserError):
    """An evaluation that cannot be started as asked, or that failed. The exit code is the trainer's."""

    def __init__(self, message: str, exit_code: int = UserError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code if exit_code in following.PASSED_ON and exit_code else FAILED


@dataclass(frozen=True)
class EvaluationPlan:
    """What `evaluate` would do."""

    run_id: str
    shards: int
    recipe: Recipe
    """The run's on one GPU, with the test size that is asked for, and limits within the cap on the cost."""
    where: OneGpu
    """Of each task."""
    task_seconds: float | None
    """Expected of each task; None where the time cannot be predicted."""
    prices: Prices | None
    limits: Limits | None = None
    """Of each task, within the cap on the cost; None without one."""

    @property
    def test_size(self) -> int | str:
        return self.recipe.data.test_size

    @property
    def expected_usd(self) -> float | None:
        if self.prices is None or self.task_seconds is None:
            return None
        return self.shards * max(self.task_seconds, MINIMUM_S) * self.prices.second

    @property
    def worst_usd(self) -> float | None:
        """Every attempt of every task runs until its timeout."""
        if self.prices is None:
            return None
        if self.limits:
            return self.shards * self.limits.worst_usd
        job = self.recipe.job
        return self.shards * job.max_attempts * attempt_at_worst_s(job.timeout_s) * self.prices.second


def plan_evaluation(
    cloud: Cloud,
    run_id: str,
    shards: int,
    test_size: str | None,
    max_cost: float | None,
    accelerator: str | None = None,
    provisioning: str | None = None,
) -> EvaluationPlan:
    """Reads and checks everything, writes nothing. test_size: None for as many samples as the run's own evaluation.

    accelerator, provisioning: others than the run's.
    Raises RunNotFoundError, PredictError where the run has not finished, EvaluateError with all problems,
    DoesNotFitError, BudgetError.
    """
    where = on_one_gpu(require_finished(cloud, run_id), cloud.target, accelerator, provisioning)
    # A batch that the run's own card had room for may be too large for this one.
    recipe = with_changes(where.recipe, ['evaluation.batch_size="auto"'])
    if test_size is not None:
        value = json.dumps(test_size) if test_size == "all" else test_size
        recipe = with_changes(recipe, [f"data.test_size={value}"])
    found = estimate_for(cloud.bucket, recipe, target=cloud.target, machine_gpus=where.gpus)
    found.refuse_evaluation()
    recipe = found.recipe
    limits = None
    if max_cost is not None and cloud.target != "local":
        limits = limits_of_first(found, cloud.target, max_cost, runs=shards)
        recipe = under_limits(recipe, limits)
    seconds = found.time.phases["load"] + found.time.phases["final"] / shards if found.time else None
    where = dataclasses.replace(where, recipe=recipe)
    plan = EvaluationPlan(run_id, shards, recipe, where, seconds, found.prices, limits)
    problems = [
        *staging_problems(cloud.bucket, recipe),
        *cloud.jobs.problems(_request(cloud, plan, "none", tuple(range(shards)))),
    ]
    if problems:
        raise EvaluateError("\n".join(problems))
    return plan


def read_evaluation(cloud: Cloud, plan: EvaluationPlan) -> dict[str, Any] | None:
    """evaluation/sharded.json; None where that evaluation has not been finished. Raises DamagedError."""
    document = read_document(cloud.bucket, f"{run_folder(plan.run_id)}/evaluation/sharded.json")
    wanted = (plan.shards, plan.test_size)
    return document if document and (document["shards"], document["origin"]["test_size"]) == wanted else None


def start_evaluation(cloud: Cloud, plan: EvaluationPlan) -> Execution:
    """Starts what is left of it; what is going on is returned.

    Raises EvaluateError where another evaluation of the run is going on.
    """
    folder = shards_folder(plan.run_id)
    launches = read_launches(cloud.bucket, folder)
    asked = {"shards": plan.shards, "test_size": plan.test_size}
    if launches:
        latest = read_document(cloud.bucket, f"{folder}/launches/{launches[-1].number:04}.json") or {}
        same = {name: latest.get(name) for name in asked} == asked
        for execution in cloud.jobs.find(evaluation_id(plan.run_id)):
            if execution.active and same:
                return execution
            if execution.active:
                raise EvaluateError(
                    f"run {plan.run_id}: is being evaluated on {latest.get('test_size')} test samples in "
                    f"{latest.get('shards')} shards; wait for it, or write: g4kit cancel {plan.run_id}"
                )
        begun = launches[-1] if same and launches[-1].execution is None else None
    else:
        begun = None
    # With every share whole and nothing put together, one task finds that out and does it.
    tasks = tuple(index for index in range(plan.shards) if index not in whole_shards(cloud, plan)) or (0,)
    intent = begun or write_intent(cloud, folder, len(launches) + 1, tasks, asked)
    if intent is None:
        raise EvaluateError(f"run {plan.run_id}: another process has just started to evaluate it; write this again.")
    with contextlib.suppress(ObjectNotFoundError):  # there only if a retry could not help
        cloud.bucket.delete(f"{folder}/failed.json")
    execution = cloud.jobs.run(_request(cloud, plan, intent.launch_id, intent.tasks or ()))
    write_started(cloud.bucket, folder, intent, execution)
    return execution


def follow_evaluation(cloud: Cloud, plan: EvaluationPlan, execution: Execution, say: Say) -> dict[str, Any]:
    """The metrics, once the execution has ended. Raises EvaluateError where it did not succeed."""
    told = -1
    while True:
        current = cloud.jobs.get(execution.name)  # asked before reading: what an ended one wrote is all there
        done = len(whole_shards(cloud, plan))
        if done != told:
            say(f"{current.state}: {done} of {plan.shards} shards are answered")
            told = done
        if not current.active:
            result = read_evaluation(cloud, plan)
            if result is None:
                raise _failure(cloud, plan, current)
            return result
        time.sleep(following.INTERVAL_S)


def whole_shards(cloud: Cloud, plan: EvaluationPlan) -> set[int]:
    """Those that one evaluation of this size has answered: where markers tell of several, the newest counts."""
    markers: dict[int, tuple[Any, Mapping[str, Any]]] = {}
    for index in range(plan.shards):
        name = f"{shards_folder(plan.run_id)}/{index}-of-{plan.shards}.json"
        with contextlib.suppress(ObjectNotFoundError):
            updated = cloud.bucket.stat(name).updated
            markers[index] = updated, (read_document(cloud.bucket, name) or {}).get("origin", {})
    origins = [origin for _, origin in sorted(markers.values(), key=lambda marker: marker[0])]
    if not origins or origins[-1].get("test_size") != plan.test_size:
        return set()
    return {index for index, (_, origin) in markers.items() if origin == origins[-1]}


def shards_folder(run_id: str) -> str:
    return f"{run_folder(run_id)}/evaluation/shards"


def _request(cloud: Cloud, plan: EvaluationPlan, launch_id: str, tasks: tuple[int, ...]) -> JobRequest:
    path = cloud.bucket.job_path(run_folder(plan.run_id))
    some = ("--only", ",".join(map(str, tasks))) if tasks != tuple(range(plan.shards)) else ()
    return JobRequest(
        run_id=evaluation_id(plan.run_id),
        launch_id=launch_id,
        args=("evaluate", path, "--shards", str(plan.shards), "--test-size", str(plan.test_size), *some),
        **plan.where.requested,
        env={ATTEMPTS_VARIABLE: str(plan.limits.attempts)} if plan.limits else {},
        task_count=len(tasks),
        folder=shards_folder(plan.run_id),
    )


def _failure(cloud: Cloud, plan: EvaluationPlan, execution: Execution) -> EvaluateError:
    said = read_document(cloud.bucket, f"{shards_folder(plan.run_id)}/failed.json")
    if said:
        return EvaluateError(f"{said['reason']}\n{said['remedy']}", int(said["exit_code"]))
    log = "\n".join(f"  | {line.text}" for line in deque(cloud.logs.read(execution.name), maxlen=LOG_LINES))
    return EvaluateError(
        f"run {plan.run_id}: evaluation {execution.state}: {execution.message}\n{log}\n"
        "  the same command goes on with what is left",
        execution.exit_code or FAILED,
    )
