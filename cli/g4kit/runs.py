"""What a run looks like from outside: its files and its execution, put together."""

import dataclasses
import datetime
import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from g4kit.cloud.base import Bucket, Cloud, Execution, ExecutionState, ObjectNotFoundError, Task, now
from g4kit.errors import UserError
from g4kit.targets import TARGETS

INTENT = re.compile(r"launches/(\d{4})\.json$")
WAITING = (ExecutionState.PENDING, ExecutionState.RUNNING)
QUIET_AFTER_S = 180
"""Without a heartbeat for so long, a running run is said to be quiet."""


class RunNotFoundError(UserError):
    def __init__(self, run_id: str, bucket: str, known: Sequence[str]) -> None:
        close = difflib.get_close_matches(run_id, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        super().__init__(f"run {run_id}: not in {bucket}; {hint}`g4kit runs` lists those that are.")


class SweepGivenError(RunNotFoundError):
    """The id of a sweep, where one of its points is meant."""

    def __init__(self, sweep_id: str, points: Sequence[str]) -> None:
        UserError.__init__(
            self,
            f"run {sweep_id}: is a sweep; write the id of one of its points, {points[0]} to {points[-1]}, of which "
            f"`g4kit runs {sweep_id}` names the best.",
        )


class ElsewhereError(UserError):
    """A run of another target, with the same bucket."""


class DamagedError(UserError):
    """A JSON file of a run that does not parse."""


@dataclasses.dataclass(frozen=True)
class RunView:
    """One run, as `g4kit runs` shows it. Field names are those of `--json`."""

    run_id: str
    state: str
    """pending, loading, running, interrupted, succeeded, failed or cancelled."""
    live: bool
    """Whether an execution is going on that may still change the outcome, so that waiting makes sense."""
    target: str
    recipe: str
    model: str
    dataset: str
    created_at: str
    execution: str | None = None
    attempt: int | None = None
    """Counts across executions, as the trainer does."""
    phase: str | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    samples_per_second: float | None = None
    eta_s: float | None = None
    progress: dict[str, int] | None = None
    heartbeat: str | None = None
    message: str = ""
    reason: str | None = None
    """Why no retry can help, from failed.json."""
    remedy: str | None = None
    exit_code: int | None = None
    results: dict[str, Any] | None = None
    """results.json without its list of artifacts."""
    sweep: str | None = None
    """The sweep that the run is a point of."""
    task: int | None = None
    """The index of its task, where `execution` runs other points of the sweep too."""

    def accuracy(self, when: str) -> float | None:
        """when: `baseline` or `final`."""
        part = (self.results or {}).get(when)
        return part.get("accuracy") if isinstance(part, dict) else None


def run_folder(run_id: str) -> str:
    return f"runs/{run_id}"


def evaluation_id(run_id: str) -> str:
    """What executions that evaluate a finished run are started for. No run can have it: the underscore."""
    return f"{run_id}_evaluation"


def sweep_folder(sweep_id: str) -> str:
    return f"sweeps/{sweep_id}"


def list_runs(cloud: Cloud) -> list[RunView]:
    """Every run, newest first. A damaged one is shown as failed, with the reason."""
    executions = all_executions(cloud)
    views = []
    for run_id in cloud.bucket.folders("runs/"):
        try:
            view = view_of(cloud, run_id, executions)
        except DamagedError as error:
            view = RunView(run_id, "failed", False, cloud.target, "?", "?", "?", "", message=str(error))
        if view:
            views.append(view)
    return sorted(views, key=lambda view: (view.created_at, view.run_id), reverse=True)


def read_run(cloud: Cloud, run_id: str) -> RunView:
    """Raises RunNotFoundError, DamagedError."""
    view = view_of(cloud, run_id, Executions(cloud.bucket, cloud.jobs.find))
    if view is None:
        raise not_found(cloud, run_id)
    return view


class Executions:
    """The executions of runs. Those of a sweep stand for each of its runs, narrowed to the run's own task."""

    def __init__(self, bucket: Bucket, find: Callable[[str], list[Execution]]) -> None:
        """find: executions by the id that they were started for, a run's or a sweep's, oldest first."""
        self._bucket = bucket
        self._find = find
        self._tasks: dict[str, dict[str, list[int]]] = {}

    def of(self, run_id: str, recipe: Mapping[str, Any]) -> list[Execution]:
        """Oldest first. recipe: the run's recipe.json."""
        own, place = self._find(run_id), recipe.get("sweep")
        if not place:
            return own
        tasks = self._tasks_by_launch(place["id"])
        shared = [
            narrowed(execution, tasks[execution.launch_id].index(place["task"]), run_id)
            for execution in self._find(place["id"])
            if place["task"] in tasks.get(execution.launch_id, ())
        ]
        return sorted([*own, *shared], key=lambda execution: (execution.created_at, execution.name))

    def _tasks_by_launch(self, sweep_id: str) -> dict[str, list[int]]:
        """Of each launch of a sweep, the points that its tasks run, by its launch id."""
        if sweep_id not in self._tasks:
            names = [item.name for item in self._bucket.objects(f"{sweep_folder(sweep_id)}/launches/")]
            intents = [read_document(self._bucket, name) or {} for name in names if INTENT.search(name)]
            self._tasks[sweep_id] = {intent["launch_id"]: intent["tasks"] for intent in intents}
        return self._tasks[sweep_id]


def all_executions(cloud: Cloud) -> Executions:
    """Of every run, asked for once."""
    by_id: dict[str, list[Execution]] = {}
    for execution in cloud.jobs.find():
        by_id.setdefault(execution.run_id, []).append(execution)
    return Executions(cloud.bucket, lambda run_id: by_id.get(run_id, []))


def elsewhere(cloud: Cloud, document: Mapping[str, Any]) -> str | None:
    """The target that has the executions of a run or a sweep, where it is another than this: both may share a bucket.

    document: its recipe.json or sweep.json.
    """
    target = str(document.get("target"))
    return target if target in TARGETS and target != cloud.target else None


def require_here(cloud: Cloud, some_id: str) -> None:
    """Raises RunNotFoundError, DamagedError, and ElsewhereError for a run or a sweep of another target."""
    names = (f"{run_folder(some_id)}/recipe.json", f"{sweep_folder(some_id)}/sweep.json")
    document = next((found for name in names if (found := read_document(cloud.bucket, name))), None)
    if document is None:
        raise not_found(cloud, some_id)
    target = elsewhere(cloud, document)
    if target:
        raise ElsewhereError(f"{some_id}: goes on at target {target}, this is {cloud.target}; write --target {target}.")


def executions_of(cloud: Cloud, run_id: str) -> list[Execution]:
    """Of one run, oldest first; of a sweep's execution its own task alone. Raises RunNotFoundError, DamagedError."""
    recipe = read_document(cloud.bucket, f"{run_folder(run_id)}/recipe.json")
    if recipe is None:
        raise not_found(cloud, run_id)
    return Executions(cloud.bucket, cloud.jobs.find).of(run_id, recipe)


def narrowed(execution: Execution, index: int, run_id: str) -> Execution:
    """An execution of many tasks as the execution of one of them."""
    pending = Task(index, ExecutionState.PENDING, 0, None)
    task = next((one for one in execution.tasks if one.index == index), pending)
    cut_off = task.state in WAITING and not execution.active
    state = execution.state if cut_off else task.state
    message = ""
    if state is ExecutionState.FAILED:
        ended = f"ended with exit code {task.exit_code} in attempt {task.attempt + 1}"
        message = "its execution ended before it did" if cut_off else ended
    elif state is ExecutionState.PENDING:
        message = execution.message if execution.state is ExecutionState.PENDING else "waits for tasks before it"
    return dataclasses.replace(
        execution,
        run_id=run_id,
        state=state,
        started_at=task.started_at,
        finished_at=task.finished_at,
        tasks=(task,),
        message=message,
        only_task=task.index,
    )


def require_run(cloud: Cloud, run_id: str) -> None:
    """Raises RunNotFoundError."""
    if read_document(cloud.bucket, f"{run_folder(run_id)}/recipe.json") is None:
        raise not_found(cloud, run_id)


def not_found(cloud: Cloud, run_id: str) -> RunNotFoundError:
    sweep = read_document(cloud.bucket, f"{sweep_folder(run_id)}/sweep.json")
    if sweep:
        return SweepGivenError(run_id, [point["run_id"] for point in sweep["points"]])
    return RunNotFoundError(run_id, cloud.bucket.url, cloud.bucket.folders("runs/"))


def read_document(bucket: Bucket, name: str) -> dict[str, Any] | None:
    """A JSON object of the bucket; None where it is not there. Raises DamagedError."""
    try:
        document = json.loads(bucket.read(name))
    except ObjectNotFoundError:
        return None
    except ValueError as error:
        raise DamagedError(f"{bucket.url}/{name}: damaged: {error}; restore it, or launch the run anew.") from error
    if not isinstance(document, dict):
        raise DamagedError(f"{bucket.url}/{name}: damaged: got no JSON object; restore it, or launch the run anew.")
    return document


def combine(
    run_id: str,
    recipe: dict[str, Any],
    execution: Execution | None,
    status: dict[str, Any] | None,
    failed: dict[str, Any] | None,
    results: dict[str, Any] | None,
    at: datetime.datetime,
) -> RunView:
    """The view of one run at a moment, from its newest execution and its files."""
    status = status or {}
    state = run_state(execution, status, failed, results)
    wanted = recipe.get("recipe", {})
    return RunView(
        run_id=run_id,
        state=state,
        live=execution is not None and execution.active and results is None and failed is None,
        target=recipe.get("target", "?"),
        recipe=wanted.get("name", "?"),
        model=wanted.get("model", {}).get("id", "?"),
        dataset=wanted.get("data", {}).get("dataset", "?"),
        created_at=recipe.get("created_at", ""),
        execution=execution.name if execution else None,
        sweep=(recipe.get("sweep") or {}).get("id"),
        task=execution.only_task if execution else None,
        **{key: status.get(key) for key in STATUS_KEYS},
        message=_message(run_id, state, execution, status, failed, at),
        reason=failed.get("reason") if failed else None,
        remedy=failed.get("remedy") if failed else None,
        exit_code=_exit_code(execution, failed, results),
        results={key: value for key, value in results.items() if key != "artifacts"} if results else None,
    )


STATUS_KEYS = (
    "attempt",
    "phase",
    "step",
    "total_steps",
    "loss",
    "learning_rate",
    "samples_per_second",
    "eta_s",
    "progress",
    "heartbeat",
)
"""What a view takes over from status.json as it stands."""


def run_state(
    execution: Execution | None,
    status: dict[str, Any],
    failed: dict[str, Any] | None,
    results: dict[str, Any] | None,
) -> str:
    if results is not None:
        return "succeeded"
    if execution is None or execution.state is ExecutionState.PENDING:
        return "pending"
    if execution.state is ExecutionState.CANCELLED:
        return "cancelled"
    if failed is not None:
        return "failed"
    said = status.get("state")
    if execution.active:
        if said is None or _is_from_before(status, execution):
            return "loading"
        return said if said in ("loading", "running") else "interrupted"
    cut_short = execution.exit_code is None and said is not None  # its machine is gone
    return "interrupted" if cut_short or execution.exit_code == INTERRUPTED else "failed"


INTERRUPTED = 75
"""The trainer's exit code for: stopped on purpose, with a checkpoint."""


def view_of(cloud: Cloud, run_id: str, executions: Executions) -> RunView | None:
    """None where there is no such run. Raises DamagedError."""
    folder = run_folder(run_id)
    recipe = read_document(cloud.bucket, f"{folder}/recipe.json")
    if recipe is None:
        return None
    found = executions.of(run_id, recipe)
    results = read_document(cloud.bucket, f"{folder}/results.json")
    status = read_document(cloud.bucket, f"{folder}/status.json")
    failed = None if results else read_document(cloud.bucket, f"{folder}/failed.json")
    view = combine(run_id, recipe, found[-1] if found else None, status, failed, results, now())
    target = elsewhere(cloud, recipe)
    if target is None or found or results or failed:
        return view
    hint = f"of target {target}; write: g4kit runs {run_id} --target {target}"
    return dataclasses.replace(view, state=(status or {}).get("state", "pending"), message=hint)


def _message(
    run_id: str,
    state: str,
    execution: Execution | None,
    status: dict[str, Any],
    failed: dict[str, Any] | None,
    at: datetime.datetime,
) -> str:
    if state == "succeeded":
        return ""
    if execution is None:
        return f"never started; write: g4kit resume {run_id}"
    if not execution.active and execution.state is ExecutionState.SUCCEEDED:
        return "its process ended with exit code 0 and wrote no results.json"
    if state == "failed" and failed is not None:
        return ""  # failed.json says more
    if not execution.active or execution.message:
        return execution.message
    if status.get("heartbeat") and not _is_from_before(status, execution):
        quiet_s = (at - datetime.datetime.fromisoformat(status["heartbeat"])).total_seconds()
        if quiet_s > QUIET_AFTER_S:
            return f"no heartbeat for {round(quiet_s)} s"
    return str(status.get("message") or "")


def _exit_code(
    execution: Execution | None, failed: dict[str, Any] | None, results: dict[str, Any] | None
) -> int | None:
    if results is not None:
        return 0
    if failed is not None:
        return int(failed["exit_code"])
    return execution.exit_code if execution else None


def _is_from_before(status: dict[str, Any], execution: Execution) -> bool:
    """Whether status.json was written by an earlier execution."""
    heartbeat = status.get("heartbeat")
    return heartbeat is None or datetime.datetime.fromisoformat(heartbeat) < execution.created_at
