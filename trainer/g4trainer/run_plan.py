"""The plan of a run on the machine it is on: chosen once and kept in plan.json; smaller where memory ran out.

How to choose is g4trainer.planner's, in pure functions; here is what the machine has, and what is written.
"""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch

from g4trainer import vram
from g4trainer.dataset import Splits
from g4trainer.evaluate import half_batch
from g4trainer.exits import MemoryPart, OutOfMemory
from g4trainer.host_embedding import card_bytes
from g4trainer.metrics import Publisher, Status
from g4trainer.planner import (
    CPU_EVALUATION_BATCH,
    MAX_CPU_MICRO_BATCH,
    Plan,
    Setting,
    choose_plan,
    for_card,
    loader_workers,
    model_for,
    settings_of,
    training_arguments,
    what_fits,
)
from g4trainer.ranks import Ranks
from g4trainer.recipe import Recipe, lora_config
from g4trainer.rundir import RunDir, read_json, to_json, write_json
from g4trainer.staged import base_model_folder

SHARED_MEMORY = "/dev/shm"  # noqa: S108 where torch passes tensors between processes
Trial = Callable[[Plan, Sequence[Setting]], Plan]

log = logging.getLogger(__name__)


class RunPlan:
    """plan.json, with lora_config.json and training_args.json, which follow from it; the same on every rank."""

    current: Plan
    """Set by `choose` or `follow`."""

    def __init__(
        self, run: RunDir, recipe: Recipe, publisher: Publisher, status: Status, *, ranks: Ranks, device: torch.device
    ) -> None:
        """recipe: as it is for this number of processes."""
        self._run, self._recipe, self._publisher, self._status = run, recipe, publisher, status
        self._ranks, self._device = ranks, device
        self._images = 1
        """Of the sample with the most."""

    def choose(self, splits: Splits, *, text_tokens: int, trial: Trial | None) -> None:
        """Takes plan.json as an earlier attempt wrote it, else what fits this machine.

        text_tokens: of the longest sample, all but the image's.
        trial: measures a plan and settings beside it before anything is written; None trusts the prediction.
        """
        ranks, path = self._ranks, self._run.plan
        self._images = max(len(example.images) for example in splits.train)
        earlier = ranks.share(read_json(path) if ranks.leads and path.exists() else None)
        if earlier is not None:
            self.follow(Plan.from_json(earlier))
            return
        self.current = choose_plan(
            self._recipe,
            train_samples=len(splits.train),
            validation_samples=len(splits.validation),
            **self._what_fits(text_tokens),
        )
        if trial is not None:
            model = vram.Model(self._recipe_here, self._model_config)
            self.current = trial(self.current, settings_of(model, model.shape(text_tokens)))
        self._write()

    def follow(self, plan: Plan) -> None:
        """Takes a plan as it is for this number of processes: an earlier attempt may have had another."""
        self.current = plan.for_processes(self._ranks.size)
        if self.current != plan:
            if self._ranks.leads:
                log.info("plan for %d processes becomes one for %d", plan.processes, self.current.processes)
            self._write()

    def shards(self) -> int:
        """Processes that share the base model; 1 where each holds its own."""
        if self._ranks.size == 1:
            return 1
        if self._device.type == "cpu":
            shards = self._ranks.size if self._recipe.job.sharding == "full" else 1
        else:
            shards = model_for(self._recipe, self._model_config, self._free_bytes()).shards
        if shards > 1:
            log.info("the base model is shared among %d processes", shards)
        return shards

    def training_arguments(self, plan: Plan | None = None, *, output_dir: str = "output") -> dict[str, Any]:
        """For `transformers.TrainingArguments(**arguments)` on this machine. plan: by default the current one."""
        device: Literal["cuda", "cpu"] = "cuda" if self._device.type == "cuda" else "cpu"
        plan = plan or self.current
        workers = self._loader_workers(plan) if device == "cuda" else None
        return training_arguments(self._recipe, plan, device=device, output_dir=output_dir, workers=workers)

    def shrink(self, part: MemoryPart, error: Exception) -> None:
        """Goes on with a plan that needs less memory for that part. Raises OutOfMemory where there is none.

        error: what told that memory was short.
        """
        (self._shrink_training if part == "training" else self._shrink_evaluation)(error)

    def settle(self) -> None:
        """Returns once every change is written."""
        self._publisher.settle(self._run.plan, self._run.training_args)

    def _shrink_training(self, error: Exception) -> None:
        before, smaller = self.current, self.current.smaller()
        if smaller is None:
            raise OutOfMemory(
                f"out of GPU memory at a micro-batch of 1 with every layer's activations computed again: {error}"
            ) from error
        self._change(
            smaller,
            f"out of GPU memory: micro-batch {before.per_device_train_batch_size} becomes "
            f"{smaller.per_device_train_batch_size}, activation checkpointing {smaller.activation_checkpointing}; "
            f"the effective batch stays {self._recipe.training.effective_batch_size}",
        )

    def _shrink_evaluation(self, error: Exception) -> None:
        size = self.current.evaluation_batch_size
        half = half_batch(size, error)
        self._change(
            replace(self.current, evaluation_batch_size=half),
            f"out of GPU memory: evaluation batch {size} becomes {half}",
        )

    def _change(self, plan: Plan, why: str) -> None:
        """Says so, and publishes it. Where it is lost in a kill, the next attempt finds it again."""
        log.warning("%s", why)
        self._status.update(message=why)
        self.current = plan
        arguments = self.training_arguments()
        self._publisher.publish(self._run.training_args, lambda: to_json(arguments))
        self._publisher.publish(self._run.plan, lambda: to_json(plan.to_json()))

    def _write(self) -> None:
        """plan.json last: without it, there is no plan."""
        if not self._ranks.leads:
            return
        write_json(self._run.training_args, self.training_arguments())
        write_json(self._run.lora_config, lora_config(self._recipe.lora, base_model=self._recipe.model.id))
        write_json(self._run.plan, self.current.to_json())

    def _what_fits(self, text_tokens: int) -> dict[str, Any]:
        """What `choose_plan` asks the machine: on a GPU, what is fastest within its memory."""
        if self._device.type == "cpu":
            return {
                "micro_batch": MAX_CPU_MICRO_BATCH,
                "activation_checkpointing": "none",
                "evaluation_batch_size": CPU_EVALUATION_BATCH,
            }
        return what_fits(self._recipe_here, self._model_config, self._free_bytes(), text_tokens=text_tokens)

    def _loader_workers(self, plan: Plan) -> int:
        here = min(self._ranks.size, torch.cuda.device_count())
        cores = len(os.sched_getaffinity(0)) // max(1, here)
        shared = shutil.disk_usage(SHARED_MEMORY).free // max(1, here)
        vision = self._model_config["vision_config"]
        patches = self._recipe.model.max_soft_tokens * vision.get("pooling_kernel_size", 3) ** 2
        sample_bytes = self._images * patches * 3 * vision.get("patch_size", 16) ** 2
        return loader_workers(cores, shared, plan.per_device_train_batch_size * sample_bytes)

    def _free_bytes(self) -> int:
        """What a process may hold on its GPU, of all ranks the least."""
        free, _ = torch.cuda.mem_get_info()
        return int(self._ranks.least(free + torch.cuda.memory_reserved()))

    @cached_property
    def _recipe_here(self) -> Recipe:
        """The recipe as it is on this card."""
        return for_card(self._recipe, card_bytes(self._device))

    @cached_property
    def _model_config(self) -> dict[str, Any]:
        config: dict[str, Any] = read_json(base_model_folder(self._run.root, self._recipe.model) / "config.json")
        return config
