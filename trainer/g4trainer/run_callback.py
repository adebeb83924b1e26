"""What happens between optimizer steps: clocks, status and metrics; and when to validate, to commit and to stop."""

import logging
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from g4trainer.attempt import Attempt
from g4trainer.checkpoint_writer import CheckpointWriter
from g4trainer.planner import Plan
from g4trainer.progress import Progress, peak_memory_bytes

SECONDS_BETWEEN_CHECKPOINTS = 300.0
"""With save_steps = "auto": the work that an interruption loses at most, besides a step and a checkpoint's write."""
RECENT_STEPS = 20
"""The longest of so many steps is what the next one may take; the first of all, which compiles, is soon forgotten."""
STEPS_AHEAD = 2
"""Steps that an attempt needs time for before it may stop: the one that the device is still at, and the next."""
ADAM_BYTES = 12
"""Of a checkpoint, a trainable parameter: itself and AdamW's two moments, in fp32."""

log = logging.getLogger(__name__)


class Trained(Protocol):
    """What the callback knows of the trainer (g4trainer.trainer) that it follows."""

    attempt: Attempt
    plan: Plan
    writer: CheckpointWriter
    progress: Progress
    stopped: str | None
    eval_dataset: Any

    def trained_parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def take_samples(self) -> int: ...

    def catch_up(self) -> None: ...


class RunCallback(TrainerCallback):
    """Follows a trainer; all it changes there is `progress`, `stopped` and the Trainer's control."""

    def __init__(self, trainer: Trained) -> None:
        self._trainer = trainer
        self._recent_steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self.start_step_clock()
        self._last_checkpoint = time.monotonic()

    def start_step_clock(self) -> None:
        """The next step begins: what logging, validation and checkpoints took is none of it."""
        self._step_began = time.monotonic()

    def prolong_step(self, seconds: float) -> None:
        """The step that has ended took so much longer: the device was still at it."""
        self._trainer.progress.seconds += seconds
        if self._recent_steps:
            self._recent_steps[-1] += seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Starts the clocks, which loading must not count in."""
        trainer = self._trainer
        self.start_step_clock()
        self._last_checkpoint = time.monotonic()
        trainer.writer.expect(ADAM_BYTES * sum(p.numel() for p in trainer.trained_parameters()))
        trainer.attempt.metrics.resume(state.global_step, state.log_history)
        trainer.catch_up()

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Counts a step, and asks for validation, a checkpoint or the end where it is time."""
        trainer, attempt, progress = self._trainer, self._trainer.attempt, self._trainer.progress
        attempt.claim.check()
        took = time.monotonic() - self._step_began
        step, total = state.global_step, trainer.plan.total_steps
        self._recent_steps.append(took)
        attempt.deadline.reserve("step", STEPS_AHEAD * max(self._recent_steps))
        attempt.deadline.reserve("checkpoint", trainer.writer.expected_s())
        progress.seconds += took
        progress.samples += trainer.take_samples()
        trainer.stopped = attempt.deadline.reason()
        control.should_save |= self._checkpoint_due(step, took) or step == total or trainer.stopped is not None
        control.should_training_stop |= trainer.stopped is not None and step < total
        control.should_evaluate |= step == total and trainer.eval_dataset is not None
        attempt.status.update(
            step=step,
            total_steps=total,
            samples_per_second=round(progress.samples / progress.seconds, 3),
            eta_s=round((total - step) * progress.seconds / step, 1),
        )

    def on_save(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self._last_checkpoint = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **context: Any) -> None:
        """Passes what the Trainer logs on to the metrics and the status."""
        trainer, attempt, step = self._trainer, self._trainer.attempt, state.global_step
        if "eval_loss" in logs:
            attempt.metrics.add("eval", step, eval_loss=logs["eval_loss"])
            log.info("step %d: validation loss %.4f", step, logs["eval_loss"])
        elif "loss" in logs:
            progress = trainer.progress
            progress.last_loss = logs["loss"]
            rate = progress.samples / progress.seconds
            attempt.metrics.add(
                "train",
                step,
                epoch=logs.get("epoch"),
                loss=logs["loss"],
                learning_rate=logs["learning_rate"],
                grad_norm=logs.get("grad_norm"),
                samples_per_second=rate,
                peak_memory_bytes=peak_memory_bytes() or None,
            )
            attempt.status.update(loss=logs["loss"], learning_rate=logs["learning_rate"])
            log.info("step %d of %d: loss %.4f, %.2f samples/s", step, trainer.plan.total_steps, logs["loss"], rate)

    def _checkpoint_due(self, step: int, took: float) -> bool:
        every, ranks = self._trainer.plan.save_steps, self._trainer.attempt.ranks
        if every:
            return step % every == 0
        due = time.monotonic() - self._last_checkpoint + took >= SECONDS_BETWEEN_CHECKPOINTS
        return ranks.any(due and ranks.leads) if ranks.size > 1 else due  # by one clock
