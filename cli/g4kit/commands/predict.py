import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from g4kit.options import accelerator_option, provisioning_option, run_id_argument, target_option, yes_option
from g4kit.output import print_data, print_json, say
from g4kit.targets import open_cloud

if TYPE_CHECKING:
    from g4kit.predicting import Answer

IMAGE_WIDTH, BEFORE_WIDTH = 48, 28
"""Columns that the name of an image and the answer before training take at most."""


@click.command("predict", short_help="Try a finished run's adapter on images of your own.")
@run_id_argument
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path(path_type=Path))
@click.option("--before", "which", flag_value="before", help="Ask the base model, without the adapter.")
@click.option("--both", "which", flag_value="both", help="Ask the base model and the adapter.")
@click.option("--prompt", help="The question, for a run that was trained on chats. Others have their recipe's.")
@yes_option
@accelerator_option
@provisioning_option
@target_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, at the end.")
def command(
    run_id: str,
    images: tuple[Path, ...],
    which: str | None,
    prompt: str | None,
    yes: bool,
    accelerator: str | None,
    provisioning: str | None,
    target: str | None,
    as_json: bool,
) -> None:
    """Try a finished run's adapter on images of your own: files, or folders of them.

    Prompt, processor and decoding are those of the run's evaluation, so an image of the test set gets the same answer.
    On the local target this machine answers; on a cloud target one execution does, on one GPU of the run's kind.

    \b
    Examples:
      g4kit predict digits-tiny-20260101-120000-0a1b one.png two.png
      g4kit predict digits-tiny-20260101-120000-0a1b photos/ --both --json
    """
    from g4kit.one_gpu import on_one_gpu
    from g4kit.paying import confirm_execution
    from g4kit.predicting import Request, find_images, predict, require_finished

    cloud = open_cloud(target)
    request = Request(run_id, find_images(images), which or "after", prompt)
    where = on_one_gpu(require_finished(cloud, run_id), cloud.target, accelerator, provisioning)
    confirm_execution(cloud, where, yes=yes)
    answers = predict(cloud, where, request, say)
    if as_json:
        print_json({"run_id": run_id, "answers": list(answers)})
        return
    for line in table(answers, request.which, max(len(str(path)) for path in request.images)):
        print_data(line)


def stdout_is_terminal() -> bool:
    return sys.stdout.isatty()


def table(answers: "Iterator[Answer]", which: str, longest: int) -> Iterator[str]:
    """A line an image, as they are answered, so widths are chosen beforehand; cut to fit only on a terminal.

    longest: characters of the longest image's name.
    """
    columns = shutil.get_terminal_size().columns if stdout_is_terminal() else None
    heads = {"after": ["ANSWER"], "before": ["BEFORE"], "both": ["BEFORE", "AFTER"]}[which]
    widths = [max(longest, len("IMAGE")), *(BEFORE_WIDTH for _ in heads[1:])]
    if columns:
        share = columns // (len(heads) + 1) - 2
        widths = [
            min(width, most, max(share, 8)) for width, most in zip(widths, (IMAGE_WIDTH, BEFORE_WIDTH), strict=False)
        ]
    changed = count = 0
    for answer in answers:
        if count == 0:
            yield _line(["IMAGE", *heads], widths, columns)
        said = [_text(answer[part]) for part in ("before", "after") if answer[part]]
        changed += len(set(said)) == 2
        count += 1
        name = answer["image"]
        cut = f"…{name[1 - widths[0] :]}" if len(name) > widths[0] else name
        yield _line([cut, *said], widths, columns)
    say(f"{count} images" + (f", {changed} answered differently after training" if which == "both" else ""))


def _line(cells: list[str], widths: list[int], columns: int | None) -> str:
    """columns: of the terminal; None cuts nothing."""
    *padded, last = cells
    shown = [_cut(cell, width) if columns else cell for cell, width in zip(padded, widths, strict=True)]
    start = "".join(f"{cell:<{width}}  " for cell, width in zip(shown, widths, strict=True))
    return start + (_cut(last, max(columns - len(start), 8)) if columns else last)


def _text(said: dict[str, str | None]) -> str:
    """The answer on one line; in quotes where it names no class."""
    raw = " ".join((said["raw_text"] or "").split())
    return " ".join(said["prediction"].split()) if said["prediction"] else f'no class: "{raw}"'


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
