import dataclasses
import sys
from pathlib import Path

import click

from g4kit.options import RunId, json_option, overrides_option, price_table_option, target_option, yes_option
from g4kit.output import print_data, print_json, say, terminal_columns
from g4kit.targets import open_cloud


@click.command("launch", short_help="Start a fine-tuning run from a recipe.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--id", "run_id", type=RunId(), help="Run id. With one that is there: returns that run, or starts it.")
@overrides_option
@click.option("--wait", is_flag=True, help="Follow to the end; exit with the trainer's code.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, start nothing.")
@yes_option
@click.option(
    "--max-cost",
    type=click.FloatRange(min=0, min_open=True),
    metavar="USD",
    help="Never spend more on the run, all its attempts and executions together.",
)
@price_table_option
@target_option
@json_option
def command(
    recipe: Path,
    run_id: str | None,
    overrides: tuple[str, ...],
    wait: bool,
    dry_run: bool,
    yes: bool,
    max_cost: float | None,
    price_table: Path | None,
    target: str | None,
    as_json: bool,
) -> None:
    """Start a fine-tuning run from a recipe, a TOML file.

    Prints the plan with its predicted memory, time and price on stderr, and refuses what does not fit. Then the run id
    on stdout, and how to follow, cancel and fetch on stderr.

    \b
    Examples:
      g4kit launch recipes/digits-tiny.toml --wait
      g4kit launch recipes/digits-tiny.toml --set training.learning_rate=1e-3 --dry-run
    """
    from g4kit import budget, estimate_text
    from g4kit.estimating_inputs import estimate_for
    from g4kit.launching import launch, plan_launch, priced
    from g4kit.pricing import price_table as read_table
    from g4kit.waiting import or_leave_beginning, print_started, wait_and_exit

    table = read_table(price_table)
    cloud = open_cloud(target)
    plan = plan_launch(cloud, recipe, overrides, run_id)
    estimate = estimate_for(cloud.bucket, plan.recipe, target=cloud.target, table=table)
    say(estimate_text.text(estimate, terminal_columns(sys.stderr)))
    estimate.refuse()
    plan = priced(dataclasses.replace(plan, recipe=estimate.recipe), estimate, max_cost)
    if plan.prices and "limits" in plan.prices:
        say(f"--max-cost {max_cost:g}: {budget.describe(plan.prices['limits'])}")
    if dry_run:
        document = dataclasses.asdict(plan) | {
            "recipe": plan.recipe.model_dump(mode="json"),
            "hash": plan.recipe.hash,
            "estimate": estimate.to_json(),
        }
        say("dry run: everything needed is there; nothing was started")
        if as_json:
            print_json(document)
        else:
            print_data(plan.run_id)
        return
    if not estimate.hardware.is_here and not yes:
        click.confirm("start it?", abort=True, err=True)
    execution = or_leave_beginning(
        lambda: launch(cloud, plan), plan.run_id, f"the same command with --id {plan.run_id}"
    )
    say(f"run {plan.run_id}: {execution.state}, execution {execution.name}")
    if wait:
        wait_and_exit(cloud, plan.run_id, as_json)
    print_started(cloud, plan.run_id, as_json)
