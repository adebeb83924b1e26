from typing import Any

import click

from g4kit.options import (
    accelerator_option,
    json_option,
    provisioning_option,
    run_id_argument,
    target_option,
    yes_option,
)
from g4kit.output import duration, print_data, print_json, say
from g4kit.targets import open_cloud
from g4kit.waiting import or_leave

MAX_SHARDS = 100


@click.command("evaluate", short_help="Evaluate a finished run again, on more samples or over many tasks.")
@run_id_argument
@click.option("--shards", type=click.IntRange(1, MAX_SHARDS), default=1, help="Tasks that share the samples; 1.")
@click.option("--test-size", metavar="N|all", help="Test samples. Default: as many as the run's own evaluation took.")
@click.option("--wait", is_flag=True, help="Follow to the end, and print the metrics.")
@click.option("--dry-run", is_flag=True, help="Check everything, print time and price, start nothing.")
@yes_option
@click.option("--max-cost", type=click.FloatRange(min=0, min_open=True), metavar="USD", help="Cap on one execution.")
@accelerator_option
@provisioning_option
@target_option
@json_option
def command(
    run_id: str,
    shards: int,
    test_size: str | None,
    wait: bool,
    dry_run: bool,
    yes: bool,
    max_cost: float | None,
    accelerator: str | None,
    provisioning: str | None,
    target: str | None,
    as_json: bool,
) -> None:
    """Evaluate a finished run again, on more samples or over many tasks: one execution, each task a share of the test
    samples on one GPU, put together and scored as the run's own evaluation is.

    Asked again, it goes on with what is left, or prints the metrics that are there.

    \b
    Examples:
      g4kit evaluate digits-tiny-20260101-120000-0a1b --shards 4 --wait
      g4kit evaluate digits-tiny-20260101-120000-0a1b --shards 8 --test-size all --dry-run
    """
    from g4kit.evaluating import follow_evaluation, plan_evaluation, read_evaluation, start_evaluation

    if test_size and test_size != "all" and not (test_size.isdecimal() and int(test_size)):
        raise click.UsageError(f'--test-size: got {test_size}; write a number of samples, or "all".')
    cloud = open_cloud(target)
    plan = plan_evaluation(cloud, run_id, shards, test_size, max_cost, accelerator, provisioning)
    result = read_evaluation(cloud, plan)
    if result:
        say(f"run {run_id}: was evaluated like this before")
        _print(result, as_json)
        return
    time = "" if plan.task_seconds is None else f", about {duration(plan.task_seconds)} each"
    tasks = "1 task" if shards == 1 else f"{shards} tasks"
    say(f"{plan.test_size} test samples over {tasks}{time}{_price(plan)}{plan.where.note}")
    if dry_run:
        say("dry run: everything needed is there; nothing was started")
        if as_json:
            print_json(
                {
                    "run_id": run_id,
                    "shards": shards,
                    "test_size": plan.test_size,
                    "task_seconds": plan.task_seconds,
                    "expected_usd": plan.expected_usd,
                    "worst_usd": plan.worst_usd,
                }
            )
        return
    if cloud.target != "local" and not yes:
        click.confirm("start it?", abort=True, err=True)
    then = f"what was begun goes on. To come back: the same command; to end it: g4kit cancel {run_id}"
    execution = or_leave(lambda: start_evaluation(cloud, plan), then)
    say(f"run {run_id}: evaluation {execution.state}, execution {execution.name}")
    if not wait:
        again = f"g4kit evaluate {run_id} --shards {shards} --test-size {plan.test_size} --wait"
        for what, text in {"follow": again, "logs": f"g4kit logs {run_id}", "cancel": f"g4kit cancel {run_id}"}.items():
            say(f"  {what:<7} {text}")
        print_data(execution.name)
        return
    _print(or_leave(lambda: follow_evaluation(cloud, plan, execution, say), then), as_json)


def _price(plan: Any) -> str:
    if plan.prices is None:
        return ""
    if plan.expected_usd is None:
        return f"; ${plan.prices.hour:.2f} an hour each, at worst ${plan.worst_usd:.2f}"
    return f"; ${plan.expected_usd:.2f}, at worst ${plan.worst_usd:.2f}"


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    interval = result.get("accuracy_interval_95")
    between = f"  ({interval[0]:.1%} to {interval[1]:.1%})" if interval else ""
    figures = {
        "samples": f"{result['count']:,}",
        "accuracy": "" if result["accuracy"] is None else f"{result['accuracy']:.1%}{between}",
        "exact match": f"{result['exact_match']:.1%}" if result["accuracy"] is None else "",
        "macro F1": "" if result["macro_f1"] is None else f"{result['macro_f1']:.3f}",
        "without a class": "" if result["unknown_rate"] is None else f"{result['unknown_rate']:.1%}",
    }
    print_data("\n".join(f"{name:<16} {value}" for name, value in figures.items() if value))
