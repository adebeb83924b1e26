import os
import subprocess
from pathlib import Path

import click

from g4kit.cloud.local import trainer_command, trainer_problems
from g4kit.errors import UserError
from g4kit.options import json_option


@click.command("preflight", short_help="Check a recipe's model, LoRA targets and data before anything is paid for.")
@click.argument("subject", metavar="RECIPE")
@click.option("--samples", type=click.IntRange(min=1), default=8, help="Training samples whose tokens are checked.")
@json_option
@click.pass_context
def command(ctx: click.Context, subject: str, samples: int, as_json: bool) -> None:
    """Check a recipe's model, LoRA targets and data before anything is paid for, on this machine.

    What is staged on this machine is checked as deeply as it allows: the staged data's samples token by token, and
    one real step where there is a GPU or the model is tiny. Instead of a recipe, write a size (E2B, E4B, 26B-A4B or
    31B) or a model folder to see its LoRA targets alone. Exits with 1 where a check fails.

    \b
    Examples:
      g4kit preflight recipes/digits-tiny.toml
      g4kit preflight 31B
    """
    trainer = trainer_command(os.environ)
    problems = trainer_problems(trainer)
    if problems:
        raise UserError("\n".join(problems))
    what = ["--recipe", subject] if subject.endswith(".toml") or Path(subject).is_file() else [subject]
    arguments = [*trainer, "preflight", *what, "--samples", str(samples), *(["--json"] if as_json else [])]
    ctx.exit(subprocess.run(arguments, check=False).returncode)
