import os

import click

from g4kit.cloud.local import trainer_command, trainer_problems
from g4kit.errors import UserError
from g4kit.options import json_option, target_option
from g4kit.output import print_data, print_json, say, size
from g4kit.targets import open_cloud


@click.group("stage", short_help="Copy a base model or a data set into the bucket.")
def command() -> None:
    """Copy a base model or a data set into the bucket, where recipes find them by name.

    \b
    Examples:
      g4kit stage model builtin:tiny-gemma4
      g4kit stage data ./my-photos --name my-photos
    """


@command.command("model")
@click.argument("source")
@click.option("--name", help="Name in the bucket; a recipe's model.id. Default: the source's own name.")
@target_option
@json_option
def model(source: str, name: str | None, target: str | None, as_json: bool) -> None:
    """Stage a base model: builtin:tiny-gemma4, or a folder in Hugging Face's layout.

    \b
    Example:
      g4kit stage model ~/weights/gemma-4-E2B-it
    """
    _stage("model", source, name, target, as_json)


@command.command("data")
@click.argument("source")
@click.option("--name", help="Name in the bucket; a recipe's data.dataset. Default: the source's own name.")
@target_option
@json_option
def data(source: str, name: str | None, target: str | None, as_json: bool) -> None:
    """Stage a data set: builtin:digits, or a folder of parquet, images or chat JSONL.

    \b
    Example:
      g4kit stage data builtin:digits
    """
    _stage("data", source, name, target, as_json)


def _stage(kind: str, source: str, name: str | None, target: str | None, as_json: bool) -> None:
    from g4kit.staging import stage

    cloud = open_cloud(target)
    trainer = trainer_command(os.environ)
    problems = trainer_problems(trainer) if source.startswith("builtin:") else []
    if problems:
        raise UserError("\n".join(problems))
    staged = stage(cloud.bucket, kind, source, name, trainer=trainer, say=say)
    how = "already staged" if staged.already else "staged"
    say(f"{how}: {staged.files} files, {size(staged.size)}")
    if as_json:
        print_json({"folder": staged.folder, "files": staged.files, "size": staged.size, "already": staged.already})
    else:
        print_data(staged.folder)
