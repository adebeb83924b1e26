"""transformers' Trainer with our loss, our validation and committed checkpoints.

The loss is taken only where a token is supervised and normalized by the supervised tokens of the whole effective
batch, so that how a batch is cut into micro-batches changes nothing.

A step does not wait for the device, unless it is logged, validated or committed: while that computes one, the host
starts the kernels of the next. Whether loss and
gradient are finite is decided on the device, which leaves the adapters as they are where not, and read a step later.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from g4trainer.attempt import Attempt
from g4trainer.checkpoint import ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE, TRAINER_STATE_FILE, Checkpoint
from g4trainer.checkpoint_writer import CheckpointWriter
from g4trainer.collator import IGNORED, Collator
from g4trainer.dataset import Example
from g4trainer.exits import Interrupted, NonFiniteLoss
from g4trainer.finite import FiniteGuard
from g4trainer.gradients import GradientMean
from g4trainer.memory_errors import as_out_of_memory
from g4trainer.model import adapter_tensors, is_sharded, load_adapter_weights
from g4trainer.pixels import as_numbers
from g4trainer.planner import Plan
from g4trainer.progress import Progress, peak_memory_bytes
from g4trainer.rank_checkpoint import load_best_adapter
from g4trainer.rank_data import train_loader, validation_loader
from g4trainer.run_callback import RunCallback
from g4trainer.state import pack_optimizer, pack_random_states, unpack_optimizer, unpack_random_states

NO_PROGRESS = "this attempt finished no step: give attempts more time with job.timeout_s."

log = logging.getLogger(__name__)


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
        recipe_hash: str,
        load_best: bool,
        attempt: Attempt,
    ) -> None:
        self.attempt, self.ranks = attempt, attempt.ranks
        self.plan, self.recipe_hash, self.load_best = plan, recipe_hash, load_best
        args._n_gpu = min(args.n_gpu, 1)  # a process has one, whatever CUDA shows: no DataParallel
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=validation or None,
        )
        self.remove_callback(PrinterCallback)
        self._between_steps = RunCallback(self)
        self.add_callback(self._between_steps)
        if self.ranks.size > 1:  # what the Trainer calls a model that sees to its gradients itself: it is not wrapped
            self.is_distributed_loading_by_transformers = True
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._guard = FiniteGuard()
        self._mean = GradientMean(self._trained, self.ranks, early=not is_sharded(model))
        self.model_accepts_loss_kwargs = True  # so that compute_loss is told the tokens of the effective batch
        self.progress = Progress()
        self.writer = CheckpointWriter(attempt.run.checkpoints, recipe_hash, attempt.claim)
        self.stopped: str | None = None
        """Why this attempt stops before the end."""
        self._resumed: Checkpoint | None = None
        self._samples_of_step = self._samples_of_all_ranks = 0
        self._validation_loader: Any = None

    def train_from(self, checkpoint: Checkpoint | None) -> None:
        """Trains from a checkpoint, or from the start, until the end or until it is time to stop.

        Returns with everything committed. Raises Interrupted where it was stopped before the end.
        """
        self._resumed = checkpoint
        self.model.train()  # PEFT's modules say so already, but the layers of a loaded model are still in evaluation
        try:
            with self._asking_only_adapters(), self._mean, as_out_of_memory():
                self.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
        finally:
            self.writer.wait()
        self.ranks.share(None)  # nobody goes on before everything is committed
        step, total = self.state.global_step, self.plan.total_steps
        if step < total or self.progress.validation_owed:
            raise Interrupted(
                f"stopped at step {step} of {total}: {self.stopped}; the next attempt resumes.",
                None if step > (checkpoint.step if checkpoint else 0) else NO_PROGRESS,
            )

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
        if self.ranks.size == 1:
            self._samples_of_step += len(inputs["input_ids"])
        else:
            self._samples_of_step = self._samples_of_all_ranks
        loss, outputs = self._summed_loss(model, inputs)
        # Gradients are averaged over processes, and the count is over all of them.
        loss = loss * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def _summed_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        tensors = {name: value for name, value in inputs.items() if name not in ("labels", "kept_labels")}
        tensors["pixel_values"] = as_numbers(tensors["pixel_values"])
        outputs = model(**tensors, use_cache=False)
        logits = outputs.logits.float()  # (batch, supervised, vocabulary)
        targets = inputs["kept_labels"]  # (batch, supervised) int64, IGNORED where padded
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return loss, outputs

    @contextlib.contextmanager
    def as_in_training(self) -> Iterator[None]:
        """The model as `train` makes it, around `pass_over`; afterwards it is as it was."""
        arguments, training = self.args, self.model.training
        if arguments.activation_checkpointing:
            options = dict(arguments.activation_checkpointing_kwargs)
            every = options.pop("every_n_layers")
            self.model.activation_checkpointing_enable(options, every_n_layers=every)
        self.model.train()
        try:
            yield
        finally:
            self.model.train(training)
            if arguments.activation_checkpointing:
                base = self.model.get_base_model()
                base.activation_checkpointing_disable()
                base.disable_input_require_grads()

    @as_out_of_memory()
    def pass_over(self, batch: dict[str, torch.Tensor]) -> None:
        """A micro-batch forward and backward, as in a step; its gradients are added to those that are there."""
        inputs = self._prepare_inputs(batch)
        with self.accelerator.autocast():
            loss, _ = self._summed_loss(self.model, inputs)
        loss.backward()

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """A micro-batch, forward and backward; after the last of a step, gradients are those of all ranks together."""
        if not model.training:
            model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss: torch.Tensor = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        last = self.ranks.size > 1 and self.accelerator.sync_gradients
        if last:
            self._mean.begin()
        self.accelerator.backward(loss)
        if last:
            self._mean.finish()
        return loss.detach()

    @contextlib.contextmanager
    def _asking_only_adapters(self) -> Iterator[None]:
        """Within, the model's `zero_grad`, which the Trainer calls, does not go through its thousands of modules."""

        def zero_grad(set_to_none: bool = True) -> None:
            for parameter in self._trained:
                parameter.grad = None

        self.model.zero_grad = zero_grad
        try:
            yield
        finally:
            del self.model.zero_grad

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: nobody reads it, and the Trainer's way is to go through all parameters at every micro-batch,
        which takes 44 ms of the host's time for the 31B."""
        return 0

    def _sync_replicated_trainable_parameters(self, model: Any) -> None:
        """All ranks begin with rank 0's adapters. The Trainer's own hooks reduce one parameter at a time."""
        self.ranks.share_tensors(p.data for p in model.parameters() if p.requires_grad)

    # Data

    def get_train_dataloader(self) -> Any:
        """Samples in the order of one process, whatever the number of ranks."""
        if self.ranks.size == 1:
            return super().get_train_dataloader()
        return train_loader(
            self.train_dataset,
            self.data_collator,
            self.ranks,
            micro_batch=self.plan.per_device_train_batch_size,
            accumulation=self.plan.gradient_accumulation_steps,
            seed=self.args.seed,
            **self._loader_options(),
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if self.ranks.size == 1:
            return super().get_eval_dataloader(eval_dataset)
        if self._validation_loader is None:
            self._validation_loader = validation_loader(
                self.eval_dataset,
                self.data_collator,
                self.ranks,
                micro_batch=self.plan.per_device_train_batch_size,
                **self._loader_options(),
            )
        return self._validation_loader

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory,
            "persistent_workers": self.args.dataloader_persistent_workers,
        }

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Supervised tokens of the whole effective batch, over all ranks; their samples are counted too."""
        if self.ranks.size == 1:
            return super()._get_num_items_in_batch(batch_samples, device)
        supervised = [int((batch["kept_labels"] != IGNORED).sum()) for batch in batch_samples]
        samples = sum(len(batch["input_ids"]) for batch, count in zip(batch_samples, supervised, strict=True) if count)
        tokens, all_samples = self.ranks.total(sum(supervised), samples)
        self._samples_of_all_ranks = int(all_samples)
        return torch.full((), tokens, dtype=torch.float32, device=device)

    def _prepare_input(self, data: Any) -> Any:
        """On the device; from pinned memory, without waiting for what was asked of it before."""
        if isinstance(data, torch.Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> torch.Tensor:
        """The norm of all gradients. Has the optimizer pass over a step that is not finite.

        Raises NonFiniteLoss where the step before was one.
        """
        norm: torch.Tensor = grad_norm
        if norm is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
        self._guard.check()
        self._guard.watch(
            self.optimizer.optimizer,
            norm=norm,
            loss=self._tr_loss,
            step=self.state.global_step + 1,
            learning_rate=self._get_learning_rate(),
        )
        return norm

    # Validation

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Validation loss a supervised token, exact whatever the batch size. Notes a new best one to be committed.

        Stops at once when it is time to: the checkpoint of this step then says that its validation is owed.
        """
        self.model.eval()
        loss, tokens = 0.0, 0
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed: owed or not, training goes on the same
            for batch in self.get_eval_dataloader(eval_dataset):
                self.stopped = self.attempt.deadline.reason()
                if self.stopped:
                    self._owe_validation()
                    return {}
                inputs = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    summed, _ = self._summed_loss(self.model, inputs)
                loss += float(summed)
                tokens += int((inputs["kept_labels"] != IGNORED).sum())
        loss, count = self.ranks.total(loss, tokens)
        metrics = {"eval_loss": loss / count}
        step = self.state.global_step
        if not math.isfinite(metrics["eval_loss"]):
            raise NonFiniteLoss(f"the validation loss is {metrics['eval_loss']} at step {step}.")
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        self.progress.validation_owed = False
        best = self.progress.best_loss
        if self.load_best and (best is None or metrics["eval_loss"] < best):
            self.progress.best_step, self.progress.best_loss = step, metrics["eval_loss"]
            self.control.should_save = True
        return metrics

    def _owe_validation(self) -> None:
        self.progress.validation_owed = True
        self.control.should_evaluate = False
        self.control.should_save = self.control.should_training_stop = True

    def restore_best(self) -> None:
        """Puts the adapter of the lowest validation loss into the model, on every rank."""
        best = self.progress.best_step
        if self.load_best and best is not None and best != self.state.global_step:
            load_best_adapter(self.model, self.attempt.run.checkpoints, best, self.recipe_hash, self.ranks)

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.attempt.claim.check()
        step, progress = self.state.global_step, self.progress
        random_states = self.ranks.gather(pack_random_states())
        loss, peak_memory = self.ranks.total(float(self._tr_loss))[0] / self.ranks.size, self._peak_memory()
        if not self.ranks.leads:
            progress.checkpoints += 1
            return
        if self.stopped and self.attempt.deadline.left_s() < self.writer.expected_s():
            log.warning(
                "no checkpoint of step %d: it takes about %.0f s, and %.0f s are left",
                *(step, self.writer.expected_s(), self.attempt.deadline.left_s()),
            )
            return
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, peak_memory)
        progress.unlogged_loss, progress.logged_step = loss, self._globalstep_last_logged
        progress.checkpoints += 1
        optimizer_tensors, optimizer_document = pack_optimizer(self.optimizer.state_dict())
        waited = self.writer.seconds
        self.writer.submit(
            step,
            tensors={ADAPTER_FILE: adapter_tensors(self.model), OPTIMIZER_FILE: optimizer_tensors},
            documents={
                STATE_FILE: {
                    "optimizer": optimizer_document,
                    "scheduler": self.lr_scheduler.state_dict(),
                    "random": random_states[0],
                    **self._of_several_ranks(random_states),
                    "progress": dataclasses.asdict(progress),
                },
                TRAINER_STATE_FILE: dataclasses.asdict(self.state),
            },
            keep=() if progress.best_step is None else (progress.best_step,),
        )
        progress.checkpoint_seconds += self.writer.seconds - waited

    def _of_several_ranks(self, random_states: Sequence[Any]) -> dict[str, Any]:
        if self.ranks.size == 1:
            return {}
        return {"random_of_others": random_states[1:], "gradients": self._mean.order}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter_weights(self.model, self._checkpoint().take_tensors(ADAPTER_FILE))
        self.progress = Progress(**self._checkpoint().document(STATE_FILE)["progress"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = self._checkpoint().document(STATE_FILE)
        self.optimizer.load_state_dict(
            unpack_optimizer(self._checkpoint().take_tensors(OPTIMIZER_FILE), state["optimizer"])
        )
        self.lr_scheduler.load_state_dict(state["scheduler"])
        self._mean.follow(state.get("gradients", ()))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Each rank's own generators; at another number of ranks, others than rank 0 begin with states of their own."""
        if checkpoint is None:
            return
        state = self._checkpoint().document(STATE_FILE)
        states = [state["random"], *state.get("random_of_others", ())]
        if self.ranks.leads or len(states) == self.ranks.size:
            unpack_random_states(states[self.ranks.rank])
        else:
            set_seed(self.args.seed + self.state.global_step * self.ranks.size + self.ranks.rank)

    def _checkpoint(self) -> Checkpoint:
        if self._resumed is None:
            raise ValueError("train_from was given no checkpoint")
        return self._resumed

    # Progress

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save:
            begun = time.monotonic()
            self._guard.check()
            self._between_steps.prolong_step(time.monotonic() - begun)
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._between_steps.start_step_clock()

    def catch_up(self) -> None:
        """Finishes what the last attempt was stopped in. Raises Interrupted where this one is stopped there again."""
        if self._resumed is None:
            return
        self._tr_loss += self.progress.unlogged_loss
        self._globalstep_last_logged = self.progress.logged_step
        if self.progress.validation_owed:
            self.evaluate()
        if self.progress.validation_owed:
            raise Interrupted(f"stopped while validating step {self.state.global_step}: {self.stopped}.", NO_PROGRESS)

    def trained_parameters(self) -> Iterator[torch.nn.Parameter]:
        """The adapters."""
        return iter(self._trained)

    def new_buffers(self) -> list[torch.Tensor]:
        """As much memory as training holds for gradients on their way to other ranks."""
        return self._mean.new_buffers()

    def take_samples(self) -> int:
        """Samples of the step that has ended, over all ranks; counting begins again."""
        count, self._samples_of_step = self._samples_of_step, 0
        return count

    def summary(self) -> dict[str, Any]:
        """`train` of results.json."""
        return self.progress.summary(
            steps=self.state.global_step,
            trainable_parameters=sum(p.numel() for p in self._trained),
            peak_memory_bytes=self._peak_memory(),
        )

    def _peak_memory(self) -> int:
        """Peak bytes that torch held on one GPU, of all ranks' the largest; 0 without one."""
        return int(self.ranks.most(peak_memory_bytes()))
