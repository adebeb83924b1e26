"""A sweep as people read it: what it will do and cost, and how its points stand."""

from collections.abc import Mapping, Sequence
from typing import Any

from g4kit.grid import describe as describe_point
from g4kit.grid import show
from g4kit.output import duration, table
from g4kit.sweeping import SweepPlan
from g4kit.sweeps import PointView, SweepView
from g4trainer.vram import GIB

NONE = "-"


def plan_text(plan: SweepPlan, parallelism: int) -> str:
    """parallelism: how many points the target runs at a time."""
    keys = list(plan.points[0].values)
    rows = []
    for index, point in enumerate(plan.points):
        found = point.estimate
        rows.append(
            (
                str(index),
                *(show(point.values[key]) for key in keys),
                f"{found.fit.needed / GIB:.1f} of {found.fit.free_bytes / GIB:.1f}",
                duration(found.time.total) if found.time else NONE,
                f"{found.cost.expected:.2f}" if found.cost else NONE,
            )
        )
    warnings = dict.fromkeys(warning for point in plan.points for warning in point.estimate.warnings)
    lines = [table(("POINT", *short_names(keys), "GIB", "TIME", "USD"), rows), total_line(plan, parallelism)]
    return "\n".join([*lines, *(f"warning {warning}" for warning in warnings)])


def total_line(plan: SweepPlan, parallelism: int) -> str:
    """`all     4 points, 2 at a time: about 1 h 2 min; $6.20 ($5.10 to $8.00), at worst $127.60`"""
    count = len(plan.points)
    at_once = min(parallelism, count)
    how = f"{at_once} at a time"
    if at_once == 1:
        how = "one after another"
    elif at_once >= count:
        how = "all at the same time as far as the quota allows"
    line = f"all     {count} {'point' if count == 1 else 'points'}, {how}"
    if plan.seconds is not None:
        line += f": about {duration(plan.seconds * -(-count // at_once) / count)}"
    cost = plan.cost
    if cost is None:
        free = all(point.estimate.hardware.is_here for point in plan.points)
        return line + ("; nothing to pay on this machine" if free else "; the price is not known")
    return line + f"; ${cost.expected:.2f} (${cost.low:.2f} to ${cost.high:.2f}), at worst ${cost.worst:.2f}"


def sweep_text(view: SweepView) -> str:
    """The table of points, and the best."""
    lines = [table(point_header(view), [point_cells(view, point) for point in view.points])]
    lines += [f"point {point.task}: {why}" for point in view.points if (why := point.run.reason or point.run.message)]
    return "\n".join([*lines, best_line(view)])


def point_header(view: SweepView) -> list[str]:
    accuracy = ["VALIDATION ACCURACY"] if _with_accuracy(view) else []
    return ["POINT", *short_names(view.keys), "STATE", "STEP", "VALIDATION LOSS", *accuracy, "TEST ACCURACY", "RUN"]


def point_cells(view: SweepView, point: PointView) -> list[str]:
    """A line of the table."""
    return [
        f"{point.task}{' *' if view.best and view.best.task == point.task else ''}",
        *(show(point.values.get(key, NONE)) for key in view.keys),
        point.run.state,
        steps(point),
        number(point.validation_loss),
        *([number(point.validation_accuracy)] if _with_accuracy(view) else []),
        number(point.run.accuracy("final")),
        point.run.run_id,
    ]


def best_line(view: SweepView) -> str:
    best = view.best
    if best is None:
        why = "no point has a validation loss" if view.count("succeeded") else "no point has finished"
        return f"best: not known, for {why}"
    values = describe_point(view.points[best.task].values)
    so_far = "" if best.finished == len(view.points) else " so far"
    return (
        f"best{so_far} by {best.by}, of {best.finished} finished: point {best.task}, {values}, {best.value:.4g}: "
        f"{best.run_id}"
    )


def progress_line(view: SweepView) -> str:
    """`sweep x: running · 1 of 4 finished · point 1 train step 3/8 loss 0.4321`"""
    parts = [f"sweep {view.sweep_id}: {view.state}", f"{view.count('succeeded')} of {len(view.points)} finished"]
    failed = view.count("failed")
    parts += [f"{failed} failed"] if failed else []
    for point in view.points:
        if point.run.state in ("loading", "running", "interrupted") and point.run.live:
            loss = f" loss {point.run.loss:.4f}" if point.run.loss is not None else ""
            step = f" step {steps(point)}" if point.run.step else ""
            parts.append(f"point {point.task} {point.run.phase or point.run.state}{step}{loss}")
    return " · ".join(parts)


def _with_accuracy(view: SweepView) -> bool:
    return any(point.validation_accuracy is not None for point in view.points)


def steps(point: PointView) -> str:
    run = point.run
    done = run.step if run.step is not None else ((run.results or {}).get("train") or {}).get("steps")
    if not done:
        return NONE
    return f"{done}/{run.total_steps}" if run.total_steps else str(done)


def number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"


def short_names(keys: Sequence[str]) -> list[str]:
    """Keys without their section, where that still tells them apart."""
    last = [key.partition(".")[2] for key in keys]
    return [key if last.count(name) > 1 else name for key, name in zip(keys, last, strict=True)]


def plan_json(plan: SweepPlan) -> Mapping[str, Any]:
    cost = plan.cost
    return {
        "sweep_id": plan.sweep_id,
        "target": plan.target,
        "seconds": plan.seconds,
        "cost_usd": cost.to_json() if cost else None,
        "points": [
            {
                "run_id": point.launch.run_id,
                "values": dict(point.values),
                "recipe": point.launch.recipe.model_dump(mode="json"),
                "hash": point.launch.recipe.hash,
                "estimate": point.estimate.to_json(),
            }
            for point in plan.points
        ],
    }
