import os
import sys
from pathlib import Path

import click

from g4kit.options import json_option, overrides_option, price_table_option, target_option
from g4kit.output import print_data, print_json, say, terminal_columns
from g4kit.targets import open_cloud


@click.command("estimate", short_help="Say what a run will take of memory, time and money.")
@click.argument("recipe", type=click.Path(path_type=Path))
@overrides_option
@click.option("--compare", is_flag=True, help="Every card side by side, instead of the recipe's alone.")
@click.option("--region", help="Whose prices count. Default: the deployment's, or without one us-central1.")
@price_table_option
@target_option
@json_option
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    compare: bool,
    region: str | None,
    price_table: Path | None,
    target: str | None,
    as_json: bool,
) -> None:
    """Say what a run will take of memory, time and money, without starting it.

    It goes by the recipe's accelerator; with --target local by this machine. Exits with 1 where it does not fit.

    \b
    Examples:
      g4kit estimate recipes/oxford-pets-31b.toml
      g4kit estimate recipes/oxford-pets-31b.toml --set job.accelerator=nvidia-l4
      g4kit estimate recipes/oxford-pets-e4b.toml --compare
    """
    from g4kit import estimate_text, pricing
    from g4kit.estimating_inputs import compare_cards, estimate_for, load, not_compared, region_of

    asked = load(recipe, overrides)
    table = pricing.price_table(price_table)
    cloud = open_cloud(target)
    if compare:
        estimates = compare_cards(cloud.bucket, asked, table=table, region=region or region_of(None, os.environ))
        if as_json:
            print_json({name: found.to_json() for name, found in estimates})
        else:
            print_data(estimate_text.comparison(estimates))
            for line in not_compared(asked):
                say(line)
        sys.exit(0 if any(found.fits for _, found in estimates) else 1)
    where = target or (cloud.target if cloud.target != "local" else None)
    found = estimate_for(cloud.bucket, asked, target=where, table=table, region=region)
    if as_json:
        print_json(found.to_json())
    else:
        print_data(estimate_text.text(found, terminal_columns(sys.stdout)))
    sys.exit(0 if found.fits else 1)
