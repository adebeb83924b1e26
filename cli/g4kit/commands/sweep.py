from pathlib import Path

import click

from g4kit.options import RunId, json_option, target_option, yes_option
from g4kit.output import print_data, print_json, say
from g4kit.targets import open_cloud


@click.command("sweep", short_help="Start a run for every point of a grid, all in one execution.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--grid", "grids", multiple=True, metavar="SECTION.KEY=VALUE,VALUE", help="Values of one key; more keys multiply."
)
@click.option("--random", "count", type=click.IntRange(min=1), metavar="N", help="N points of the grid, by chance.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Which points --random takes. Default: 0.")
@click.option("--id", "sweep_id", type=RunId(), help="Sweep id. With one that is there: returns it, or starts it.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Replace one value in all points.")
@click.option("--wait", is_flag=True, help="Follow to the end; exit with 0 once all points have succeeded.")
@click.option("--dry-run", is_flag=True, help="Check every point, print the plan, start nothing.")
@yes_option
@click.option(
    "--max-cost", type=click.FloatRange(min=0, min_open=True), metavar="USD", help="Never spend more on all points."
)
@target_option
@json_option
def command(
    recipe: Path,
    grids: tuple[str, ...],
    count: int | None,
    seed: int,
    sweep_id: str | None,
    overrides: tuple[str, ...],
    wait: bool,
    dry_run: bool,
    yes: bool,
    max_cost: float | None,
    target: str | None,
    as_json: bool,
) -> None:
    """Start a run for every point of a grid, all in one execution: a task for each on Cloud Run, one after another on
    this machine. Every point is checked and priced before anything is written; each is retried and resumed alone.

    \b
    Examples:
      g4kit sweep recipes/digits-tiny.toml --grid lora.r=16,64 --grid training.learning_rate=1e-3,2e-3
      g4kit sweep recipes/digits-tiny.toml --grid lora.r=4,8,16 --grid training.learning_rate=5e-4,1e-3,2e-3 --random 5
    """
    from g4kit.estimating_inputs import estimate_for
    from g4kit.grid import choose_points, parse_axes
    from g4kit.sweep_text import plan_json, plan_text
    from g4kit.sweep_waiting import print_started, wait_and_exit
    from g4kit.sweeping import launch_sweep, parallelism_of, plan_sweep, priced_sweep
    from g4kit.waiting import or_leave_beginning

    points = choose_points(parse_axes(grids, overrides), count=count, seed=seed)
    cloud = open_cloud(target)
    plan = plan_sweep(
        cloud,
        recipe,
        points,
        overrides,
        sweep_id=sweep_id,
        estimate=lambda one: estimate_for(cloud.bucket, one, target=cloud.target),
        drawn=None if count is None else {"count": count, "seed": seed},
    )
    say(plan_text(plan, parallelism_of(cloud.target, plan.points[0].launch.recipe, len(plan.points))))
    capped = priced_sweep(plan, max_cost)
    job = capped.points[0].launch.recipe.job
    if job != plan.points[0].launch.recipe.job:
        say(f"--max-cost {max_cost:g}: at most {job.max_attempts} attempts of {job.timeout_s} s a point")
    if dry_run:
        say("dry run: everything needed is there; nothing was started")
        if as_json:
            print_json(plan_json(capped))
        else:
            print_data(plan.sweep_id)
        return
    if not all(point.estimate.hardware.is_here for point in plan.points) and not yes:
        click.confirm(f"start all {len(plan.points)}?", abort=True, err=True)
    execution = or_leave_beginning(
        lambda: launch_sweep(cloud, capped), plan.sweep_id, f"the same command with --id {plan.sweep_id}"
    )
    say(f"sweep {plan.sweep_id}: {execution.state}, execution {execution.name}, {len(plan.points)} tasks")
    if wait:
        wait_and_exit(cloud, plan.sweep_id, as_json)
    print_started(cloud, plan.sweep_id, as_json)
