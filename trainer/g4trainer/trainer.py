"""transformers' Trainer with our loss, our validation and committed checkpoints.

The loss is taken only where a token is supervised and normalized by the supervised tokens of the whole effective
batch, so that how a batch is cut into micro-batches changes nothing.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from g4trainer.checkpoint import (
    ADAPTER_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    TRAINER_STATE_FILE,
    CheckpointError,
    checkpoint_problems,
    pack_optimizer,
    pack_random_states,
    read_tensors,
    rotate,
    unpack_optimizer,
    unpack_random_states,
    write_checkpoint,
)
from g4trainer.claims import Claim
from g4trainer.collator import IGNORED, Collator
from g4trainer.dataset import Example
from g4trainer.deadline import Deadline
from g4trainer.exits import NonFiniteLoss
from g4trainer.metrics import MetricsLog, Status
from g4trainer.model import adapter_tensors, load_adapter_weights
from g4trainer.planner import Plan
from g4trainer.rundir import RunDir, read_json

SECONDS_BETWEEN_CHECKPOINTS = 300.0
"""With save_steps = "auto": the work that an interruption loses at most, besides a step."""

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Progress:
    """What a run has done over all its attempts; kept in every checkpoint."""

    seconds: float = 0.0
    """Time in training steps, data loading included; validation and checkpoints are not."""
    samples: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    last_loss: float | None = None
    peak_memory_bytes: int = 0
    checkpoints: int = 0
    checkpoint_seconds: float = 0.0


class RunTrainer(Trainer):
    """Trains one run directory. Stops on its own when the deadline says so, with a checkpoint."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole effective batch

    def __init__(
        self,
        *,
        model: Any,
        args: TrainingArguments,
        collator: Collator,
        train: Sequence[Example],
        validation: Sequence[Example],
        plan: Plan,
        run: RunDir,
        recipe_hash: str,
        load_best: bool,
        claim: Claim,
        deadline: Deadline,
        status: Status,
        metrics: MetricsLog,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=validation or None,
            callbacks=[_Steps(self)],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # so that compute_loss is told the tokens of the effective batch
        self.plan, self.run, self.recipe_hash, self.load_best = plan, run, recipe_hash, load_best
        self.claim, self.deadline, self.status, self.metrics = claim, deadline, status, metrics
        self.progress = Progress()
        self.stopped: str | None = None
        self._samples_of_step = 0
        self._mark = self._last_checkpoint = time.monotonic()

    # Loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy summed over the supervised positions, divided by those of the whole effective batch."""
        if num_items_in_batch is None:
            raise ValueError("the number of supervised tokens of the effective batch is unknown")
        self._samples_of_step += len(inputs["input_ids"]) * self.accelerator.num_processes
        loss, outputs = self._summed_loss(model, inputs)
        # Gradients are averaged over processes, and the count is over all of them.
        loss = loss * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def _summed_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        tensors = {name: value for name, value in inputs.items() if name not in ("labels", "kept_labels")}
        outputs = model(**tensors, use_cache=False)
        logits = outputs.logits.float()  # (batch, supervised, vocabulary)
        targets = inputs["kept_labels"]  # (batch, supervised) int64, IGNORED where padded
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return loss, outputs

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Raises NonFiniteLoss before the optimizer takes the step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is None:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        if not math.isfinite(float(norm)):
            raise NonFiniteLoss(
                f"the gradient's norm is {float(norm)} at step {self.state.global_step + 1}, "
                f"the learning rate {self._get_learning_rate():.3g}."
            )
        return norm

    # Validation

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Validation loss a supervised token, exact whatever the batch size. Notes a new best one to be committed."""
        started = time.monotonic()
        self.model.eval()
        loss, tokens = 0.0, 0
        for batch in self.get_eval_dataloader(eval_dataset):
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                summed, _ = self._summed_loss(self.model, inputs)
            loss += float(summed)
            tokens += int((inputs["kept_labels"] != IGNORED).sum())
        metrics = {"eval_loss": loss / tokens}
        self.deadline.reserve("validation", time.monotonic() - started)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        best = self.progress.best_loss
        if self.load_best and (best is None or metrics["eval_loss"] < best):
            self.progress.best_step, self.progress.best_loss = self.state.global_step, metrics["eval_loss"]
            self.control.should_save = True
        return metrics

    def restore_best(self) -> None:
        """Puts the adapter of the lowest validation loss into the model. Raises CheckpointError where it is damaged."""
        best = self.progress.best_step
        if not self.load_best or best is None or best == self.state.global_step:
            return
        folder = self.run.checkpoints / f"step-{best:08d}"
        problems = checkpoint_problems(folder, self.recipe_hash)
        if problems:
            raise CheckpointError(f"{folder}: the best checkpoint is damaged: {'; '.join(problems)}")
        load_adapter_weights(self.model, read_tensors(folder / ADAPTER_FILE))
        log.info("the adapter is that of step %d, with the lowest validation loss", best)

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.claim.check()
        started = time.monotonic()
        self.progress.peak_memory_bytes = max(self.progress.peak_memory_bytes, _peak_memory())
        optimizer_tensors, optimizer_document = pack_optimizer(self.optimizer.state_dict())
        write_checkpoint(
            self.run.checkpoints,
            self.state.global_step,
            tensors={ADAPTER_FILE: adapter_tensors(self.model), OPTIMIZER_FILE: optimizer_tensors},
            documents={
                STATE_FILE: {
                    "optimizer": optimizer_document,
                    "scheduler": self.lr_scheduler.state_dict(),
                    "random": pack_random_states(),
                    "progress": dataclasses.asdict(self.progress),
                },
                TRAINER_STATE_FILE: dataclasses.asdict(self.state),
            },
            recipe_hash=self.recipe_hash,
            claim=self.claim.name,
        )
        best = self.progress.best_step
        rotate(self.run.checkpoints, keep=() if best is None else (best,))
        took = time.monotonic() - started
        self.deadline.reserve("checkpoint", took)
        self.progress.checkpoints += 1
        self.progress.checkpoint_seconds += took
        self._last_checkpoint = time.monotonic()
        log.info("checkpoint of step %d committed in %.1f s", self.state.global_step, took)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_adapter_weights(self.model, read_tensors(folder / ADAPTER_FILE))
        self.progress = Progress(**read_json(folder / STATE_FILE)["progress"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = read_json(Path(checkpoint) / STATE_FILE)
        self.optimizer.load_state_dict(
            unpack_optimizer(read_tensors(Path(checkpoint) / OPTIMIZER_FILE), state["optimizer"])
        )
        self.lr_scheduler.load_state_dict(state["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            unpack_random_states(read_json(Path(checkpoint) / STATE_FILE)["random"])

    # Progress

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._mark = time.monotonic()

    def summary(self) -> dict[str, Any]:
        """`train` of results.json."""
        progress = self.progress
        return {
            "steps": self.state.global_step,
            "samples": progress.samples,
            "samples_per_second": progress.samples / progress.seconds if progress.seconds else None,
            "loss": progress.last_loss,
            "best_step": progress.best_step,
            "best_validation_loss": progress.best_loss,
            "peak_memory_bytes": max(progress.peak_memory_bytes, _peak_memory()),
            "trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "checkpoints": progress.checkpoints,
            "checkpoint_seconds": round(progress.checkpoint_seconds, 3),
        }

    def training_begins(self) -> None:
        """Starts the clocks, which loading must not count in."""
        self._mark = self._last_checkpoint = time.monotonic()

    def step_finished(self) -> None:
        """Counts a step, and asks for validation, a checkpoint or the end where it is time."""
        took = time.monotonic() - self._mark
        step, total = self.state.global_step, self.plan.total_steps
        self.deadline.reserve("step", took)
        self.progress.seconds += took
        self.progress.samples += self._samples_of_step
        self._samples_of_step = 0
        self.stopped = self.deadline.reason()
        every = self.plan.save_steps
        due = step % every == 0 if every else time.monotonic() - self._last_checkpoint >= SECONDS_BETWEEN_CHECKPOINTS
        self.control.should_save |= due or step == total or self.stopped is not None
        self.control.should_training_stop |= self.stopped is not None and step < total
        self.control.should_evaluate |= step == total and self.eval_dataset is not None
        rate = self.progress.samples / self.progress.seconds
        self.status.update(
            step=step,
            total_steps=total,
            samples_per_second=round(rate, 3),
            eta_s=round((total - step) * self.progress.seconds / step, 1),
        )

    def logged(self, logs: dict[str, float]) -> None:
        """Passes what the Trainer logs on to the metrics and the status."""
        step = self.state.global_step
        if "eval_loss" in logs:
            self.metrics.add("eval", step, eval_loss=logs["eval_loss"])
            log.info("step %d: validation loss %.4f", step, logs["eval_loss"])
        elif "loss" in logs:
            self.progress.last_loss = logs["loss"]
            rate = self.progress.samples / self.progress.seconds
            self.metrics.add(
                "train",
                step,
                epoch=logs.get("epoch"),
                loss=logs["loss"],
                learning_rate=logs["learning_rate"],
                grad_norm=logs.get("grad_norm"),
                samples_per_second=rate,
            )
            self.status.update(loss=logs["loss"], learning_rate=logs["learning_rate"])
            log.info("step %d of %d: loss %.4f, %.2f samples/s", step, self.plan.total_steps, logs["loss"], rate)


class _Steps(TrainerCallback):
    """Tells the RunTrainer what happens; the Trainer offers no other way in at these points."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *event: Any, **context: Any) -> None:
        self.trainer.training_begins()

    def on_step_end(self, *event: Any, **context: Any) -> None:
        self.trainer.step_finished()

    def on_log(self, *event: Any, logs: Any = None, **context: Any) -> None:
        self.trainer.logged(logs)


def _peak_memory() -> int:
    """Peak bytes that torch held on the GPU since the reset; 0 without one."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0
