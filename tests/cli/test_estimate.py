"""g4kit estimate, and the same block in launch, as a user sees them."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

import made_up_model
from cli.bench import Bench
from g4kit import estimate_text, estimating, estimating_inputs, machine
from g4kit.budget import BudgetError
from g4kit.errors import FailedError
from g4kit.launching import LaunchPlan, priced
from g4kit.pricing import prices_of
from g4trainer import gemma, vram
from g4trainer.limits import ACCELERATORS
from g4trainer.recipe import Recipe, load_frozen, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
PETS = RECIPES / "oxford-pets-31b.toml"
ROOM = machine.Hardware("a room of 64 GiB", 64 * vram.GIB, 64 * vram.GIB, None, is_gpu=False, is_here=True)
SMALL = dataclasses.replace(ROOM, title="a small machine", free_bytes=2**20)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is the same wherever the tests run."""
    monkeypatch.setattr(estimating_inputs, "this_machine", lambda: ROOM)


def estimated(recipe: Recipe, size: gemma.Size = "31B", card: str = "nvidia-rtx-pro-6000") -> estimating.Estimate:
    samples = estimating.expected_samples(recipe)
    hardware = machine.of_accelerator(card)
    return estimating.estimate(recipe, gemma.true_config(size), hardware, prices=prices_of(card), samples=samples)


def test_estimate_says_memory_plan_time_and_price(bare: Bench) -> None:
    result = bare("estimate", PETS)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "gemma-4-31B-it on NVIDIA RTX PRO 6000 Blackwell, 96 GB: fits"
    assert re.match(r"memory  \[W{7}UL.*\.+\] 84\.\d GiB of 94\.8 that are free$", lines[1])
    shown = {line.split()[1] + line.split()[2]: float(line.split()[-2]) for line in lines if line.endswith(" GiB")}
    assert shown["weightsin"] == 14.3
    assert "plan    micro-batch 4 x 2, activation checkpointing none, evaluation batch 64" in result.stdout
    phases = r"^time    1 h \d+ min \(.* to .*\): load .*, baseline .*, train .*, final "
    assert re.search(phases, result.stdout, re.MULTILINE)
    assert re.search(r"^slices  2 of at most 10 attempts of 1 h 0 min$", result.stdout, re.MULTILINE)
    price = r"^price   \$\d\.\d\d \(\$.* to \$.*\), at worst \$31\.96; \$3\.19 an hour \(us-central1"
    assert re.search(price, result.stdout, re.MULTILINE)
    bucket = r"^bucket  \$1\.90 a month for as long as it keeps the model \(75\.3 GiB\) and the run \(19\.9 GiB\)$"
    assert re.search(bucket, result.stdout, re.MULTILINE)


def test_the_bucket_is_priced_a_month(bare: Bench) -> None:
    """31B: 58.2 GiB in bf16 and 17.0 at NF4; of 534,467,584 parameters, the adapter and three checkpoints."""
    document = json.loads(bare("estimate", PETS, "--json").stdout)["storage"]
    assert document["model"] / vram.GIB == pytest.approx(58.25 + 17.0, abs=0.1)
    assert document["run"] == 534_467_584 * (4 + 3 * 12)
    assert document["usd_a_month"] == pytest.approx((document["model"] + document["run"]) / vram.GIB * 0.020)
    bf16 = bare(
        "estimate", PETS, "--json", "--set", "model.quantization=none", "--set", "training.load_best_model=false"
    )
    fewer = json.loads(bf16.stdout)["storage"]
    assert document["model"] - fewer["model"] == pytest.approx(17.0 * vram.GIB, rel=0.01)
    assert fewer["run"] == 534_467_584 * (4 + 2 * 12)


@pytest.mark.parametrize("name", ["oxford-pets-31b", "oxford-pets-26b-a4b", "oxford-pets-e4b", "oxford-pets-e2b"])
def test_every_recipe_of_the_project_fits_its_card(bare: Bench, name: str) -> None:
    result = bare("estimate", RECIPES / f"{name}.toml", "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["fits"]
    assert document["time"]["total_s"] > 0
    assert document["cost_usd"]["low"] < document["cost_usd"]["expected"] < document["cost_usd"]["worst"]


def test_a_31b_on_an_l4_is_refused_with_the_nearest_that_fits(bare: Bench) -> None:
    result = bare("estimate", PETS, "--set", "job.accelerator=nvidia-l4")
    assert result.exit_code == 1
    assert "does not fit" in result.stdout
    assert "!]" in result.stdout
    assert "to fit  job.accelerator=nvidia-rtx-pro-6000" in result.stdout
    assert "time  " not in result.stdout
    nearest = json.loads(bare("estimate", PETS, "--set", "job.accelerator=nvidia-l4", "--json").stdout)["nearest"]
    assert nearest[0] == 'job.accelerator="nvidia-rtx-pro-6000"'
    assert nearest[-1] == 'model.id="gemma-4-26B-A4B-it"'
    for change in (nearest[0], nearest[-1]):
        arguments = ("--set", "job.accelerator=nvidia-l4", "--set", change.replace('"', ""))
        assert bare("estimate", PETS, *arguments).exit_code == 0


def test_a_stated_micro_batch_that_does_not_fit_is_told_to_be_auto(bare: Bench) -> None:
    stated = ("training.per_device_train_batch_size=8", "training.activation_checkpointing=none")
    result = bare("estimate", PETS, "--set", stated[0], "--set", stated[1])
    assert result.exit_code == 1
    first = next(line for line in result.stdout.splitlines() if line.startswith("to fit"))
    assert first == "to fit  training.per_device_train_batch_size=auto training.activation_checkpointing=auto"
    recipe = load_recipe(PETS, stated)
    with pytest.raises(
        estimating.DoesNotFitError,
        match=r"oxford-pets-31b: training needs 140\.\d GiB, and .* has 94\.8 GiB free; write --set training\.per",
    ):
        estimated(recipe).refuse()


def test_compare_shows_every_card(bare: Bench) -> None:
    result = bare("estimate", PETS, "--compare")
    assert result.exit_code == 0
    rows = {line.split()[0]: line for line in result.stdout.splitlines()[1:]}
    by_the_eight = {"nvidia-h100-mega-80gb", "nvidia-h200-141gb", "nvidia-b200"}
    assert set(rows) == set(ACCELERATORS) - by_the_eight
    for name in by_the_eight:
        assert f"{name}: a machine has 8 of them or more; compare them by --set job.gpus=8\n" in result.stderr
    assert " no " in rows["nvidia-l4"]
    assert "4 x 2, none" in rows["nvidia-rtx-pro-6000"]
    documents = json.loads(bare("estimate", PETS, "--compare", "--json").stdout)
    assert [name for name, found in documents.items() if found["cost_usd"]] == ["nvidia-rtx-pro-6000"]
    eight = ("--set", "job.gpus=8", "--set", "job.accelerator=nvidia-h200-141gb")
    hosts = bare("estimate", PETS, "--compare", *eight)
    assert {line.split()[0] for line in hosts.stdout.splitlines()[1:]} == {
        name for name, gpu in ACCELERATORS.items() if "vertex" in gpu.platforms
    }
    assert "compare them" not in hosts.stderr


def test_this_machine_costs_nothing(g4kit: Bench) -> None:
    result = g4kit("estimate", g4kit.recipe, "--target", "local")
    assert result.exit_code == 0, result.stdout
    assert "tiny-gemma4 on a room of 64 GiB: fits" in result.stdout
    assert "price   nothing on this machine" in result.stdout
    assert "not predicted" in result.stdout


def test_a_staged_model_goes_by_its_own_config(g4kit: Bench) -> None:
    found = json.loads(g4kit("estimate", g4kit.recipe, "--json").stdout)
    model = vram.Model(load_recipe(g4kit.recipe), made_up_model.config())
    assert found["memory"]["parts"]["LoRA"] == 4 * model.lora_parameters
    assert found["samples"] == {"train": 1260, "validation": 140, "test": 397}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, 'model.id: got "tiny-gemma4", which is neither staged in'),
        ("{", "config.json: damaged"),
        ("[]", "config.json: is no Gemma 4's"),
        ('{"model_type": "llama"}', "a multimodal Gemma 4 says 'gemma4'"),
        ('{"model_type": "gemma4", "text_config": {}, "vision_config": {}}', "a multimodal Gemma 4 says 'gemma4'"),
        ('{"model_type": "gemma4", "text_config": {"a": 1}, "vision_config": {"a": 1}}', "is no Gemma 4's"),
    ],
)
def test_a_model_that_cannot_be_read(bare: Bench, content: str | None, told: str) -> None:
    if content is not None:
        bare.cloud.bucket.write("models/tiny-gemma4/config.json", content.encode())
    result = bare("estimate", bare.recipe)
    assert result.exit_code == 2
    assert told in result.stderr


@pytest.mark.parametrize("verb", [("estimate",), ("launch", "--dry-run", "--yes")], ids=["estimate", "launch"])
def test_parts_that_a_model_does_not_have_are_refused(g4kit: Bench, verb: tuple[str, ...]) -> None:
    experts = 'lora.target_parameters=["experts.gate_up_proj","experts.down_proj"]'
    routers = 'lora.exclude_modules=["router.proj"]'
    result = g4kit(verb[0], g4kit.recipe, *verb[1:], "--set", experts, "--set", routers)
    assert result.exit_code == 2
    assert "this model has no experts (26B-A4B alone has); leave the line out." in result.stderr
    assert 'lora.exclude_modules: got "router.proj", which names no linear module' in result.stderr
    assert "Traceback" not in result.stderr


def test_published_sizes_are_known_without_staging(bare: Bench) -> None:
    for name in ("gemma-4-31B-it", "gemma-4-e4b-it-nf4", "gemma-4-26B-A4B"):
        recipe = load_recipe(PETS, [f"model.id={name}"])
        assert gemma.facts_of(estimating.read_config(bare.cloud.bucket, recipe)).linears


def test_adapters_of_experts_are_part_of_the_estimate(bare: Bench) -> None:
    asked = ("estimate", PETS, "--set", "model.id=gemma-4-26B-A4B-it", "--set", "lora.r=8", "--json")
    experts = 'lora.target_parameters=["experts.gate_up_proj","experts.down_proj"]'
    without, with_them = (json.loads(bare(*more).stdout) for more in (asked, (*asked, "--set", experts)))
    added = with_them["memory"]["parts"]["LoRA"] - without["memory"]["parts"]["LoRA"]
    assert added == 4 * 8 * 128 * 30 * (2816 + 1408 + 704 + 2816)


def test_all_of_a_staged_data_set_is_known_from_what_staging_counted(g4kit: Bench) -> None:
    marker = {"files": {}, "source": "x", "revision": "1", "rows": {"train": 1000, "test": 50}}
    g4kit.cloud.bucket.write("datasets/mine/STAGED.json", json.dumps(marker).encode())
    found = json.loads(g4kit("estimate", PETS, "--set", "data.dataset=mine", "--json").stdout)
    assert found["samples"] == {"train": 900, "validation": 100, "test": 50}
    fewer = ("--set", "data.train_size=100", "--set", "data.test_size=90")
    found = json.loads(g4kit("estimate", PETS, "--set", "data.dataset=mine", *fewer, "--json").stdout)
    assert found["samples"] == {"train": 90, "validation": 10, "test": 50}
    files = {f"train/{label}/{n}.jpg": {"size": 1, "crc32c": "x"} for label in ("cat", "dog") for n in range(10)}
    files["test/cat/1.png"] = {"size": 1, "crc32c": "x"}
    older = {"files": files, "source": "x", "revision": "1"}
    g4kit.cloud.bucket.write("datasets/older/STAGED.json", json.dumps(older).encode())
    found = json.loads(g4kit("estimate", PETS, "--set", "data.dataset=older", "--json").stdout)
    assert found["samples"] == {"train": 18, "validation": 2, "test": 1}


def test_time_is_not_predicted_for_a_data_set_of_unknown_size(bare: Bench) -> None:
    result = bare("estimate", PETS, "--set", "data.dataset=mine")
    assert result.exit_code == 0
    assert 'time: not predicted, for "all" of mine is not known' in result.stdout
    sized = bare(
        "estimate", PETS, "--set", "data.dataset=mine", "--set", "data.train_size=100", "--set", "data.test_size=9"
    )
    assert "time    " in sized.stdout


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (["job.timeout_s=90"], "job.timeout_s: got 90, which loading alone takes; write 600 or more."),
        (["job.max_attempts=1"], "job.max_attempts: got 1, and the work takes 2 of 3600 s each"),
        (["job.timeout_s=86400"], "timeout_s: got 86400; sources differ"),
    ],
)
def test_warnings(changes: list[str], warning: str) -> None:
    found = estimated(load_recipe(PETS, changes))
    assert any(line.startswith(warning) for line in found.warnings), found.warnings
    assert f"warning {warning}" in estimate_text.text(found)


def test_the_bar_is_as_wide_as_the_card() -> None:
    fit = estimated(load_recipe(PETS)).fit
    drawn = estimate_text.bar(fit.training, fit.free_bytes)
    assert len(drawn) == estimate_text.BAR_WIDTH
    assert drawn.count(".") == pytest.approx(estimate_text.BAR_WIDTH * (1 - fit.training.total / fit.free_bytes), abs=2)
    tight = estimate_text.bar(fit.training, fit.training.total // 2)
    assert (len(tight), tight.count("!"), tight.count(".")) == (44, 22, 0)
    every = {name for size in (fit.training, fit.evaluation) for name in size.parts}
    assert every <= set(estimate_text.SYMBOLS)
    assert len(set(estimate_text.SYMBOLS.values())) == len(estimate_text.SYMBOLS)


def test_launch_prints_the_estimate_and_goes_on(g4kit: Bench) -> None:
    result = g4kit("launch", g4kit.recipe, "--dry-run", "--json", "--max-cost", "5")
    assert result.exit_code == 0, result.stderr
    assert "tiny-gemma4 on a room of 64 GiB: fits" in result.stderr
    document = json.loads(result.stdout)
    assert document["estimate"]["fits"]
    assert document["prices"] is None


def test_launch_refuses_what_does_not_fit_and_writes_nothing(g4kit: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimating_inputs, "this_machine", lambda: SMALL)
    before = g4kit.files()
    result = g4kit("launch", g4kit.recipe, "--yes")
    assert result.exit_code == 1
    assert "error: tiny: training needs" in result.stderr
    assert "a small machine has 0.0 GiB free" in result.stderr
    assert g4kit.files() == before
    assert g4kit.cloud.jobs.find() == []


def launch_plan(target: str) -> LaunchPlan:
    return LaunchPlan("x-1", load_recipe(PETS), target, "/mnt/gcs/runs/x-1")


def test_prices_and_the_estimate_are_frozen_into_the_run() -> None:
    found = estimated(load_recipe(PETS))
    plan = priced(launch_plan("cloudrun"), found, None)
    assert plan.recipe == found.recipe
    assert plan.prices is not None
    assert plan.prices["usd_a_second"] == pytest.approx(0.00088522)
    assert (plan.prices["as_of"], plan.prices["region"]) == ("2026-10", "us-central1")
    assert plan.prices["estimate_usd"]["worst"] == pytest.approx(31.96, abs=0.01)
    assert "max_cost_usd" not in plan.prices


def test_on_cloud_run_the_deployments_own_job_is_priced(bare: Bench) -> None:
    """Its CPU, memory, redundancy and retries, which a launch cannot change."""
    job = {"name": "j", "accelerator": "nvidia-rtx-pro-6000", "cpu": 30, "memory_gib": 120, "timeout_s": 3600}
    job |= {"max_retries": 3, "gpu_zonal_redundancy_disabled": False}
    names = ("project", "prefix", "bucket", "repository", "image", "mount_path")
    document = {name: name for name in names} | {"jobs": {"train": job}, "service_accounts": {"runtime": "a"}}
    document["region"] = "us-central1"
    document["tools_job"] = {"name": "t", "cpu": 1, "memory_gib": 1, "timeout_s": 60}
    path = bare.folder / "deployment.json"
    path.write_text(json.dumps(document))
    environ = {"G4KIT_DEPLOYMENT": str(path)}
    bucket = bare.cloud.bucket
    found = estimating_inputs.estimate_for(bucket, load_recipe(PETS), target="cloudrun", environ=environ)
    expected = prices_of("nvidia-rtx-pro-6000", cpu=30, memory_gib=120, zonal_redundancy=True)
    assert found.prices == expected
    assert found.recipe.job.max_attempts == 4
    assert found.cost is not None
    assert expected is not None
    assert found.cost.worst == pytest.approx(4 * 3610 * expected.second)
    other = load_recipe(RECIPES / "oxford-pets-e4b.toml")  # an L4, which this deployment does not have
    assert estimating_inputs.estimate_for(bucket, other, target="cloudrun", environ=environ).prices == prices_of(
        "nvidia-l4"
    )


@pytest.mark.parametrize(("target", "job"), [("cloudrun", (3600, 3)), ("vertex", (2814, 4))])
def test_a_cap_on_the_cost_shortens_the_run(target: str, job: tuple[int, int]) -> None:
    found = estimated(load_recipe(PETS))
    plan = priced(launch_plan(target), found, 10)
    assert (plan.recipe.job.timeout_s, plan.recipe.job.max_attempts) == job
    assert plan.recipe.hash == found.recipe.hash
    assert plan.prices is not None
    assert plan.prices["max_cost_usd"] == 10
    assert plan.prices["asked"] == {"timeout_s": 3600, "max_attempts": 10}
    assert plan.prices["limits"]["worst_usd"] <= 10
    assert found.time is not None
    assert found.time.phases["load"] < plan.prices["least_attempt_s"] < 300
    with pytest.raises(BudgetError, match=r"--max-cost: got 0\.01, and .* may cost \$.*; write at least 0\.\d\d\."):
        priced(launch_plan(target), found, 0.01)
    shared = priced(launch_plan(target), found, 10, runs=2)
    assert shared.recipe.job.max_attempts < plan.recipe.job.max_attempts
    assert shared.prices is not None
    assert shared.prices["max_cost_usd"] == 5
    assert shared.prices["limits"]["worst_usd"] <= 5


def test_a_cap_without_a_known_price_is_refused() -> None:
    found = estimated(load_recipe(PETS))
    unpriced = dataclasses.replace(found, prices=None, cost=None, price_problem="no price is known for x")
    assert priced(launch_plan("cloudrun"), unpriced, None).prices is None
    with pytest.raises(BudgetError, match=r"--max-cost: got 5, which cannot hold: no price is known for x\."):
        priced(launch_plan("cloudrun"), unpriced, 5)


def test_a_region_whose_price_is_not_known_says_how_to_supply_it(bare: Bench) -> None:
    result = bare("estimate", PETS, "--region", "europe-west4")
    assert result.exit_code == 0
    assert "price   no price is known for nvidia-rtx-pro-6000 in europe-west4; write gpu_s." in result.stdout
    own = bare.folder / "prices.toml"
    figures = 'as_of = "2026-11"\nsource = "us"\ngpu_s = { nvidia-rtx-pro-6000 = 0.0004 }\n'
    own.write_text(f"[cloudrun.europe-west4]\n{figures}")
    for arguments, env in ((("--price-table", own), {}), ((), {"G4KIT_PRICE_TABLE": str(own)})):
        told = bare("estimate", PETS, "--region", "europe-west4", *arguments, "--json", env=env)
        prices = json.loads(told.stdout)["prices"]
        assert (prices["gpu_s"], prices["vcpu_s"], prices["region"]) == (0.0004, 0.000018, "europe-west4")
    refused = bare("estimate", PETS, "--price-table", bare.folder / "none.toml")
    assert refused.exit_code == 2
    assert "--price-table: got" in refused.stderr


def test_the_local_run_has_no_prices(g4kit: Bench, launched: Any) -> None:
    run_id = launched()
    assert load_frozen(g4kit.root / "runs" / run_id / "recipe.json").prices is None


@pytest.mark.parametrize(
    ("line", "accelerator"),
    [
        ("NVIDIA H200, 143771, 143000", "nvidia-h200-141gb"),
        ("NVIDIA L4, 23034, 22500", "nvidia-l4"),
        ("NVIDIA L40S, 46068, 45000", None),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition, 97887, 97000", "nvidia-rtx-pro-6000"),
        ("NVIDIA A100-SXM4-80GB, 81920, 81000", "nvidia-a100-80gb"),
        ("NVIDIA A100-SXM4-40GB, 40960, 40000", "nvidia-a100-40gb"),
        ("NVIDIA GeForce RTX 4090, 24564, 24000", None),
    ],
)
def test_what_nvidia_smi_says(line: str, accelerator: str | None) -> None:
    found = machine.parse(line)
    total, free = (int(part) for part in line.split(",")[1:])
    assert (found.accelerator, found.memory_bytes) == (accelerator, total * 2**20)
    assert found.free_bytes == free * 2**20 - vram.CUDA_CONTEXT


@pytest.mark.parametrize("answer", ["echo no devices", "exit 9"])
def test_a_driver_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{answer}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(FailedError, match=r"nvidia-smi: .*driver"):
        machine.this_machine()


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    found = machine.this_machine()
    assert (found.is_gpu, found.is_here, found.accelerator) == (False, True, None)
    assert 0 < found.free_bytes <= found.memory_bytes


def test_an_evaluation_goes_by_its_own_memory() -> None:
    """A micro-batch that fits no card trains nowhere, and is no matter to answers."""
    large = [f"training.{key}=64" for key in ("per_device_train_batch_size", "effective_batch_size")]
    recipe = load_recipe(PETS, [*large, "training.activation_checkpointing=none"])
    estimated(recipe).refuse_evaluation()
    with pytest.raises(FailedError, match="training needs"):
        estimated(recipe).refuse()
    whole = load_recipe(PETS, ["model.quantization=none", "job.accelerator=nvidia-l4"])
    said = r"evaluation needs 6\d\.\d GiB, and NVIDIA L4, 24 GB has .* free; write --accelerator nvidia-rtx-pro-6000\."
    with pytest.raises(FailedError, match=said):
        estimated(whole, card="nvidia-l4").refuse_evaluation()


def test_several_gpus_share_the_answers_in_whole_batches() -> None:
    """1,000 test images are 16 batches of 64: eight GPUs answer two each, and five at most four."""
    sizes = ("training.effective_batch_size=40", "evaluation.batch_size=64", "data.test_size=1000")
    recipes = [load_recipe(PETS, [*sizes, "job.accelerator=nvidia-h100-80gb", f"job.gpus={n}"]) for n in (1, 5, 8)]
    times = [estimated(recipe, card="nvidia-h100-80gb").time for recipe in recipes]
    warnings = [estimated(recipe, card="nvidia-h100-80gb").warnings for recipe in recipes[:2]]
    assert ["what the GPUs send one another is not counted" in " ".join(told) for told in warnings] == [False, True]
    one, five, eight = ({name: time.phases[name] for name in ("baseline", "final")} for time in times if time)
    assert one["final"] / eight["final"] == pytest.approx(1000 / 128)
    assert one["baseline"] / five["baseline"] == pytest.approx(1000 / 256)
