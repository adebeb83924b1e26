"""The recipe: one TOML file that says everything about a run.

Field names are those of the Hugging Face libraries wherever one exists. Loading validates the whole file and reports
all problems at once. This module needs neither torch nor Google's clients: the command line and the trainer share it.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from g4trainer.limits import ACCELERATORS, MAX_RETRIES, MAX_WAIT_DEFAULT_S, TASK_TIMEOUT_MAX_S
from g4trainer.recipe_problems import option, problems_of

Auto = Literal["auto"]
Size = Literal["all"] | Annotated[int, Field(ge=1)]

STAGED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
RECIPE_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
ALL_LINEAR = "all-linear"
"""`lora.target_modules` for every linear module but the output head."""
EXPERT_WEIGHT = r"(?:[A-Za-z0-9_]+\.)*experts\.(?:gate_up_proj|down_proj)"
"""An ending of the names of parameters, as PEFT takes it, of those that may be adapted."""
SECTIONS_OF_THE_RESULT = ("model", "data", "lora", "training")
NOT_IN_THE_HASH = {"training": {"per_device_train_batch_size", "activation_checkpointing"}}
"""How the work is cut for the card changes no result, so a run may resume on another one."""


class RecipeError(ValueError):
    """A recipe that cannot be used. `problems` lists every reason: where, what was got, what to write."""

    def __init__(self, source: str, problems: Iterable[str]) -> None:
        self.source = source
        self.problems = list(problems)
        super().__init__("\n".join([f"{source}: not a valid recipe:", *(f"  {problem}" for problem in self.problems)]))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Model(Section):
    id: str = option(
        ..., 'the name of a staged model, for example "gemma-4-31B-it"', pattern=f"^{STAGED_NAME.pattern}$"
    )
    """Name of the base model: its folder under `models/` in the bucket."""
    quantization: Literal["nf4", "none"] = option("nf4", '"nf4" (4 bits a weight) or "none" (bf16)')
    """How the frozen base weights are held: `nf4` with double quantization, or unquantized."""
    max_soft_tokens: Literal[70, 140, 280, 560, 1120] = option(280, "70, 140, 280, 560 or 1120")
    """Upper bound of the tokens that one image takes. More tokens see finer detail and cost more time."""
    attn_implementation: Literal["auto", "sdpa", "eager"] = option("auto", '"auto", "sdpa" or "eager"')
    """The language model's attention kernel, as transformers names it. `auto` takes the one measured to be fastest."""
    per_layer_embeddings: Literal["auto", "card", "host"] = option("auto", '"auto", "card" or "host"')
    """Where E2B and E4B keep 4.7 and 5.6 GB of embeddings. `auto`: on the card, unless it has 16 GiB or less.
    While the weights are read they are on the card in any case."""


class Data(Section):
    dataset: str = option(
        ..., 'the name of a staged data set, for example "oxford-iiit-pet"', pattern=f"^{STAGED_NAME.pattern}$"
    )
    """Name of the data set: its folder under `datasets/` in the bucket."""
    task: Literal["classify", "chat"] = option(
        "classify", '"classify" (one label an image) or "chat" (one question, one answer)'
    )
    """`classify` scores a label by accuracy; `chat` trains on conversations and scores exact match."""
    image_column: str = option("image", 'a column name, for example "image"', min_length=1)
    """Column with the image, or with a list of images."""
    label_column: str = option("label", 'a column name, for example "label"', min_length=1)
    """Column with the label: a ClassLabel or a string."""
    prompt: str = option(
        "What is shown in the image? Answer with one of: {labels}.", "the question as one line of text", min_length=1
    )
    """The question of every sample. `{labels}` is replaced by the label names, comma-separated."""
    train_size: Size = option("all", 'a number of samples, or "all"')
    """Samples taken from the training split, chosen by seed, before validation is split off."""
    validation_size: Annotated[float, Field(ge=0, lt=1)] | Annotated[int, Field(ge=1)] = option(
        0.1, "a fraction below 1, for example 0.1, a number of samples, or 0 for none"
    )
    """Part of the training samples held out for the validation loss: a fraction, or a count."""
    test_size: Size = option("all", 'a number of samples, or "all"')
    """Samples of the test split that the baseline and final evaluations use, chosen by seed."""
    supervise: Literal["completion", "turn"] = option("completion", '"completion" or "turn"')
    """Tokens that carry loss: the answer alone, or all of the model's turn from `<|turn>` on (the published recipe)."""


class Lora(Section):
    r: int = option(64, "a whole number from 1 to 512, for example 64", ge=1, le=512)
    """Rank of the adapter matrices."""
    lora_alpha: int = option(64, "a whole number above 0, for example 64", ge=1, le=4096)
    """Scale of the adapter's output: it is multiplied by `lora_alpha / r`."""
    lora_dropout: float = option(0.0, "a fraction from 0 to below 1, for example 0.0", ge=0, lt=1)
    """Share of the adapter's inputs dropped in training. Above 0 it costs memory and time."""
    target_modules: str | Annotated[list[str], Field(min_length=1)] = option(
        ALL_LINEAR, '"all-linear", a regular expression, or a list of module names', min_length=1
    )
    """Modules that get an adapter, as PEFT takes it."""
    exclude_modules: str | list[Annotated[str, Field(min_length=1)]] = option(
        [], 'a list of module names, for example ["router.proj"], or a regular expression'
    )
    """Of these, modules that get none, as PEFT takes it: `["router.proj"]` leaves 26B-A4B's routers as they are."""
    target_parameters: list[Annotated[str, Field(pattern=f"^{EXPERT_WEIGHT}$")]] = option(
        [], '["experts.gate_up_proj", "experts.down_proj"], one of them, or [] for none'
    )
    """Weights of experts that get an adapter besides, as PEFT takes it. Each of 26B-A4B's 128 experts in 30 layers has
    one of its own: 1.9 billion parameters at `r = 64`, 0.24 at 8."""


class Training(Section):
    learning_rate: float = option(5e-5, "a number above 0 and up to 1, for example 5e-5", gt=0, le=1)
    """Peak learning rate of AdamW."""
    num_train_epochs: float = option(3, "a number above 0, for example 3", gt=0, le=1000)
    """Passes over the training samples."""
    effective_batch_size: int = option(8, "a whole number above 0, for example 8", ge=1, le=65536)
    """Samples an optimizer step, over all micro-batches and GPUs."""
    per_device_train_batch_size: Auto | Annotated[int, Field(ge=1)] = option(
        "auto", '"auto", or a divisor of effective_batch_size'
    )
    """Samples a forward pass (the micro-batch). `auto` takes what fills the card."""
    activation_checkpointing: Literal["auto", "none", "half", "full"] = option(
        "auto", '"auto", "none", "half" or "full"'
    )
    """Share of the layers whose activations are computed again in the backward pass: slower, smaller."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = option(
        "linear", '"linear", "cosine", "constant" or "constant_with_warmup"'
    )
    """Shape of the learning rate after the warm-up."""
    warmup_ratio: float = option(0.1, "a fraction from 0 to below 1, for example 0.1", ge=0, lt=1)
    """Share of the steps over which the learning rate rises to its peak."""
    weight_decay: float = option(0.01, "a number from 0 to 1, for example 0.01", ge=0, le=1)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = option(1.0, "a number from 0 (no clipping), for example 1.0", ge=0)
    """Gradients are scaled down to this norm when they exceed it; 0 turns clipping off."""
    seed: int = option(42, "a whole number from 0, for example 42", ge=0, lt=2**31)
    """Seed of the data split, the order of the samples and the adapter's initial weights."""
    save_steps: Auto | Annotated[int, Field(ge=1)] = option("auto", '"auto", or a number of steps')
    """Steps between checkpoints. `auto` bounds the work that an interruption loses to about 5 minutes."""
    eval_steps: Auto | Annotated[int, Field(ge=1)] = option("auto", '"auto", or a number of steps')
    """Steps between measurements of the validation loss. `auto` takes ten a run."""
    load_best_model: bool = option(True, "true or false")
    """Keep the adapter with the lowest validation loss rather than the last one."""


class Evaluation(Section):
    baseline: bool = option(True, "true or false")
    """Evaluate the base model before training, so that the gain is known."""
    validation: bool = option(False, "true or false")
    """Answer the validation samples too, after training: a sweep then chooses by their accuracy, not by their loss."""
    batch_size: Auto | Annotated[int, Field(ge=1)] = option("auto", '"auto", or a number of samples')
    """Samples generated at once."""
    max_new_tokens: Auto | Annotated[int, Field(ge=1, le=8192)] = option("auto", '"auto", or a number of tokens')
    """Upper bound of an answer. `auto` takes what the longest label needs."""
    constrained: bool = option(False, "true or false")
    """Decode over the label names only: an answer outside of them cannot be given."""


class Job(Section):
    accelerator: str = option("nvidia-rtx-pro-6000", f"one of {', '.join(ACCELERATORS)}")
    """The GPU a cloud target runs on. The local target uses what this machine has."""
    gpus: int = option(1, "a whole number from 1, for example 1", ge=1, le=1024)
    """GPUs of the run. Cloud Run gives one; several need the Vertex AI target."""
    hosts: int = option(1, "a whole number from 1 that divides job.gpus, for example 1", ge=1, le=128)
    """Machines of the run, each with its share of the GPUs. More than one need the Vertex AI target."""
    sharding: Literal["auto", "none", "full"] = option("auto", '"auto", "none" or "full"')
    """Whether the GPUs share the base model instead of each holding it. `auto` does where it fits no single one."""
    provisioning: Literal["on-demand", "spot", "flex-start"] = option(
        "on-demand", '"on-demand", "spot" or "flex-start"'
    )
    """How Vertex AI gets the machines: `spot` ones may be taken away, `flex-start` waits until all are free."""
    max_wait_s: int = option(
        MAX_WAIT_DEFAULT_S,
        f"a number of seconds from 60 to {TASK_TIMEOUT_MAX_S}, for example {MAX_WAIT_DEFAULT_S}",
        ge=60,
        le=TASK_TIMEOUT_MAX_S,
    )
    """With `flex-start`, how long to wait for the machines, in seconds."""
    timeout_s: int = option(
        3600, f"a number of seconds from 60 to {TASK_TIMEOUT_MAX_S}, for example 3600", ge=60, le=TASK_TIMEOUT_MAX_S
    )
    """Wall-clock limit of one attempt, in seconds. A run that needs longer goes on in the next attempt."""
    max_attempts: int = option(
        10, f"a whole number from 1 to {MAX_RETRIES + 1}, for example 10", ge=1, le=MAX_RETRIES + 1
    )
    """Attempts of one execution: the first and its retries."""

    @field_validator("accelerator")
    @classmethod
    def _known_accelerator(cls, value: str) -> str:
        if value not in ACCELERATORS:
            raise ValueError(value)
        return value


class Recipe(Section):
    """A validated recipe with every default filled in. "auto" stays: the trainer records its choice in plan.json."""

    name: str = option(
        ...,
        'lower-case letters, digits and dashes, at most 40, for example "oxford-pets-31b"',
        pattern=f"^{RECIPE_NAME.pattern}$",
    )
    """Name of the recipe. Run ids start with it."""
    model: Model
    data: Data
    lora: Lora = Lora()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    job: Job = Job()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = list(_contradictions(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def hash(self) -> str:
        """SHA-256 over what decides the result: model, data, lora, training, less how the work is cut."""
        content = self.model_dump(mode="json", include=set(SECTIONS_OF_THE_RESULT))
        for section, keys in NOT_IN_THE_HASH.items():
            for key in keys:
                del content[section][key]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _contradictions(recipe: Recipe) -> Iterable[str]:
    training, job = recipe.training, recipe.job
    micro = training.per_device_train_batch_size
    parts = (1 if micro == "auto" else micro) * job.gpus
    if training.effective_batch_size % parts:
        yield (
            f"training.effective_batch_size: got {training.effective_batch_size}, which {parts} "
            f"(per_device_train_batch_size x job.gpus) does not divide; write a multiple, for example {parts}."
        )
    if training.load_best_model and recipe.data.validation_size == 0:
        yield (
            "training.load_best_model: got true without validation data; write load_best_model = false, "
            "or data.validation_size = 0.1."
        )
    if recipe.evaluation.validation and recipe.data.validation_size == 0:
        yield (
            "evaluation.validation: got true without validation data; write validation = false, "
            "or data.validation_size = 0.1."
        )
    if recipe.data.task == "chat" and recipe.evaluation.constrained:
        yield 'evaluation.constrained: got true for data.task = "chat", which has no label names; write false.'
    if recipe.lora.target_parameters and recipe.lora.lora_dropout:
        yield (
            f"lora.lora_dropout: got {recipe.lora.lora_dropout} with lora.target_parameters, whose adapters have no "
            f"dropout in PEFT; write lora_dropout = 0.0, or leave out target_parameters."
        )
    if isinstance(recipe.lora.exclude_modules, str) and not _is_expression(recipe.lora.exclude_modules):
        yield (
            f"lora.exclude_modules: got {recipe.lora.exclude_modules!r}, which is no regular expression; write a list "
            f'of module names, for example ["router.proj"].'
        )
    if job.gpus % job.hosts:
        yield (
            f"job.hosts: got {job.hosts}, which does not divide job.gpus = {job.gpus}, the GPUs of all of them; "
            f"write gpus = {job.hosts * -(-job.gpus // job.hosts)}, or hosts = 1."
        )
    if job.sharding == "full" and recipe.model.quantization == "nf4":
        yield (
            'job.sharding: got "full" for a base model in NF4, of which each GPU holds its own; write '
            'sharding = "auto", or model.quantization = "none".'
        )
    if job.gpus > 1 and "vertex" not in ACCELERATORS[job.accelerator].platforms:
        yield (
            f"job.gpus: got {job.gpus} for {job.accelerator}, of which Cloud Run gives one; write gpus = 1, "
            f'or a Vertex AI accelerator, for example accelerator = "nvidia-h100-80gb".'
        )


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Reads and validates a TOML recipe.

    overrides: `section.key=value` strings, the value written as TOML or as bare text.
    Raises RecipeError with every problem.
    """
    path = Path(path)
    try:
        document = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise RecipeError(
            str(path), ["no such file; write the path of a recipe, for example recipes/digits-tiny.toml."]
        ) from None
    except IsADirectoryError:
        raise RecipeError(
            str(path), ["is a folder; write the path of a recipe, for example recipes/digits-tiny.toml."]
        ) from None
    except PermissionError:
        raise RecipeError(str(path), ["cannot be read: permission denied; allow reading it."]) from None
    except UnicodeDecodeError:
        raise RecipeError(str(path), ["is no text in UTF-8; write a TOML file."]) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(str(path), [f"is not TOML: {error}."]) from None
    problems = list(_apply_overrides(document, overrides))
    if problems:
        raise RecipeError(str(path), problems)
    return parse_recipe(document, source=str(path))


def parse_recipe(document: Mapping[str, Any], *, source: str) -> Recipe:
    """Validates a recipe given as a mapping. Raises RecipeError with every problem; `source` is named in it."""
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError(source, problems_of(error, Recipe)) from None


class SweepPlace(Section):
    """Where in a sweep a run belongs."""

    id: str
    task: int
    """Its index in `sweeps/<id>/tasks.json`."""


class FrozenRecipe(Section):
    """`recipe.json` of a run: the recipe as it was launched, and what was known then."""

    run_id: str
    recipe: Recipe
    recipe_hash: str
    """`Recipe.hash`: a checkpoint with another one is never resumed."""
    created_at: str
    """UTC, ISO 8601."""
    g4kit_version: str
    target: str
    """`local`, `cloudrun` or `vertex`; `trainer` where the trainer made its own run directory."""
    image_digest: str | None = None
    """Container image the job ran then, by digest; None on the local target."""
    prices: dict[str, Any] | None = None
    """Prices a second that the estimate used, so that the bill can be compared later; None where nothing is billed."""
    sweep: SweepPlace | None = None
    """None for a run that was launched by itself."""

    @model_validator(mode="after")
    def _hash_agrees(self) -> Self:
        if self.recipe_hash != self.recipe.hash:
            raise ValueError(f"recipe_hash: got {self.recipe_hash}; the recipe's own is {self.recipe.hash}.")
        return self


def load_frozen(path: Path) -> FrozenRecipe:
    """Reads a run's `recipe.json`. Raises RecipeError where it is missing, damaged or was edited."""
    try:
        return FrozenRecipe.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise RecipeError(
            str(path), ["no such file; write the path of a run directory that `g4kit launch` made."]
        ) from None
    except ValidationError as error:
        raise RecipeError(
            str(path), [f"{detail['msg']} ({'.'.join(map(str, detail['loc']))})" for detail in error.errors()]
        ) from None


def lora_config(settings: Lora, *, base_model: str) -> dict[str, Any]:
    """`lora_config.json`: loads back with `peft.LoraConfig(**json)`."""
    chosen = {"exclude_modules": settings.exclude_modules, "target_parameters": settings.target_parameters}
    return {
        "base_model_name_or_path": base_model,
        "task_type": "CAUSAL_LM",
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": settings.target_modules,
        "bias": "none",
        **{name: value for name, value in chosen.items() if value},
    }


def _apply_overrides(document: dict[str, Any], overrides: Iterable[str]) -> Iterable[str]:
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or len(keys) > 2 or not all(keys):
            yield f"--set {override}: write section.key=value, for example training.learning_rate=1e-4."
            continue
        target: Any = document
        for key in keys[:-1]:
            target = target.setdefault(key, {})
        if not isinstance(target, dict):
            yield f"--set {override}: {keys[0]} is no section; write section.key=value, for example lora.r=16."
            continue
        target[keys[-1]] = _parse_value(text.strip())


def _parse_value(text: str) -> Any:
    """TOML where it is TOML, else the bare text, so that a shell needs no nested quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
