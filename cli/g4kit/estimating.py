"""What a run will take of memory, time and money, before it starts: read, decide, describe."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from g4kit import budget, pricing
from g4kit.cloud.base import Bucket, ObjectNotFoundError
from g4kit.errors import FailedError, UserError
from g4kit.machine import Hardware, of_accelerator
from g4kit.staging import read_marker
from g4trainer import gemma, lora_targets, planner, timing, vram
from g4trainer.limits import ACCELERATORS, job_warnings
from g4trainer.recipe import Recipe
from g4trainer.rows import count_rows

PUBLISHED = re.compile(r"gemma-4-(E2B|E4B|26B-A4B|31B)(?![0-9A-Za-z])", re.IGNORECASE)
KNOWN_DATA: Mapping[str, tuple[int, int]] = {"oxford-iiit-pet": (3680, 3669), "digits": (1400, 397)}
"""Images to train and to test on: what "all" is, of data sets whose size is known without reading them."""


class DoesNotFitError(FailedError):
    """A recipe that needs more memory than there is."""


@dataclass(frozen=True)
class Storage:
    """What is in the bucket for a run, in bytes, and is billed as long as it is there."""

    model: int
    """The base model in bf16, and its NF4 copy where runs read one."""
    run: int
    """The adapter, and the checkpoints that rotation leaves; images and their answers are next to nothing."""

    def usd_a_month(self, prices: pricing.Prices | None) -> float | None:
        """None where the price is not known, or nothing is billed."""
        if prices is None or prices.storage_gib_month is None:
            return None
        return (self.model + self.run) / vram.GIB * prices.storage_gib_month


@dataclass(frozen=True)
class Estimate:
    recipe: Recipe
    hardware: Hardware
    fit: planner.Fit
    accumulation: int
    tokens: int
    """Of a sample, as expected."""
    samples: timing.Samples | None
    """None where the data set's size is not known before it is read."""
    time: timing.Time | None
    """None where it does not fit, on hardware whose rates are not known, or without the number of samples."""
    prices: pricing.Prices | None
    price_problem: str
    """Why there are no prices, and how to supply them; empty where there are, or nothing is billed."""
    cost: budget.Cost | None
    storage: Storage
    nearest: tuple[str, ...]
    """Changes of the recipe that make it fit, where it does not."""
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.fit.fits

    def refuse(self) -> None:
        """Raises DoesNotFitError, with the nearest setting that fits, where it does not fit."""
        if self.fits:
            return
        fit, card = self.fit, self.hardware.title
        needs = {"training": fit.training.total, "evaluation": fit.evaluation.total, "loading": fit.loading}
        what = next(name for name, total in needs.items() if total > fit.free_bytes)
        raise DoesNotFitError(
            f"{self.recipe.name}: {what} needs {_gib(fit.needed)}, and {card} has {_gib(fit.free_bytes)} free; "
            + (f"write {_options(self.nearest[0])}." if self.nearest else "write a larger job.accelerator.")
        )

    def refuse_evaluation(self) -> None:
        """Raises DoesNotFitError, with a card that does, where not even evaluation fits.

        Made for a recipe whose evaluation.batch_size is "auto", so that it is one image that does not.
        """
        fit, card = self.fit, self.hardware
        if fit.evaluation.total <= fit.free_bytes:
            return
        platforms = set(ACCELERATORS[self.recipe.job.accelerator].platforms)
        alike = [name for name, gpu in ACCELERATORS.items() if platforms & set(gpu.platforms)]
        larger = [one for one in map(of_accelerator, alike) if one.free_bytes >= fit.evaluation.total]
        smallest = min(larger, key=lambda one: one.free_bytes, default=None)
        raise DoesNotFitError(
            f"{self.recipe.name}: evaluation needs {_gib(fit.evaluation.total)}, and {card.title} has "
            f"{_gib(fit.free_bytes)} free"
            + (f"; write --accelerator {smallest.accelerator}." if smallest and not card.is_here else ".")
        )

    def to_json(self) -> dict[str, Any]:
        fit = self.fit
        return {
            "recipe": self.recipe.name,
            "model": self.recipe.model.id,
            "hardware": dataclasses.asdict(self.hardware),
            "fits": self.fits,
            "memory": {
                "training_bytes": fit.training.total,
                "evaluation_bytes": fit.evaluation.total,
                "free_bytes": fit.free_bytes,
                "peak": fit.training.moment,
                "parts": dict(fit.training.parts),
            },
            "plan": {
                "per_device_train_batch_size": fit.micro_batch,
                "gradient_accumulation_steps": self.accumulation,
                "activation_checkpointing": fit.activation_checkpointing,
                "evaluation_batch_size": fit.evaluation_batch_size,
            },
            "tokens_a_sample": self.tokens,
            "samples": dataclasses.asdict(self.samples) if self.samples else None,
            "time": dict(timing.describe(self.time)) if self.time else None,
            "prices": self.prices.to_json() if self.prices else None,
            "price_problem": self.price_problem or None,
            "cost_usd": self.cost.to_json() if self.cost else None,
            "storage": dataclasses.asdict(self.storage) | {"usd_a_month": self.storage.usd_a_month(self.prices)},
            "nearest": list(self.nearest),
            "warnings": list(self.warnings),
        }

    def frozen(self, max_cost: float | None) -> dict[str, Any] | None:
        """What recipe.json keeps of it, so that the bill can be compared; None where nothing is billed."""
        if self.prices is None:
            return None
        expected = {"estimate_usd": self.cost.to_json()} if self.cost else {}
        cap = {} if max_cost is None else {"max_cost_usd": max_cost}
        least = {"least_attempt_s": budget.least_useful_s(self.time)}
        return {**self.prices.to_json(), **expected, **cap, **least}


def estimate(
    recipe: Recipe,
    config: Mapping[str, Any],
    hardware: Hardware,
    *,
    prices: pricing.Prices | None,
    samples: timing.Samples | None,
    price_problem: str = "",
) -> Estimate:
    """Decides on the plan and predicts; reads nothing. prices: None where nothing is billed, or no price is known.

    Raises UserError where the recipe names parts of the model that it does not have.
    """
    facts = gemma.facts_of(config)
    modules, weights = ({one.name for one in part} for part in (facts.linears, facts.expert_weights))
    problems = lora_targets.problems(recipe.lora, modules=modules, expert_weights=weights)
    if problems:
        raise UserError("\n".join(problems))
    if hardware.accelerator and hardware.accelerator != recipe.job.accelerator:
        planned = planner.with_changes(recipe, [f'job.accelerator="{hardware.accelerator}"'])
    else:
        planned = recipe
    planned = planner.for_card(planned, hardware.memory_bytes if hardware.is_gpu else None)
    if hardware.is_gpu:
        model = planner.model_for(planned, config, hardware.free_bytes)
    else:
        model = vram.Model(planned, config, number_bytes=vram.FP32)
    shape = model.shape(planner.expected_text_tokens(recipe))
    choose = planner.best_fit if hardware.is_gpu else planner.cpu_fit
    fit = choose(model, shape, hardware.free_bytes)
    share = recipe.training.effective_batch_size // recipe.job.gpus
    time = None
    if fit.fits and hardware.accelerator and samples:
        time = timing.estimate_time(
            planned,
            model,
            shape,
            samples,
            micro_batch=fit.micro_batch,
            checkpointing=fit.activation_checkpointing,
            evaluation_batch_size=fit.evaluation_batch_size,
            evaluations=planner.EVALUATIONS_A_RUN if samples.validation else 0,
            card_name=hardware.accelerator,
        )
    job = recipe.job
    cost = None
    if time and prices:
        cost = budget.cost_of(prices, time, timeout_s=job.timeout_s, max_attempts=job.max_attempts)
    return Estimate(
        recipe=recipe,
        hardware=hardware,
        fit=fit,
        accumulation=share // fit.micro_batch,
        tokens=shape.tokens,
        samples=samples,
        time=time,
        prices=prices,
        price_problem=price_problem,
        cost=cost,
        storage=storage_of(recipe, model),
        nearest=() if fit.fits else tuple(_nearest(planned, config, hardware)),
        warnings=tuple(_warnings(recipe, hardware, time, samples)) if fit.fits else (),
    )


def storage_of(recipe: Recipe, model: vram.Model) -> Storage:
    """Counted from the recipe and the model's config.json."""
    bf16 = model.facts.parameters * vram.BF16
    copy = sum(model.weights.values()) if recipe.model.quantization == "nf4" else 0
    checkpoints = planner.CHECKPOINTS_KEPT + recipe.training.load_best_model
    return Storage(bf16 + copy, model.lora_parameters * (vram.FP32 + checkpoints * (vram.FP32 + vram.ADAM)))


def read_config(bucket: Bucket, recipe: Recipe) -> dict[str, Any]:
    """config.json of the staged model, else that of the published size its id names. Raises UserError."""
    name = f"models/{recipe.model.id}/config.json"
    try:
        config = json.loads(bucket.read(name))
        gemma.facts_of(config, source=f"{bucket.url}/{name}")
    except ObjectNotFoundError:
        found = PUBLISHED.search(recipe.model.id)
        if found:
            sizes: dict[str, gemma.Size] = {"e2b": "E2B", "e4b": "E4B", "26b-a4b": "26B-A4B", "31b": "31B"}
            return gemma.true_config(sizes[found[1].lower()])
        raise UserError(
            f'model.id: got "{recipe.model.id}", which is neither staged in {bucket.url} nor a published size; '
            f"write: g4kit stage model SOURCE --name {recipe.model.id}, or an id such as gemma-4-31B-it."
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{bucket.url}/{name}: damaged: {error}; stage the model again.") from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{bucket.url}/{name}: is no Gemma 4's: {error}; stage a Gemma 4.") from error
    return dict(config)


def read_rows(bucket: Bucket, recipe: Recipe) -> Mapping[str, int]:
    """Rows of the staged data set by split, as STAGED.json counts them; empty where it is not staged or not counted.

    A folder of images that was staged before rows were counted is known by its files.
    """
    listing = read_marker(bucket, f"datasets/{recipe.data.dataset}")
    if listing is None:
        return {}
    return dict(listing.get("rows") or count_rows(dict.fromkeys(listing["files"], 0), lambda *_: b""))


def expected_samples(recipe: Recipe, rows: Mapping[str, int] | None = None) -> timing.Samples | None:
    """How many images a run sees, as far as the recipe says or the data set is known; None where it is not."""
    known = dict(zip(("train", "test"), KNOWN_DATA.get(recipe.data.dataset, ()), strict=False)) | dict(rows or {})
    stated = {"train": recipe.data.train_size, "test": recipe.data.test_size}
    train, test = (_taken(stated[split], known.get(split)) for split in ("train", "test"))
    if train is None or test is None:
        return None
    validation = recipe.data.validation_size
    held_out = round(train * validation) if validation < 1 else int(validation)
    return timing.Samples(train - held_out, held_out, test)


def _taken(stated: int | str, there: int | None) -> int | None:
    """Samples of a split; None where all are wanted and nobody knows how many there are."""
    if isinstance(stated, str):
        return there
    return stated if there is None else min(stated, there)


def _nearest(recipe: Recipe, config: Mapping[str, Any], hardware: Hardware) -> list[str]:
    """Changes that make it fit, those that change no result first: how the work is cut, then the smallest card."""
    if not hardware.is_gpu:
        return []
    changes = planner.nearest_fits(recipe, config, hardware.free_bytes)
    same_result = [
        change
        for change in changes
        if not any(section in change.replace(planner.EMBEDDINGS_ON_HOST, "") for section in ("model.", "lora."))
    ]
    others = [change for change in changes if change not in same_result]
    model = vram.Model(recipe, config)
    shape = model.shape(planner.expected_text_tokens(recipe))
    platforms = ACCELERATORS[recipe.job.accelerator].platforms
    cards = sorted(ACCELERATORS.values(), key=lambda gpu: (not set(platforms) & set(gpu.platforms), gpu.memory_gib))
    for gpu in [] if hardware.is_here else cards:
        if planner.best_fit(model, shape, of_accelerator(gpu.name).free_bytes).fits:
            same_result.append(f'job.accelerator="{gpu.name}"')
            break
    return same_result + others + _smaller_models(recipe, hardware)


def _smaller_models(recipe: Recipe, hardware: Hardware) -> list[str]:
    """Of the published sizes, the largest below the recipe's that fits the card."""
    named = PUBLISHED.search(recipe.model.id)
    if named is None or recipe.lora.target_parameters:  # of 26B-A4B alone
        return []
    sizes: tuple[gemma.Size, ...] = ("31B", "26B-A4B", "E4B", "E2B")
    own = [size.lower() for size in sizes].index(named[1].lower())
    for size in sizes[own + 1 :]:
        change = f'model.id="{PUBLISHED.sub(f"gemma-4-{size}", recipe.model.id)}"'
        model = vram.Model(planner.with_changes(recipe, [change]), gemma.true_config(size))
        shape = model.shape(planner.expected_text_tokens(recipe))
        if planner.best_fit(model, shape, hardware.free_bytes).fits:
            return [change]
    return []


def _warnings(
    recipe: Recipe, hardware: Hardware, time: timing.Time | None, samples: timing.Samples | None
) -> list[str]:
    job, found = recipe.job, []
    if time and time.slices == 0:
        need = int(time.phases["load"] + timing.CLOSING_S) * 2
        found.append(f"job.timeout_s: got {job.timeout_s}, which loading alone takes; write {max(need, 600)} or more.")
    elif time and time.slices > job.max_attempts:
        found.append(
            f"job.max_attempts: got {job.max_attempts}, and the work takes {time.slices} of {job.timeout_s} s each; "
            "write more, or a longer job.timeout_s, or launch with --wait, which starts it again."
        )
    if time and not time.calibrated:
        found.append(
            "time: no step was measured on this card; scaled from an H200's by published rates, so the range is wide."
        )
    if time and job.gpus > 1:
        found.append("time: what the GPUs send one another is not counted; see docs/scale.md for what was measured.")
    if not hardware.accelerator:
        found.append("time: not predicted, for the rates of this hardware are not known.")
    elif samples is None:
        found.append(
            f'time: not predicted, for "all" of {recipe.data.dataset} is not known before it is staged or counted; '
            f"stage it, or write data.train_size and data.test_size as numbers to get it."
        )
    if not hardware.is_here:
        found += job_warnings(accelerator=job.accelerator, timeout_s=job.timeout_s)
    return found


def _gib(count: int) -> str:
    return f"{count / vram.GIB:.1f} GiB"


def _options(change: str) -> str:
    """Changes as arguments that a shell takes."""
    return " ".join(f"--set {one.replace(chr(34), '')}" for one in change.split())
