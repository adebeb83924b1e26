from pathlib import Path
from typing import Any

import click

from g4kit.cloud.base import Cloud
from g4kit.options import (
    accelerator_option,
    json_option,
    provisioning_option,
    run_id_argument,
    target_option,
    yes_option,
)
from g4kit.output import print_data, print_json, say, size
from g4kit.targets import open_cloud
from g4kit.waiting import or_leave


@click.command("export", short_help="Write a run's adapter as a model to serve, merged or alone.")
@run_id_argument
@click.option(
    "--format",
    "kind",
    type=click.Choice(["merged", "adapter"]),
    default="merged",
    show_default=True,
    help="The adapter merged into the base model in bf16, or the adapter alone.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write. Default: ID-merged or ID-adapter, here.")
@click.option(
    "--onto",
    type=click.Choice(["bf16", "nf4"]),
    default="bf16",
    show_default=True,
    help="Merge into the base weights as published, or as the run had them: at NF4, dequantized.",
)
@click.option("--no-compare", is_flag=True, help="Do not load the merged model and compare it.")
@yes_option
@accelerator_option
@provisioning_option
@target_option
@json_option
def command(
    run_id: str,
    kind: str,
    out: Path | None,
    onto: str,
    no_compare: bool,
    yes: bool,
    accelerator: str | None,
    provisioning: str | None,
    target: str | None,
    as_json: bool,
) -> None:
    """Write a run's adapter as a model to serve, merged or alone: safetensors, tokenizer, template and a model card.

    A merged model is loaded and compared with the base model under the adapter before it counts as exported; what was
    found is printed and stands in its README.md, with the commands that serve it. On a cloud target one execution
    merges, into the run's folder in the bucket, and the result is copied here.

    \b
    Examples:
      g4kit export digits-tiny-20260101-120000-0a1b
      g4kit export digits-tiny-20260101-120000-0a1b --format adapter --out adapter
    """
    from g4kit.exporting import Options, export_adapter, export_here, require_adapter
    from g4kit.one_gpu import on_one_gpu

    cloud = open_cloud(target)
    frozen = require_adapter(cloud, run_id)
    folder = out or Path(f"{run_id}-{kind}")
    options = Options(onto, not no_compare)
    where = on_one_gpu(frozen.recipe, cloud.target, accelerator, provisioning)
    if kind == "adapter":
        document = export_adapter(cloud, frozen, folder, say)
    elif cloud.target == "local":
        document = export_here(cloud, run_id, folder, options)
    else:
        document = or_leave(
            lambda: _on_the_cloud(cloud, frozen, where, folder, options, yes=yes),
            "what was begun goes on: the same command comes back to it",
        )
    total = sum(entry["size"] for entry in document["files"].values())
    say(f"exported: {len(document['files'])} files, {size(total)}; how to serve it: {folder / 'README.md'}")
    if as_json:
        print_json(document | {"folder": str(folder)})
    else:
        print_data(str(folder))


def _on_the_cloud(cloud: Cloud, frozen: Any, where: Any, folder: Path, options: Any, *, yes: bool) -> dict[str, Any]:
    from g4kit.exporting import fetch_export, running_export, start_there, wait_there
    from g4kit.fetching import read_exported
    from g4kit.paying import confirm_execution
    from g4trainer.model_card import advice, checked

    run_id = frozen.run_id
    if read_exported(cloud.bucket, run_id, options.onto) is None:
        execution = running_export(cloud, run_id, options)
        if execution is None:
            confirm_execution(cloud, where, yes=yes)
            execution = start_there(cloud, frozen, where, options)
        wait_there(cloud, run_id, options, execution, say)
    document = fetch_export(cloud, run_id, options, folder, say)
    say(checked(document["verification"], dequantized=document["base"]["dequantized"]))
    if advice(document):
        say(advice(document))
    return document
