"""Configuration templates of a recipe: what the trainer would write, and a Cloud Run job that runs it without the CLI.

Pure: a recipe and a place go in, the text of three files comes out.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g4kit.errors import UserError
from g4kit.estimating import Estimate
from g4trainer.limits import ACCELERATORS, job_problems
from g4trainer.planner import choose_plan, training_arguments
from g4trainer.recipe import Recipe, lora_config

TRAINING_ARGS, LORA_CONFIG, JOB = "training_args.json", "lora_config.json", "cloud_run_job.yaml"
MOUNT_PATH = "/mnt/gcs"
METADATA_AGE_S = 5
MOUNT_OPTIONS = f"uid=10001,gid=10001,file-mode=640,dir-mode=750,implicit-dirs,metadata-cache-ttl-secs={METADATA_AGE_S}"
"""As in terraform/job.tf: the image's user, and metadata no older than an attempt waits for."""


class TemplateError(UserError):
    """A recipe, or a place, that Cloud Run would refuse. Lists every problem."""


@dataclass(frozen=True)
class Place:
    """Where a job runs. The defaults are placeholders to replace."""

    project: str = "PROJECT_ID"
    region: str = "us-central1"
    bucket: str = "BUCKET"
    image: str = "us-central1-docker.pkg.dev/PROJECT_ID/g4kit/trainer:TAG"
    service_account: str = "g4kit-runtime@PROJECT_ID.iam.gserviceaccount.com"
    cpu: int | None = None
    """None takes the least that Cloud Run asks for beside the GPU."""
    memory_gib: int | None = None
    zonal_redundancy: bool = False


def templates(estimate: Estimate, place: Place) -> dict[str, str]:
    """The files by name. Raises TemplateError with every problem."""
    recipe, fit, samples = estimate.recipe, estimate.fit, estimate.samples
    if samples is None:
        raise TemplateError(
            f"data.train_size and data.test_size: got {recipe.data.train_size} and {recipe.data.test_size} of "
            f"{recipe.data.dataset}, whose size is not known; write numbers, for example --set data.train_size=1000."
        )
    plan = choose_plan(
        recipe,
        train_samples=samples.train,
        validation_samples=samples.validation,
        micro_batch=fit.micro_batch,
        activation_checkpointing=fit.activation_checkpointing,
        evaluation_batch_size=fit.evaluation_batch_size,
    )
    return {
        TRAINING_ARGS: _json(training_arguments(recipe, plan, device="cuda", output_dir="output")),
        LORA_CONFIG: _json(lora_config(recipe.lora, base_model=recipe.model.id)),
        JOB: cloud_run_job(recipe, place),
    }


def cloud_run_job(recipe: Recipe, place: Place) -> str:
    """What `gcloud run jobs replace` takes. Raises TemplateError with all that Cloud Run would refuse."""
    gpu, job = ACCELERATORS[recipe.job.accelerator], recipe.job
    cpu, memory = place.cpu or gpu.min_cpu or 1, place.memory_gib or gpu.min_memory_gib or 1
    problems = job_problems(
        accelerator=job.accelerator,
        region=place.region,
        cpu=cpu,
        memory_gib=memory,
        timeout_s=job.timeout_s,
        max_retries=job.max_attempts - 1,
    )
    if problems:
        raise TemplateError("\n".join(problems))
    values: Mapping[str, Any] = {
        "name": f"g4kit-{recipe.name}",
        "region": place.region,
        "redundancy_disabled": str(not place.zonal_redundancy).lower(),
        "retries": job.max_attempts - 1,
        "timeout_s": job.timeout_s,
        "metadata_age_s": METADATA_AGE_S,
        "service_account": place.service_account,
        "accelerator": job.accelerator,
        "image": place.image,
        "recipe": f"{MOUNT_PATH}/recipes/{recipe.name}.toml",
        "cpu": str(cpu),
        "memory": f"{memory}Gi",
        "mount_path": MOUNT_PATH,
        "bucket": place.bucket,
        "mount_options": MOUNT_OPTIONS,
    }
    quoted = {key: value if isinstance(value, int) else json.dumps(value) for key, value in values.items()}
    return _JOB.format(
        **quoted, plain_name=recipe.name, plain_bucket=place.bucket, plain_region=place.region, project=place.project
    )


def write(folder: Path, files: Mapping[str, str]) -> list[Path]:
    """Writes the files; those of the same name are replaced. Raises TemplateError where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise TemplateError(f"--out: got {folder}: {error.strerror}; write a folder that can be written.") from error
    return [folder / name for name in files]


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"


_JOB = """\
# A Cloud Run job that trains this recipe without the command line. Once:
#   gcloud storage cp {plain_name}.toml gs://{plain_bucket}/recipes/{plain_name}.toml
#   gcloud run jobs replace cloud_run_job.yaml --project={project} --region={plain_region}
# then, for each run:
#   gcloud run jobs execute g4kit-{plain_name} --project={project} --region={plain_region}
apiVersion: run.googleapis.com/v1
kind: Job
metadata:
  name: {name}
  labels:
    cloud.googleapis.com/location: {region}
spec:
  template:
    metadata:
      annotations:
        run.googleapis.com/execution-environment: gen2
        run.googleapis.com/gpu-zonal-redundancy-disabled: {redundancy_disabled}
    spec:
      taskCount: 1
      parallelism: 1
      template:
        spec:
          # An attempt commits a checkpoint before its timeout and exits; the retry goes on from there.
          timeoutSeconds: {timeout_s}
          maxRetries: {retries}
          serviceAccountName: {service_account}
          nodeSelector:
            run.googleapis.com/accelerator: {accelerator}
          containers:
            - name: trainer
              image: {image}
              args: ["run", "--recipe", {recipe}]
              env:
                - name: G4KIT_ROOT
                  value: {mount_path}
                - name: G4KIT_METADATA_AGE_S
                  value: "{metadata_age_s}"
                - name: G4KIT_ATTEMPT_TIMEOUT_S
                  value: "{timeout_s}"
              resources:
                limits:
                  cpu: {cpu}
                  memory: {memory}
                  nvidia.com/gpu: "1"
              volumeMounts:
                - name: bucket
                  mountPath: {mount_path}
          volumes:
            - name: bucket
              csi:
                driver: gcsfuse.run.googleapis.com
                readOnly: false
                volumeAttributes:
                  bucketName: {bucket}
                  mountOptions: {mount_options}
"""
