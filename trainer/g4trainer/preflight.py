"""Checks before anything is paid for: is LoRA where it should be, and is each label what carries the loss?

Every check ends in a line that a person can read; one that failed says what to do. How deep they go depends on what is
there: a `config.json` is enough for the structure (on the meta device, without GPU or weights), staged tokenizer and
data for the alignment of real samples, and weights with a GPU, or a tiny model, for one real step.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import bitsandbytes
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from transformers.models.gemma4.modeling_gemma4 import Gemma4ClippableLinear

from g4trainer import gemma, lora_targets
from g4trainer.collator import IGNORED, Collator, generation_prompt, token_id
from g4trainer.dataset import DataError, Example, Splits, load_splits
from g4trainer.evaluate import longest_answer
from g4trainer.exits import ModelError, OutOfMemory
from g4trainer.memory_errors import as_out_of_memory
from g4trainer.model import (
    adapted_modules,
    attach_lora,
    check_architecture,
    compute_dtype,
    load_base,
    load_processor,
    load_structure,
)
from g4trainer.recipe import Lora, Model, Recipe

TINY_PARAMETERS = 50_000_000
"""Up to here one step on a CPU takes seconds."""
STEP_SAMPLES = 2
SIZES: tuple[gemma.Size, ...] = get_args(gemma.Size)
STAGE_DATA = "correct the data, stage it under another --name, and run this again with that as data.dataset."
STAGE_MODEL = "stage the model again with `g4kit stage model`, and run this again."
KINDS = {
    "self_attn": "attention",
    "mlp": "MLP",
    "router": "router",
    "experts": "experts",
    "patch_embedder": "patch embedder",
    "embed_vision": "projection",
}


State = Literal["passed", "failed", "warning", "skipped"]


@dataclass(frozen=True)
class Check:
    name: str
    state: State
    detail: str
    remedy: str | None = None
    """What to do; only where it failed, or might mislead."""


@dataclass
class Group:
    """A row of the LoRA target matrix: linear modules of one kind, or weights of experts."""

    name: str
    found: int = 0
    quantized: int = 0
    adapted: int = 0
    clipped: int = 0
    """Those inside a Gemma4ClippableLinear with bounds, which bound what LoRA adds too."""
    with_gradient: int | None = None
    """Adapted modules whose lora_B got a gradient in one real step; None where no step was taken."""


@dataclass(frozen=True)
class Sample:
    """How one real sample of the staged data becomes tokens."""

    id: str
    tokens: int
    soft_tokens: int
    supervised_tokens: int
    supervised: str
    """What carries the loss, as a reader sees it."""


@dataclass
class Report:
    model: str
    checks: list[Check] = field(default_factory=list)
    matrix: list[Group] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    without_gradient: list[str] = field(default_factory=list)
    """Adapted modules whose lora_B got no gradient in the step."""

    @property
    def passed(self) -> bool:
        return not any(check.state == "failed" for check in self.checks)

    def add(
        self, name: str, state: Literal["passed", "failed", "warning", "skipped"], detail: str, remedy: Any = None
    ) -> None:
        self.checks.append(Check(name, state, detail, remedy))

    @contextlib.contextmanager
    def checking(self, name: str, remedy: str) -> Iterator[None]:
        """Notes an error with a known cause as this check's failure."""
        try:
            yield
        except (ModelError, OutOfMemory) as error:
            self.add(name, "failed", str(error), error.remedy)
        except DataError as error:
            self.add(name, "failed", str(error), remedy)

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


@dataclass(frozen=True)
class Subject:
    """What is checked: a recipe with what is staged for it, a model folder, or a size by its name."""

    title: str
    model: Model
    config: dict[str, Any]
    """`config.json`, staged or of the published size."""
    lora: Lora = field(default_factory=Lora)
    folder: Path | None = None
    """The staged model; None where only its configuration is known."""
    recipe: Recipe | None = None
    dataset: Path | None = None
    others: tuple[str, ...] = ()
    """Data sets that are staged where the recipe's is not."""


def subject_of_size(size: gemma.Size, *, lora: Lora | None = None) -> Subject:
    """A published size, of which nothing needs to be there."""
    return Subject(f"Gemma 4 {size}", Model(id=f"gemma-4-{size}-it"), gemma.true_config(size), lora or Lora())


def subject_of_folder(folder: Path) -> Subject:
    """A model folder, or a folder with nothing but its config.json. Raises ModelError where it is no Gemma 4."""
    return Subject(str(folder), Model(id="model"), check_architecture(folder), folder=folder)


def subject_of_recipe(recipe: Recipe, root: Path) -> Subject:
    """A recipe with what is staged for it under `root`. Raises ModelError where nothing is known of its model."""
    folder, dataset = root / "models" / recipe.model.id, root / "datasets" / recipe.data.dataset
    sizes = [size for size in SIZES if f"-{size}-".casefold() in f"-{recipe.model.id}-".casefold()]
    if (folder / "config.json").is_file():
        config, staged = check_architecture(folder), folder
    elif sizes:
        config, staged = gemma.true_config(sizes[0]), None
    else:
        raise ModelError(
            f"{folder}: not staged, and {recipe.model.id!r} names none of the sizes {', '.join(SIZES)}.",
            remedy="stage it with `g4kit stage model`, and run this again.",
        )
    found = dataset if dataset.is_dir() else None
    others = () if found else tuple(sorted(marker.parent.name for marker in dataset.parent.glob("*/STAGED.json")))
    return Subject(recipe.name, recipe.model, config, recipe.lora, staged, recipe, found, others)


def preflight(subject: Subject, *, samples: int = 8) -> Report:
    """All checks that what is there allows. Raises nothing that has a known cause: it becomes a failed check."""
    report = Report(subject.title)
    facts = gemma.facts_of(subject.config, source=subject.title)
    count = facts.parameters
    size = f"{count / 1e9:.2f} B" if count >= TINY_PARAMETERS else f"{count:,}"
    report.add("model", "passed", f"{size} parameters, {len(facts.linears)} linear modules")
    collator = _collator(subject, report)
    splits = _samples(subject, collator, samples, report)
    step, why_not = _step_allowed(subject, facts, splits)
    with report.checking("LoRA targets", "choose other lora.target_modules."):
        model = _adapted(subject, on_device=step)
        _matrix(model, facts, report, subject.lora)
        if not step:
            report.add("one step", "skipped", why_not)
        elif collator and splits:
            with report.checking("one step", STAGE_DATA):
                _one_step(model, collator, splits.train[:STEP_SAMPLES], report)
    return report


def _collator(subject: Subject, report: Report) -> Collator | None:
    """The collator of the staged processor, with the checks of template and processor; None where it is not staged."""
    name = "template and processor"
    if subject.folder is None or not (subject.folder / "tokenizer_config.json").is_file():
        report.add(name, "skipped", "the tokenizer and processor are not staged")
        return None
    with report.checking(name, STAGE_MODEL):
        processor = load_processor(subject.folder)
        supervise = subject.recipe.data.supervise if subject.recipe else "completion"
        collator = Collator(processor, max_soft_tokens=subject.model.max_soft_tokens, supervise=supervise)
        problems = list(_processor_problems(processor, subject.config))
        if problems:
            report.add(name, "failed", "; ".join(problems), STAGE_MODEL)
            return None
        prompt = generation_prompt(processor, "?", images=1)
        report.add(name, "passed", f"the generation prompt is {prompt!r}")
        return collator
    return None


def _processor_problems(processor: Any, config: dict[str, Any]) -> Iterator[str]:
    """Where tokenizer, image processor and model disagree."""
    tokenizer, vision = processor.tokenizer, {**gemma.VISION_DEFAULTS, **config["vision_config"]}
    for name in gemma.SPECIAL_TOKENS:
        ids = tokenizer(name, add_special_tokens=False)["input_ids"]
        if ids != [token_id(tokenizer, name)]:
            yield f"{name} becomes the tokens {ids}, not one"
    stated = {
        "image_token_id": gemma.IMAGE,
        "boi_token_id": gemma.BEGIN_IMAGE,
        "eoi_token_id": gemma.END_IMAGE,
    }
    for key, name in stated.items():
        if config.get(key, token_id(tokenizer, name)) != token_id(tokenizer, name):
            yield f"{name} is {token_id(tokenizer, name)} in the tokenizer and {config[key]} in config.json"
    if len(tokenizer) > config["text_config"].get("vocab_size", len(tokenizer)):
        yield f"the tokenizer has {len(tokenizer)} tokens, the model {config['text_config']['vocab_size']}"
    for key in ("patch_size", "pooling_kernel_size"):
        own = getattr(processor.image_processor, key)
        if own != vision[key]:
            yield f"{key} is {own} in the processor and {vision[key]} in config.json"
    if vision["pooling_kernel_size"] == 1:
        yield "pooling_kernel_size is 1, for which transformers inverts the padding mask"


def _samples(subject: Subject, collator: Collator | None, count: int, report: Report) -> Splits | None:
    """Reads the staged data, and checks the alignment of `count` real samples; None where there is nothing to check."""
    name = "token alignment"
    if subject.recipe and subject.others:
        wanted = subject.recipe.data.dataset
        report.add(
            "data set",
            "warning",
            f"{wanted} is not staged here, where these are: {', '.join(subject.others)}",
            f"where the run is to be here: g4kit stage data FOLDER --name {wanted}, or correct data.dataset.",
        )
    if subject.recipe is None or subject.dataset is None or collator is None:
        missing = "data set" if collator else "tokenizer"
        report.add(name, "skipped", f"no staged {missing} to take samples from")
        return None
    with report.checking(name, STAGE_DATA):
        splits = load_splits(subject.dataset, subject.recipe.data, seed=subject.recipe.training.seed)
        longest_answer(collator, splits.labels)  # raises where a label cannot be said
        for example in _spread(splits.train, count):
            report.samples.append(_aligned(collator, example))
        lengths = [sample.tokens for sample in report.samples]
        report.add(
            name,
            "passed",
            f"{len(lengths)} of {len(splits.train)} training samples: {min(lengths)} to {max(lengths)} tokens, "
            f"{len(splits.labels)} labels can be said",
        )
        if splits.shared_images:
            report.add(
                "overlap",
                "warning",
                f"{splits.shared_images} test images are also in the training data, byte for byte",
                "leave them out of the test split: the accuracy would flatter.",
            )
        else:
            report.add("overlap", "passed", f"none of the images of {len(splits.test)} test samples is trained on")
        return splits
    return None


def _spread(examples: Sequence[Example], count: int) -> list[Example]:
    """`count` examples at even distances, the first and the last among them."""
    last, count = len(examples) - 1, min(count, len(examples))
    return [examples[round(index * last / max(1, count - 1))] for index in range(count)]


def _aligned(collator: Collator, example: Example) -> Sample:
    """Encodes a sample as training and as inference do. Raises DataError where they or the label disagree."""
    encoded = collator.encode(example)
    supervised = [label for label in encoded.labels if label != IGNORED]
    prompt = collator.prompts([example])["input_ids"][0].tolist()
    text = collator.text_of(supervised)
    wanted = f"{example.answer.strip()}{gemma.END_OF_TURN}"
    if encoded.input_ids[: len(prompt)] != prompt or not text.endswith(wanted):
        raise DataError(f"{example.id}: training sees other tokens than inference, or {text!r} and not {wanted!r}.")
    return Sample(example.id, len(encoded.input_ids), encoded.input_ids.count(collator.image_id), len(supervised), text)


def _step_allowed(subject: Subject, facts: gemma.ModelFacts, splits: Splits | None) -> tuple[bool, str]:
    if subject.folder is None or not any(subject.folder.glob("*.safetensors")):
        return False, "the weights are not staged; the structure was checked on the meta device"
    if splits is None:
        return False, "there is no staged data to take it on; the structure was checked on the meta device"
    if not torch.cuda.is_available() and facts.parameters > TINY_PARAMETERS:
        return False, "no GPU; the structure was checked on the meta device"
    return True, ""


def _adapted(subject: Subject, *, on_device: bool) -> PeftModel:
    """The model with adapters: real where a step follows, else its structure alone."""
    if on_device and subject.folder is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return attach_lora(
            load_base(subject.folder, subject.model, device=device), subject.lora, base_model=subject.model.id
        )
    with torch.device("meta"):
        return attach_lora(load_structure(subject.config, subject.model), subject.lora, base_model=subject.model.id)


def _matrix(model: PeftModel, facts: gemma.ModelFacts, report: Report, settings: Lora) -> None:
    """Fills the target matrix, and checks it against what the configuration promises."""
    adapted, clipped = adapted_modules(model), _inside_clamps(model)
    groups: dict[str, Group] = {}
    for name in (*(one.name for one in facts.linears), *(one.name for one in facts.expert_weights)):
        group = groups.setdefault(group_of(name), Group(group_of(name)))
        weight = _weight(model, name, adapted)
        group.found += weight is not None
        group.quantized += isinstance(weight, bitsandbytes.nn.Params4bit)
        group.adapted += name in adapted
        group.clipped += name in clipped
    report.matrix = list(groups.values())
    promised: list[gemma.Linear | gemma.ExpertWeight] = [*lora_targets.adapted_linears(facts, settings)]
    promised += lora_targets.adapted_experts(facts, settings)
    wrong = sorted(adapted.keys() ^ {one.name for one in promised})
    unclamped = sorted(linear.name for linear in facts.linears if linear.clipped and linear.name not in clipped)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if wrong or unclamped:
        detail = f"{(wrong + unclamped)[0]} is not as config.json says"
        report.add("LoRA targets", "failed", detail, "report this: it is a bug.")
    else:
        what = "modules and weights of experts" if settings.target_parameters else "modules"
        report.add("LoRA targets", "passed", f"{len(adapted)} {what} adapted, {trained:,} parameters to train")


def _weight(model: PeftModel, name: str, adapted: dict[str, LoraLayer]) -> Any:
    """The base model's weight of that name, a linear module's or the experts'; None where there is none."""
    if isinstance(adapted.get(name), ParamWrapper):
        return adapted[name].get_param()
    owner, _, weight = name.rpartition(".")
    holder = model.get_base_model().get_submodule(owner)
    found = getattr(holder.get_base_layer() if isinstance(holder, LoraLayer) else holder, weight)
    if isinstance(found, torch.nn.Parameter):
        return found
    linear = found.get_base_layer() if isinstance(found, LoraLayer) else found
    return linear.weight if isinstance(linear, torch.nn.Linear) else None


def group_of(name: str) -> str:
    """The row of the matrix that a linear module counts in, for example `vision attention`."""
    parts = name.split(".")
    kind = next((KINDS[part] for part in parts if part in KINDS), "per-layer input")
    tower = "vision" if "vision_tower" in parts or "embed_vision" in parts else "language"
    return f"{tower} {kind}"


def _inside_clamps(model: PeftModel) -> set[str]:
    """Names of the inner linear modules of Gemma4ClippableLinear with bounds."""
    return {
        f"{name}.linear"
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, Gemma4ClippableLinear) and module.use_clipped_linears
    }


def _one_step(model: PeftModel, collator: Collator, examples: Sequence[Example], report: Report) -> None:
    """One forward and backward pass over real samples; notes which adapters got a gradient."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collator(examples).items()}
    targets = batch.pop("kept_labels")
    del batch["labels"]
    model.train()
    try:
        with as_out_of_memory():
            with torch.autocast(device.type, compute_dtype(device), enabled=device.type == "cuda"):
                logits = model(**batch, use_cache=False).logits.float()  # (batch, supervised, vocabulary)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
            loss.backward()
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"one step of {len(examples)} samples does not fit: {error}") from error
    finite = _count_gradients(model, report)
    if not (torch.isfinite(loss) and finite):
        report.add(
            "one step", "failed", f"the loss is {loss.item()}, or a gradient is not finite", "stage the model again."
        )
    elif report.without_gradient:
        names = ", ".join(report.without_gradient[:3])
        report.add(
            "one step",
            "failed",
            f"{len(report.without_gradient)} adapters got no gradient, {names} among them",
            "leave them out of lora.target_modules, or look whether their clamps cut everything off.",
        )
    else:
        report.add(
            "one step", "passed", f"loss {loss.item():.3f}; every adapter got a finite gradient that is not zero"
        )


def _count_gradients(model: PeftModel, report: Report) -> bool:
    """Fills the gradient column; returns whether all gradients are finite. lora_A has none yet, for lora_B is zero."""
    rows = {group.name: group for group in report.matrix}
    for group in rows.values():
        group.with_gradient = 0
    finite = True
    for name, module in adapted_modules(model).items():
        gradient = module.lora_B["default"].weight.grad
        finite &= gradient is not None and bool(torch.isfinite(gradient).all())
        if gradient is None or not gradient.any():
            report.without_gradient.append(name)
        else:
            group = rows[group_of(name)]
            group.with_gradient = (group.with_gradient or 0) + 1
    return finite
