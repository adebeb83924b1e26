"""The configuration templates: what reads them accepts them, and the committed samples are what is written today."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.bench import Bench
from g4kit import estimating, machine, render
from g4kit.pricing import prices_of
from g4trainer import gemma
from g4trainer.limits import ACCELERATORS
from g4trainer.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SAMPLES: dict[str, gemma.Size] = {"oxford-pets-31b": "31B", "oxford-pets-e4b": "E4B"}
RTX, L4 = "nvidia-rtx-pro-6000", "nvidia-l4"


def rendered(name: str, *overrides: str, place: render.Place | None = None) -> dict[str, str]:
    recipe = load_recipe(RECIPES / f"{name}.toml", overrides)
    card = recipe.job.accelerator
    estimate = estimating.estimate(
        recipe,
        gemma.true_config(SAMPLES[name]),
        machine.of_accelerator(card),
        prices=prices_of(card),
        samples=estimating.expected_samples(recipe),
    )
    return render.templates(estimate, place or render.Place())


@pytest.mark.parametrize("name", SAMPLES)
def test_the_committed_samples_are_in_step(name: str) -> None:
    folder = RECIPES / "templates" / name
    committed = {path.name: path.read_text() for path in folder.iterdir()}
    how = f"run: g4kit templates recipes/{name}.toml --out recipes/templates/{name}"
    assert committed == rendered(name), how


def test_every_sample_is_held_in_step() -> None:
    assert {path.name for path in (RECIPES / "templates").iterdir()} == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_transformers_and_peft_load_them(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig
    from transformers import TrainingArguments

    files = rendered(name)
    asked = json.loads(files[render.TRAINING_ARGS])
    # Without a GPU bf16 is refused unless use_cpu is set, which turns pinned memory off.
    here = {"use_cpu": True, "dataloader_pin_memory": False, "output_dir": str(tmp_path)}
    arguments = TrainingArguments(**{**asked, **here})
    assert arguments.accelerator_config.non_blocking
    for key, value in asked.items():
        if key not in here and key != "accelerator_config":
            assert getattr(arguments, key) == value, key
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 8
    settings = LoraConfig(**json.loads(files[render.LORA_CONFIG]))
    assert (settings.r, settings.lora_alpha, settings.target_modules) == (64, 64, "all-linear")


@pytest.mark.parametrize("name", SAMPLES)
def test_the_job_parses_into_the_types_of_the_api(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.toml")
    gpu = ACCELERATORS[recipe.job.accelerator]
    job = as_v2(yaml.safe_load(rendered(name)[render.JOB]))
    task = job.template.template
    assert (job.template.task_count, job.template.parallelism) == (1, 1)
    assert task.node_selector.accelerator == recipe.job.accelerator
    assert (task.timeout.total_seconds(), task.max_retries) == (recipe.job.timeout_s, recipe.job.max_attempts - 1)
    assert task.gpu_zonal_redundancy_disabled
    (container,) = task.containers
    assert dict(container.resources.limits) == {
        "cpu": str(gpu.min_cpu),
        "memory": f"{gpu.min_memory_gib}Gi",
        "nvidia.com/gpu": "1",
    }
    assert list(container.args) == ["run", "--recipe", f"/mnt/gcs/recipes/{name}.toml"]
    assert {one.name: one.value for one in container.env} == {
        "G4KIT_ROOT": "/mnt/gcs",
        "G4KIT_METADATA_AGE_S": "5",
        "G4KIT_ATTEMPT_TIMEOUT_S": str(recipe.job.timeout_s),
    }
    (volume,) = task.volumes
    assert volume.gcs.bucket == "BUCKET"
    assert not volume.gcs.read_only
    assert [mount.name for mount in container.volume_mounts] == [volume.name]


def test_the_mount_is_that_of_terraform() -> None:
    text = (RECIPES.parent / "terraform" / "job.tf").read_text()
    options = [line.strip(' ",') for line in text.partition("mount_options = [")[2].partition("]")[0].splitlines()]
    age = f"metadata_age_s = {render.METADATA_AGE_S}\n"
    assert age in text
    written = ",".join(option for option in options if option)
    assert written.replace("${local.metadata_age_s}", str(render.METADATA_AGE_S)) == render.MOUNT_OPTIONS
    assert f'mount_path  = "{render.MOUNT_PATH}"' in text


def test_values_of_the_place_are_written() -> None:
    place = render.Place("p", "europe-west4", "b", "i@sha256:0", "s@p", cpu=30, memory_gib=120, zonal_redundancy=True)
    job = as_v2(yaml.safe_load(rendered("oxford-pets-31b", place=place)[render.JOB]))
    task = job.template.template
    (container,) = task.containers
    assert (container.image, task.service_account, task.volumes[0].gcs.bucket) == ("i@sha256:0", "s@p", "b")
    assert (container.resources.limits["cpu"], container.resources.limits["memory"]) == ("30", "120Gi")
    assert not task.gpu_zonal_redundancy_disabled


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    *((RTX, {"region": name}, "region", "jobs/gpu") for name in ("us-east4", "europe-west1", "us-west1", "me-west1")),
    *((L4, {"region": name}, "region", "jobs/gpu") for name in ("us-west1", "europe-west2", "asia-northeast1")),
    *((RTX, {"cpu": count}, "cpu", "jobs/gpu") for count in (4, 8, 16, 19, 45)),
    *((L4, {"cpu": count}, "cpu", "jobs/gpu") for count in (1, 2, 3, 48)),
    *((RTX, {"memory_gib": count}, "memory_gib", "jobs/gpu") for count in (16, 79, 177)),
    *((L4, {"memory_gib": count}, "memory_gib", "jobs/gpu") for count in (8, 15, 200)),
    *((name, {}, "accelerator", "jobs/gpu") for name, gpu in ACCELERATORS.items() if "cloudrun" not in gpu.platforms),
]


def test_at_least_twenty_combinations_are_refused_below() -> None:
    assert len(REFUSED) >= 20


@pytest.mark.parametrize(("accelerator", "place", "field", "source"), REFUSED)
def test_what_cloud_run_refuses(accelerator: str, place: dict[str, Any], field: str, source: str) -> None:
    recipe: Recipe = load_recipe(RECIPES / "oxford-pets-e2b.toml", [f"job.accelerator={accelerator}"])
    with pytest.raises(render.TemplateError) as refused:
        render.cloud_run_job(recipe, dataclasses.replace(render.Place(), **place))
    lines = str(refused.value).splitlines()
    assert any(line.startswith(f"{field}: got ") and "; write " in line and source in line for line in lines), lines


def test_the_command_writes_them(bare: Bench) -> None:
    out = bare.folder / "templates"
    arguments = ("--out", out, "--project", "mine", "--bucket", "a-bucket")
    result = bare("templates", RECIPES / "oxford-pets-e4b.toml", *arguments)
    assert result.exit_code == 0, result.stderr
    assert [Path(line).name for line in result.stdout.splitlines()] == sorted(
        (render.TRAINING_ARGS, render.LORA_CONFIG, render.JOB), key=result.stdout.index
    )
    assert "placeholders are left for: image, service_account" in result.stderr
    written = (out / render.JOB).read_text()
    assert 'bucketName: "a-bucket"' in written
    assert "--project=mine" in written


def test_the_command_refuses_what_cannot_be(bare: Bench) -> None:
    pets = RECIPES / "oxford-pets-31b.toml"
    out = bare.folder / "templates"
    small = bare("templates", pets, "--out", out, "--set", f"job.accelerator={L4}")
    assert small.exit_code == 1
    assert "write --set job.accelerator=nvidia-rtx-pro-6000." in small.stderr
    unknown = bare("templates", pets, "--out", out, "--set", "data.dataset=mine")
    assert unknown.exit_code == 2
    assert "whose size is not known; write numbers" in unknown.stderr
    assert not out.exists()
    blocked = bare.folder / "file"
    blocked.write_text("")
    result = bare("templates", pets, "--out", blocked / "in")
    assert result.exit_code == 2
    assert "--out: got" in result.stderr


def as_v2(manifest: dict[str, Any]) -> Any:
    """A v1 manifest, as `gcloud run jobs replace` takes it, in the types of the v2 API; every key must be known."""
    from google.cloud import run_v2

    assert (manifest.pop("apiVersion"), manifest.pop("kind")) == ("run.googleapis.com/v1", "Job")
    labels = manifest.pop("metadata")["labels"]
    assert labels == {"cloud.googleapis.com/location": labels["cloud.googleapis.com/location"]}
    execution = manifest.pop("spec").pop("template")
    notes = execution.pop("metadata").pop("annotations")
    outer = execution.pop("spec")
    task = outer.pop("template").pop("spec")
    (volume,) = task.pop("volumes")
    disk = volume.pop("csi")
    assert disk.pop("driver") == "gcsfuse.run.googleapis.com"
    attributes = disk.pop("volumeAttributes")
    (container,) = task.pop("containers")
    mounts = [
        run_v2.VolumeMount(name=one.pop("name"), mount_path=one.pop("mountPath"))
        for one in container.pop("volumeMounts")
    ]
    template = run_v2.TaskTemplate(
        containers=[
            run_v2.Container(
                resources=run_v2.ResourceRequirements(limits=container.pop("resources").pop("limits")),
                env=[run_v2.EnvVar(**one) for one in container.pop("env")],
                volume_mounts=mounts,
                **container,
            )
        ],
        volumes=[
            run_v2.Volume(
                name=volume.pop("name"),
                gcs=run_v2.GCSVolumeSource(
                    bucket=attributes.pop("bucketName"),
                    mount_options=attributes.pop("mountOptions").split(","),
                    read_only=disk.pop("readOnly"),
                ),
            )
        ],
        max_retries=task.pop("maxRetries"),
        timeout=f"{task.pop('timeoutSeconds')}s",
        service_account=task.pop("serviceAccountName"),
        node_selector=run_v2.NodeSelector(accelerator=task.pop("nodeSelector").pop("run.googleapis.com/accelerator")),
        execution_environment=f"EXECUTION_ENVIRONMENT_{notes.pop('run.googleapis.com/execution-environment').upper()}",
        gpu_zonal_redundancy_disabled=notes.pop("run.googleapis.com/gpu-zonal-redundancy-disabled") == "true",
    )
    job = run_v2.Job(
        template=run_v2.ExecutionTemplate(
            task_count=outer.pop("taskCount"), parallelism=outer.pop("parallelism"), template=template
        )
    )
    left = [part for part in (manifest, execution, notes, outer, task, volume, disk, attributes) if part]
    assert not left, left
    return job
