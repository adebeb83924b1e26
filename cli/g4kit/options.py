"""Arguments and options that several commands share."""

import os
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from g4kit.errors import UserError


class RunId(click.ParamType[str]):
    """A run id, checked before anything is made of it: it becomes a folder's name."""

    name = "run id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from g4trainer.rundir import RunIdError, check_run_id

        try:
            return check_run_id(value)
        except RunIdError as error:
            raise UserError(str(error)) from error

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The runs of the local bucket; asking a cloud at every key would be slow."""
        from g4kit.targets import open_local

        return [
            CompletionItem(name)
            for name in open_local(os.environ).bucket.folders("runs/")
            if name.startswith(incomplete)
        ]


run_id_argument = click.argument("run_id", metavar="ID", type=RunId())
overrides_option = click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Replace one value of the recipe."
)
target_option = click.option(
    "--target",
    envvar="G4KIT_TARGET",
    metavar="local|cloudrun|vertex",
    help="Where runs live. Also G4KIT_TARGET. Default: cloudrun where G4KIT_DEPLOYMENT names a deployment, else local, "
    "the folder .g4kit or G4KIT_ROOT.",
)
accelerator_option = click.option(
    "--accelerator", metavar="NAME", help="GPU of a cloud target to work on. Default: the run's. See docs/limits.md."
)
yes_option = click.option(
    "--yes", "-y", is_flag=True, help="Do not ask before spending money. The local target spends none."
)
provisioning_option = click.option(
    "--provisioning",
    type=click.Choice(["on-demand", "spot", "flex-start"]),
    help="How Vertex AI gets the machine. Default: as the run's.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
price_table_option = click.option(
    "--price-table",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prices that g4kit does not know, or knows otherwise: see docs/cost.md. Also G4KIT_PRICE_TABLE.",
)
