import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import click

from g4kit.cloud.local import trainer_command, trainer_problems
from g4kit.errors import FAILED, UserError
from g4kit.options import json_option, overrides_option
from g4kit.output import print_data, print_json, say

if TYPE_CHECKING:
    from g4kit.estimating import Estimate


@click.command("preflight", short_help="Check a recipe's model, LoRA targets and data before anything is paid for.")
@click.argument("subject", metavar="RECIPE")
@overrides_option
@click.option("--samples", type=click.IntRange(min=1), default=8, help="Training samples whose tokens are checked.")
@json_option
@click.pass_context
def command(ctx: click.Context, subject: str, overrides: tuple[str, ...], samples: int, as_json: bool) -> None:
    """Check a recipe's model, LoRA targets and data before anything is paid for, on this machine.

    What is staged on this machine is checked as deeply as it allows: the staged data's samples token by token, and
    one real step where there is a GPU or the model is tiny. Instead of a recipe, write a size (E2B, E4B, 26B-A4B or
    31B) or a model folder to see its LoRA targets alone. For a recipe, memory, time and price on its own card are
    estimated too. Exits with 1 where a check fails, or where it does not fit.

    \b
    Examples:
      g4kit preflight recipes/digits-tiny.toml
      g4kit preflight recipes/digits-tiny.toml --set lora.r=16
      g4kit preflight 31B
    """
    trainer = trainer_command(os.environ)
    problems = trainer_problems(trainer)
    if problems:
        raise UserError("\n".join(problems))
    is_recipe = subject.endswith(".toml") or Path(subject).is_file()
    if overrides and not is_recipe:
        raise UserError(f"--set: replaces values of a recipe, and {subject} is none; leave it out, or write a recipe.")
    estimate = _estimate(Path(subject), overrides) if is_recipe else None
    what = ["--recipe", subject, *(word for one in overrides for word in ("--set", one))] if is_recipe else [subject]
    arguments = [*trainer, "preflight", *what, "--samples", str(samples)]
    if as_json:
        ended = subprocess.run([*arguments, "--json"], check=False, stdout=subprocess.PIPE)
        _print_document(ended.stdout, estimate)
    else:
        ended = subprocess.run(arguments, check=False)
    too_large = estimate is not None and not estimate.fits
    ctx.exit(ended.returncode or (FAILED if too_large else 0))


def _estimate(recipe: Path, overrides: tuple[str, ...]) -> "Estimate | None":
    """For the recipe's own card, printed; None, and why, where it cannot be made: the checks themselves say more."""
    from g4kit import estimate_text
    from g4kit.estimating_inputs import estimate_for, load
    from g4kit.targets import open_local

    asked = load(recipe, overrides)
    try:
        found = estimate_for(open_local(os.environ).bucket, asked, target=None)
    except UserError as error:
        say(f"no estimate: {error}")
        return None
    say(estimate_text.text(found) + "\n")
    return found


def _print_document(printed: bytes, estimate: "Estimate | None") -> None:
    """The trainer's JSON with the estimate in it; whatever else it printed, as it is."""
    try:
        document = json.loads(printed)
    except ValueError:
        print_data(printed.decode(errors="replace").rstrip("\n"))
        return
    print_json(document | {"estimate": estimate.to_json() if estimate else None})
