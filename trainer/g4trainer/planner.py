"""How the work is cut for the machine: pure functions without torch, for the trainer and the command line alike."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from g4trainer import timing, vram
from g4trainer.gemma import SOFT_TOKENS
from g4trainer.recipe import Recipe, RecipeError, parse_recipe
from g4trainer.vram import Checkpointing

MAX_CPU_MICRO_BATCH, CPU_EVALUATION_BATCH = 32, 64
"""On a CPU larger batches save nothing and take memory."""
EMBEDDINGS_ON_HOST = 'model.per_layer_embeddings="host"'
EVALUATIONS_A_RUN = 10
CHECKPOINTS_KEPT = 2
"""Committed checkpoints that rotation leaves, besides the best one."""
LOG_LINES_A_RUN = 200
"""A step that is logged waits for the device."""
DATALOADER_WORKERS = {"cuda": 4, "cpu": 0}
"""Processes that decode images beside the GPU, where the machine is not known; on a CPU they would take the cores that
train."""
MAX_LOADER_WORKERS = 8
"""Of large photos (12 megapixels) they make 100 samples a second, a GPU takes 22 of the E4B (benchmarks/README.md)."""
CORES_OF_THE_TRAINER = 2
"""One launches kernels, one pins batches."""
PREFETCHED = 2
"""Batches that each worker makes ahead: torch's default."""
MAX_MICRO_BATCH = 64
"""Larger ones save no time worth measuring."""
EVALUATION_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Larger ones save no time worth measuring (benchmarks/README.md)."""
FRAME_TOKENS, LABELS_TOKENS, CHARACTERS_A_TOKEN = 16, 200, 4
"""Of the turns around a prompt, of a list of some 37 labels, and of ordinary text."""


@dataclass(frozen=True)
class Plan:
    """What "auto" became. Written once to plan.json; later attempts follow it."""

    per_device_train_batch_size: int
    """Samples a forward pass (the micro-batch)."""
    gradient_accumulation_steps: int
    """Micro-batches an optimizer step."""
    activation_checkpointing: Checkpointing
    evaluation_batch_size: int
    """Samples generated at once."""
    total_steps: int
    """Optimizer steps of the run."""
    warmup_steps: int
    eval_steps: int
    """Optimizer steps between measurements of the validation loss; above total_steps where there is none."""
    save_steps: int | None
    """Optimizer steps between checkpoints; None goes by the clock."""
    logging_steps: int
    processes: int = 1
    """GPUs that share an optimizer step, each with its own micro-batches."""
    trial: Sequence[Mapping[str, Any]] = ()
    """What g4trainer.trial measured before the first step, one entry a setting."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        return cls(**document)

    def for_processes(self, count: int) -> Self:
        """The plan by which another number of processes takes the same optimizer steps.

        count: divides the effective batch. The micro-batch stays, or becomes the next smaller one that divides.
        """
        if count == self.processes:
            return self
        effective = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.processes
        micro = largest_divisor(effective // count, self.per_device_train_batch_size)
        return replace(
            self,
            processes=count,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=effective // count // micro,
        )

    def smaller(self) -> Self | None:
        """The plan that needs less memory for the same effective batch; None where nothing is left to shrink.

        Half the micro-batch (a third of 3, and so on), down to 1; then every layer's activations computed again.
        """
        micro = self.per_device_train_batch_size
        if micro > 1:
            factor = next(divisor for divisor in range(2, micro + 1) if micro % divisor == 0)
            return replace(
                self,
                per_device_train_batch_size=micro // factor,
                gradient_accumulation_steps=self.gradient_accumulation_steps * factor,
            )
        if self.activation_checkpointing != "full":
            return replace(self, activation_checkpointing="full")
        return None


def choose_plan(
    recipe: Recipe,
    *,
    train_samples: int,
    validation_samples: int,
    micro_batch: int,
    activation_checkpointing: Checkpointing,
    evaluation_batch_size: int,
) -> Plan:
    """Fills in every "auto" of a recipe.

    micro_batch, activation_checkpointing, evaluation_batch_size: what fits the machine; a value that the recipe
    states wins. The micro-batch is lowered to the next divisor of the samples an optimizer step has on one GPU.
    """
    training = recipe.training
    share = training.effective_batch_size // recipe.job.gpus
    stated = training.per_device_train_batch_size
    micro = stated if stated != "auto" else largest_divisor(share, micro_batch)
    total = total_steps(recipe, train_samples)
    evaluations = 1 if validation_samples else 0
    every = training.eval_steps if training.eval_steps != "auto" else max(1, total // EVALUATIONS_A_RUN)
    checkpointing = training.activation_checkpointing
    evaluation_batch = recipe.evaluation.batch_size
    return Plan(
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        activation_checkpointing=activation_checkpointing if checkpointing == "auto" else checkpointing,
        evaluation_batch_size=evaluation_batch_size if evaluation_batch == "auto" else evaluation_batch,
        total_steps=total,
        warmup_steps=math.ceil(total * training.warmup_ratio),
        eval_steps=every if evaluations else total + 1,
        save_steps=None if training.save_steps == "auto" else training.save_steps,
        logging_steps=max(1, total // LOG_LINES_A_RUN),
        processes=recipe.job.gpus,
    )


def on_processes(recipe: Recipe, count: int) -> Recipe:
    """The recipe as it is planned for so many processes, whatever its `job.gpus` says.

    Raises RecipeError where the effective batch cannot be divided among them.
    """
    if count == recipe.job.gpus:
        return recipe
    effective = recipe.training.effective_batch_size
    if count not in processes_that_divide(recipe, count):
        numbers = ", ".join(str(number) for number in processes_that_divide(recipe, max(count, recipe.job.gpus)))
        problem = (
            f"training.effective_batch_size: got {effective}, which {count} processes cannot share in whole "
            f"micro-batches; start one of these numbers of processes: {numbers}."
        )
        raise RecipeError("recipe", [problem])
    return recipe.model_copy(update={"job": recipe.job.model_copy(update={"gpus": count})})


def processes_that_divide(recipe: Recipe, at_most: int) -> list[int]:
    """Numbers of processes, 1 first, among which the effective batch can be divided in whole micro-batches."""
    training = recipe.training
    stated = training.per_device_train_batch_size
    micro = 1 if stated == "auto" else stated
    return [n for n in range(1, at_most + 1) if training.effective_batch_size % (n * micro) == 0]


@dataclass(frozen=True)
class Fit:
    """How a run is cut for a card."""

    micro_batch: int
    activation_checkpointing: Checkpointing
    evaluation_batch_size: int
    training: vram.Memory
    """At the peak, the allocator's reserve included."""
    evaluation: vram.Memory
    loading: int
    """Bytes when the last weight was read."""
    free_bytes: int

    @property
    def needed(self) -> int:
        return max(self.training.total, self.evaluation.total, self.loading)

    @property
    def fits(self) -> bool:
        return self.needed <= self.free_bytes


def what_fits(
    recipe: Recipe, config: Mapping[str, Any], free_bytes: int, *, text_tokens: int | None = None
) -> dict[str, Any]:
    """What `choose_plan` asks the machine: the fastest micro_batch, activation_checkpointing and
    evaluation_batch_size within a card's memory.

    recipe: as `for_card` makes it. config: the parsed config.json of the model.
    free_bytes: what this process may hold on the card in all, the weights that are there already included.
    text_tokens: of the longest sample, all but the image's; None goes by the recipe.
    Where nothing fits, it is what needs least: the card then has the last word.
    """
    model = model_for(recipe, config, free_bytes)
    tokens = expected_text_tokens(recipe) if text_tokens is None else text_tokens
    fit = best_fit(model, model.shape(tokens), free_bytes)
    return {
        "micro_batch": fit.micro_batch,
        "activation_checkpointing": fit.activation_checkpointing,
        "evaluation_batch_size": fit.evaluation_batch_size,
    }


def for_card(recipe: Recipe, card_bytes: int | None) -> Recipe:
    """The recipe with what "auto" of `model.per_layer_embeddings` is on a card of that memory in all; None without."""
    where = "host" if vram.embeddings_on_host(recipe.model.per_layer_embeddings, card_bytes) else "card"
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"per_layer_embeddings": where})})


def model_for(recipe: Recipe, config: Mapping[str, Any], free_bytes: int) -> vram.Model:
    """The model as each of the recipe's GPUs holds it: whole, or its share of what fits none of them."""
    job, whole = recipe.job, vram.Model(recipe, config)
    if job.gpus == 1 or job.sharding == "none" or recipe.model.quantization == "nf4":
        return whole
    if job.sharding == "auto" and best_fit(whole, whole.shape(expected_text_tokens(recipe)), free_bytes).fits:
        return whole
    return vram.Model(recipe, config, shards=job.gpus)


def best_fit(model: vram.Model, shape: vram.Shape, free_bytes: int) -> Fit:
    """The fastest setting that fits; where none does, the one that needs least. What the recipe states stays."""
    allowed = [setting for setting in settings_of(model, shape) if setting.allowed]
    fitting = [setting for setting in allowed if setting.memory.total <= free_bytes]
    best = fitting[0] if fitting else min(allowed, key=lambda setting: setting.memory.total)
    batch = _evaluation_batch(model, shape, free_bytes)
    evaluation = evaluation_memory(model, shape, batch)
    return Fit(
        best.micro_batch, best.activation_checkpointing, batch, best.memory, evaluation, model.loading, free_bytes
    )


@dataclass(frozen=True)
class Setting:
    """A way to compute an optimizer step, as it is predicted."""

    micro_batch: int
    activation_checkpointing: Checkpointing
    memory: vram.Memory
    """At the peak, the allocator's reserve included."""
    seconds: float
    """Of an optimizer step."""
    allowed: bool = True
    """Whether the recipe leaves it open."""


def settings_of(model: vram.Model, shape: vram.Shape) -> list[Setting]:
    """All settings of a recipe's effective batch, the fastest first; of those as fast, what needs less memory."""
    recipe = model.recipe
    card = timing.CARDS[recipe.job.accelerator]
    share = recipe.training.effective_batch_size // recipe.job.gpus
    allowed = {(micro, again) for micro in _micro_batches(recipe, share) for again in _checkpointing(recipe)}
    every: Sequence[Checkpointing] = ("none", "half", "full")
    divisors = {number for number in range(1, min(share, MAX_MICRO_BATCH) + 1) if share % number == 0}
    settings = [
        Setting(
            micro,
            again,
            training_memory(model, shape, micro, again),
            timing.step_seconds(
                model, shape, card, micro_batch=micro, checkpointing=again, accumulation=max(1, share // micro)
            ),
            (micro, again) in allowed,
        )
        for micro in sorted(divisors | {micro for micro, _ in allowed})
        for again in every
    ]
    return sorted(settings, key=lambda setting: (setting.seconds, setting.memory.total))


def cpu_fit(model: vram.Model, shape: vram.Shape, free_bytes: int) -> Fit:
    """What a run on a CPU takes, in fp32: its choices do not go by memory.

    model: made with number_bytes=4.
    """
    recipe = model.recipe
    training = recipe.training
    stated, batch = training.per_device_train_batch_size, recipe.evaluation.batch_size
    micro = largest_divisor(training.effective_batch_size, MAX_CPU_MICRO_BATCH) if stated == "auto" else stated
    checkpointing = "none" if training.activation_checkpointing == "auto" else training.activation_checkpointing
    step = vram.Step(micro, checkpointing, "sdpa", training.effective_batch_size > micro, compiled=False)
    batch = CPU_EVALUATION_BATCH if batch == "auto" else batch
    peak = vram.with_reserve(vram.training(model, shape, step))
    evaluation = evaluation_memory(model, shape, batch)
    return Fit(micro, checkpointing, batch, peak, evaluation, model.loading, free_bytes)


def training_memory(model: vram.Model, shape: vram.Shape, micro: int, checkpointing: Checkpointing) -> vram.Memory:
    """The peak of a step of that recipe, the allocator's reserve included."""
    share = model.recipe.training.effective_batch_size // model.recipe.job.gpus
    attention = vram.attention_for(model.recipe.model.attn_implementation, shape.tokens)
    step = vram.Step(micro, checkpointing, attention, share > micro, compiled=True)
    return vram.with_reserve(vram.training(model, shape, step))


def evaluation_memory(model: vram.Model, shape: vram.Shape, batch: int) -> vram.Memory:
    """The peak of answering a batch of images, the allocator's reserve included."""
    return vram.with_reserve(vram.evaluation(model, shape, batch, new_tokens=vram.answer_tokens(model.recipe)))


def nearest_fits(recipe: Recipe, config: Mapping[str, Any], free_bytes: int) -> list[str]:
    """Changes, each of which makes a recipe fit, as `section.key=value`; nearest first, empty where none does.

    First what changes no result, then fewer tokens of an image, then a smaller rank.
    """
    automatic = 'training.per_device_train_batch_size="auto"', 'training.activation_checkpointing="auto"'
    changes: list[tuple[str, ...]] = [automatic]
    on_card = recipe.model.per_layer_embeddings != "host"
    if on_card and vram.Model(recipe, config).facts.per_layer_embedding_parameters:
        changes.append((*automatic, EMBEDDINGS_ON_HOST))
    fewer = [soft for soft in reversed(SOFT_TOKENS) if soft < recipe.model.max_soft_tokens]
    changes += [(*automatic, f"model.max_soft_tokens={soft}") for soft in fewer]
    changes += [(*automatic, f"lora.r={r}") for r in (32, 16, 8) if r < recipe.lora.r]
    if recipe.model.quantization == "none":
        changes.insert(1, (*automatic, 'model.quantization="nf4"'))
    found = []
    for change in changes:
        changed = with_changes(recipe, change)
        model = model_for(changed, config, free_bytes)
        if best_fit(model, model.shape(expected_text_tokens(changed)), free_bytes).fits:
            needed = [one for one in change if with_changes(recipe, (one,)) != recipe]
            found.append(" ".join(needed))
    return found


def with_changes(recipe: Recipe, changes: Iterable[str]) -> Recipe:
    """The recipe with `section.key=value` in place of what it says; the values in JSON."""
    document = recipe.model_dump(mode="json")
    for change in changes:
        path, _, value = change.partition("=")
        section, key = path.split(".")
        document[section][key] = json.loads(value)
    return parse_recipe(document, source="recipe")


def expected_text_tokens(recipe: Recipe) -> int:
    """Tokens of a sample beside its image's, before the data is read: the turn's frame, the prompt and the answer."""
    labels = LABELS_TOKENS if "{labels}" in recipe.data.prompt else 0
    return FRAME_TOKENS + len(recipe.data.prompt) // CHARACTERS_A_TOKEN + labels + vram.ANSWER_TOKENS


def _micro_batches(recipe: Recipe, share: int) -> list[int]:
    stated = recipe.training.per_device_train_batch_size
    if stated != "auto":
        return [stated]
    return [number for number in range(1, min(share, MAX_MICRO_BATCH) + 1) if share % number == 0]


def _checkpointing(recipe: Recipe) -> tuple[Checkpointing, ...]:
    stated = recipe.training.activation_checkpointing
    return ("none", "half", "full") if stated == "auto" else (stated,)


def _evaluation_batch(model: vram.Model, shape: vram.Shape, free_bytes: int) -> int:
    stated = model.recipe.evaluation.batch_size
    if stated != "auto":
        return stated
    fitting = [size for size in EVALUATION_BATCHES if evaluation_memory(model, shape, size).total <= free_bytes]
    return max(fitting, default=1)


def loader_workers(cores: int, shared_bytes: int, batch_bytes: int) -> int:
    """Processes that make batches for one GPU: what its cores allow, and the memory that batches are passed through.

    cores: of the machine, for this GPU. shared_bytes: free in /dev/shm, where too large a batch kills a worker.
    Returns 0 where not even one fits: the trainer then makes its batches itself.
    """
    wanted = max(1, min(MAX_LOADER_WORKERS, cores - CORES_OF_THE_TRAINER))
    held = shared_bytes // max(1, batch_bytes)  # batches
    return max(0, min(wanted, (held - 1) // PREFETCHED))


def training_arguments(
    recipe: Recipe, plan: Plan, *, device: Literal["cuda", "cpu"], output_dir: str, workers: int | None = None
) -> dict[str, Any]:
    """`training_args.json`: loads back with `transformers.TrainingArguments(**json)` on a machine with that device.

    workers: processes that make batches; by default DATALOADER_WORKERS.
    """
    training = recipe.training
    workers = DATALOADER_WORKERS[device] if workers is None else workers
    every_n_layers = 2 if plan.activation_checkpointing == "half" else 1
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": plan.per_device_train_batch_size,
        "per_device_eval_batch_size": plan.per_device_train_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "num_train_epochs": training.num_train_epochs,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": plan.warmup_steps,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": "adamw_torch_fused",  # which can pass over a step (g4trainer.finite)
        "seed": training.seed,
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "activation_checkpointing": plan.activation_checkpointing != "none",
        # Reentrant checkpointing gives wrong gradients where layers share keys and values.
        "activation_checkpointing_kwargs": {"use_reentrant": False, "every_n_layers": every_n_layers},
        "eval_strategy": "steps" if plan.eval_steps <= plan.total_steps else "no",
        "eval_steps": plan.eval_steps,
        "save_strategy": "no",  # checkpoints are committed by g4trainer.checkpoint, by the clock or by save_steps
        "logging_strategy": "steps",
        "logging_steps": plan.logging_steps,
        "logging_nan_inf_filter": False,  # it would show a loss that is not a number as 0
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_num_workers": workers,
        "dataloader_pin_memory": device == "cuda",
        "accelerator_config": {"non_blocking": device == "cuda"},  # a batch's copy would wait for all before it
        "dataloader_persistent_workers": workers > 0,
    }


def total_steps(recipe: Recipe, train_samples: int) -> int:
    """Optimizer steps of a run; the last step of an epoch may have fewer samples."""
    return math.ceil(recipe.training.num_train_epochs * math.ceil(train_samples / recipe.training.effective_batch_size))


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is at most `at_most` (at least 1)."""
    return max(divisor for divisor in range(1, max(1, min(number, at_most)) + 1) if number % divisor == 0)
