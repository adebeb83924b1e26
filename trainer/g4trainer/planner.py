"""How the work is cut for the machine: pure functions without torch, for the trainer and the command line alike."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from g4trainer.recipe import Recipe

MAX_CPU_MICRO_BATCH = 32
"""On a CPU larger batches save nothing and take memory."""
EVALUATIONS_A_RUN = 10
LOG_LINES_A_RUN = 400
DATALOADER_WORKERS = {"cuda": 4, "cpu": 0}
"""Processes that decode images beside the GPU; on a CPU they would take the cores that train."""


@dataclass(frozen=True)
class Plan:
    """What "auto" became. Written once to plan.json; later attempts follow it."""

    per_device_train_batch_size: int
    """Samples a forward pass (the micro-batch)."""
    gradient_accumulation_steps: int
    """Micro-batches an optimizer step."""
    activation_checkpointing: Literal["none", "half", "full"]
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        return cls(**document)

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
    activation_checkpointing: Literal["none", "half", "full"],
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
    )


def training_arguments(
    recipe: Recipe, plan: Plan, *, device: Literal["cuda", "cpu"], output_dir: str
) -> dict[str, Any]:
    """`training_args.json`: loads back with `transformers.TrainingArguments(**json)` on a machine with that device."""
    training = recipe.training
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
        "optim": "adamw_torch_fused" if device == "cuda" else "adamw_torch",
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
        "dataloader_num_workers": DATALOADER_WORKERS[device],
        "dataloader_pin_memory": device == "cuda",
        "dataloader_persistent_workers": DATALOADER_WORKERS[device] > 0,
    }


def total_steps(recipe: Recipe, train_samples: int) -> int:
    """Optimizer steps of a run; the last step of an epoch may have fewer samples."""
    return math.ceil(recipe.training.num_train_epochs * math.ceil(train_samples / recipe.training.effective_batch_size))


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is at most `at_most` (at least 1)."""
    return max(divisor for divisor in range(1, max(1, min(number, at_most)) + 1) if number % divisor == 0)
