from pathlib import Path
from typing import Any

import click

from g4kit.options import overrides_option, target_option
from g4kit.output import print_data, say
from g4kit.targets import open_cloud


@click.command("templates", short_help="Write a recipe's configuration files, for use without this command line.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the files.")
@overrides_option
@click.option("--project", help="Google Cloud project. Left out, the file says PROJECT_ID.")
@click.option("--region", help="Cloud Run region. Default: us-central1.")
@click.option("--bucket", help="Bucket that the job mounts. Left out, the file says BUCKET.")
@click.option("--image", help="The trainer's image, with its tag or digest.")
@click.option("--service-account", help="E-mail of the account that the job runs as.")
@target_option
def command(recipe: Path, out: Path, overrides: tuple[str, ...], target: str | None, **place: str | None) -> None:
    """Write a recipe's configuration files, for use without this command line.

    training_args.json is for transformers.TrainingArguments, lora_config.json for peft.LoraConfig, cloud_run_job.yaml
    for `gcloud run jobs replace`.

    \b
    Example:
      g4kit templates recipes/oxford-pets-31b.toml --out templates --project my-project --bucket my-bucket
    """
    from g4kit.estimating_inputs import estimate_for, load
    from g4kit.render import Place, templates, write

    asked = load(recipe, overrides)
    cloud = open_cloud(target)
    estimate = estimate_for(cloud.bucket, asked, target=None)
    estimate.refuse()
    stated: dict[str, Any] = {name: value for name, value in place.items() if value is not None}
    files = templates(estimate, Place(**stated))
    for path in write(out, files):
        print_data(str(path))
    missing = sorted({"project", "bucket", "image", "service_account"} - stated.keys())
    if missing:
        say(f"placeholders are left for: {', '.join(missing)}")
