"""One attempt of a run, from recipe.json to results.json.

Every phase leaves its result in the run directory and is skipped where that is there already, so an attempt simply
does what the ones before it did not finish:

    load        base model at NF4, LoRA attached and verified
    baseline    evaluation/baseline.json, before training
    train       checkpoints/, metrics/, then adapter/
    validation  evaluation/validation.json, where the recipe asks for it
    final       evaluation/final.json, after training
    report      report.html, then results.json, written last

What is around them: g4trainer.ending begins and ends the process, g4trainer.run_plan cuts the work for this machine,
g4trainer.evaluator answers images, and g4trainer.trainer takes the steps.
"""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed

from g4trainer.artifacts import artifacts, read_adapter, results, write_adapter
from g4trainer.attempt import Attempt
from g4trainer.attention import choose_attention
from g4trainer.collator import Collator
from g4trainer.compiled import COMPILE_FROM_PARAMETERS, COMPILED_ON, compile_layers
from g4trainer.dataset import Splits, load_splits
from g4trainer.deadline import Deadline
from g4trainer.ending import follow, lead
from g4trainer.evaluate import generator_of
from g4trainer.evaluator import RunEvaluator
from g4trainer.exits import ExitCode, ShortOfMemory
from g4trainer.lifeline import Lifeline
from g4trainer.model import (
    adapter_tensors,
    attach_lora,
    is_sharded,
    load_adapter_weights,
    load_base,
    load_processor,
)
from g4trainer.planner import Plan, Setting, on_processes
from g4trainer.rank_checkpoint import newest_on_all_ranks
from g4trainer.ranks import ALONE, Ranks
from g4trainer.recipe import load_frozen
from g4trainer.report import write_report
from g4trainer.run_plan import RunPlan
from g4trainer.rundir import RunDir, write_json
from g4trainer.staged import base_model_folder, staged_folder
from g4trainer.trainer import RunTrainer
from g4trainer.trial import gauge_of, length, try_settings

log = logging.getLogger(__name__)
PADDING = {"cuda": 64, "cpu": 1}
"""Training batches are padded to a multiple of this length: a compiled layer has a graph for each."""


def run_attempt(run: RunDir, deadline: Deadline, ranks: Ranks = ALONE) -> ExitCode:
    """Does what is left of a run. Never raises: however it ends, that is written down where it may be, and returned.

    ranks: the processes of this attempt; each calls this, and all return the same code.
    """
    ranks.join()
    lifeline = Lifeline(ranks)
    deadline.agree_by(ranks.agree)
    process = lead if ranks.leads else follow
    return process(run, deadline, lifeline, lambda attempt: Phases(attempt).execute())


class Phases:
    """The phases of one attempt; `execute` goes through them in order."""

    def __init__(self, attempt: Attempt) -> None:
        """Raises RecipeError where the recipe cannot be read, or not be run by so many processes."""
        self.attempt, self.run, self.ranks = attempt, attempt.run, attempt.ranks
        self.frozen = load_frozen(self.run.recipe)
        self.recipe = on_processes(self.frozen.recipe, self.ranks.size)
        self.device = self.ranks.device()
        self.ranks.connect(self.device)
        self.plan = attempt.plan = RunPlan(
            self.run, self.recipe, attempt.publisher, attempt.status, ranks=self.ranks, device=self.device
        )
        self._scratch = tempfile.TemporaryDirectory(prefix="g4trainer-")

    def execute(self) -> None:
        attempt = self.attempt
        if attempt.claim.held.is_set():  # by a lock; on a mounted bucket the model loads while the claim settles
            attempt.own_the_run()
        with attempt.phase("load"):
            self.load()
        with attempt.phase("baseline"):
            self.baseline()
        with attempt.phase("train"):
            self.train()
        if self.recipe.evaluation.validation:
            with attempt.phase("validation"):
                self.validation()
        with attempt.phase("final"):
            self.final()
        attempt.status.update(state="running", phase="report", progress=None)
        self.report()
        attempt.succeed()

    def load(self) -> None:
        """Data, base model and adapter, which only reads; then the plan, once it is known what they need."""
        recipe, deadline = self.recipe, self.attempt.deadline
        self.splits = self._load_data()
        deadline.check()
        folder = base_model_folder(self.run.root, recipe.model)
        self.collator = Collator(
            load_processor(folder),
            max_soft_tokens=recipe.model.max_soft_tokens,
            supervise=recipe.data.supervise,
            pad_to_multiple_of=PADDING[self.device.type],
            pixels_as_bytes=True,
        )
        base = load_base(folder, recipe.model, device=self.device, shards=self.plan.shards())
        sample = self.collator.encode(max(self.splits.train, key=length)).input_ids
        choose_attention(base, recipe.model.attn_implementation, tokens=len(sample), device=self.device)
        deadline.check()
        set_seed(recipe.training.seed)
        self.model = attach_lora(base, recipe.lora, base_model=recipe.model.id)
        if self.ranks.size == 1:  # several processes never begin again within an attempt
            self.initial_adapter = {name: tensor.clone() for name, tensor in adapter_tensors(self.model).items()}
        large = base.num_parameters() >= COMPILE_FROM_PARAMETERS
        if self.device.type in COMPILED_ON and large:
            compile_layers(self.model)
        self.attempt.own_the_run()
        text_tokens = len(sample) - sample.count(self.collator.image_id)
        self.plan.choose(self.splits, text_tokens=text_tokens, trial=None if is_sharded(base) else self._trial)
        generator = generator_of(self.model, self.collator, self.splits.labels, recipe.evaluation)
        self.evaluator = RunEvaluator(self.attempt, self.plan, generator)

    def baseline(self) -> None:
        """What the base model answers, if the recipe asks for it."""
        if self.recipe.evaluation.baseline:
            with self.model.disable_adapter():
                self.evaluator.evaluate("baseline", self.splits.test)

    def train(self) -> None:
        """Trains from the newest committed checkpoint, or from the start; then writes the adapter."""
        finished = read_adapter(self.run) if self.ranks.leads else None
        if self.ranks.share(finished is not None):
            log.info("the adapter is there already: training is skipped")
            if finished is not None:
                tensors, self.training_summary = finished
                load_adapter_weights(self.model, tensors)
            self.ranks.share_tensors(p.data for p in self.model.parameters() if p.requires_grad)
            return
        trainer = self._train_within_memory()
        trainer.restore_best()
        self.training_summary = trainer.summary()
        if self.ranks.leads:
            self.attempt.claim.check()
            write_adapter(self.run, self.model, self.training_summary)

    def validation(self) -> None:
        """What the trained model answers on the validation samples, by which a sweep compares its runs."""
        self.evaluator.evaluate("validation", self.splits.validation)

    def final(self) -> None:
        """What the trained model answers."""
        self.evaluator.evaluate("final", self.splits.test)

    def report(self) -> None:
        """report.html, unless an earlier attempt wrote it; then results.json, written last."""
        attempt, run = self.attempt, self.run
        if not self.ranks.leads:
            return
        attempt.claim.check()
        self.plan.settle()
        attempt.publisher.settle(*run.metrics.glob("*.jsonl"))
        document = results(
            run,
            self.frozen,
            self.splits,
            self.training_summary,
            attempt=attempt.claim.attempt,
            own=attempt.seconds(),
        )
        if not run.report.exists():
            write_report(run, document, self.splits.test)
        attempt.claim.check()
        write_json(run.results, document | {"artifacts": artifacts(run)})

    def _load_data(self) -> Splits:
        data = self.recipe.data
        folder = staged_folder(self.run.root / "datasets" / data.dataset)
        splits = load_splits(folder, data, seed=self.recipe.training.seed)
        sizes = (len(part) for part in (splits.train, splits.validation, splits.test))
        log.info("data: %d to train, %d to validate, %d to test", *sizes)
        if splits.shared_images:
            log.warning("%d test images are also in the training data: the accuracy flatters", splits.shared_images)
        return splits

    def _trial(self, plan: Plan, settings: Sequence[Setting]) -> Plan:
        """The plan as a trial on the card leaves it; unchanged where there is none."""
        gauge = gauge_of(self.device)
        if gauge is None:
            return plan
        return try_settings(
            plan,
            settings,
            gauge=gauge,
            trainer_of=self._trainer,
            examples=self.splits.train,
            epochs=self.recipe.training.num_train_epochs,
            ranks=self.ranks,
            check=self.attempt.deadline.check,
        )

    def _trainer(self, plan: Plan) -> RunTrainer:
        return RunTrainer(
            model=self.model,
            args=TrainingArguments(**self.plan.training_arguments(plan, output_dir=self._scratch.name)),
            collator=self.collator,
            train=self.splits.train,
            validation=self.splits.validation,
            plan=plan,
            recipe_hash=self.frozen.recipe_hash,
            load_best=self.recipe.training.load_best_model,
            attempt=self.attempt,
        )

    def _train_within_memory(self) -> RunTrainer:
        """Trains; out of GPU memory it goes on from the newest checkpoint with half the micro-batch."""
        scratch = Path(self._scratch.name)
        while True:
            trainer = self._trainer(self.plan.current)
            self.attempt.checkpoints = trainer.writer
            checkpoint = newest_on_all_ranks(self.run.checkpoints, self.frozen.recipe_hash, self.ranks, scratch=scratch)
            if checkpoint:
                log.info("resuming from step %d", checkpoint.step)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                trainer.train_from(checkpoint)
            except torch.OutOfMemoryError as error:
                if self.ranks.size > 1:
                    raise ShortOfMemory("training", f"out of GPU memory: {error}") from error
                self.plan.shrink("training", error)
            else:
                return trainer
            del trainer
            load_adapter_weights(self.model, self.initial_adapter)
            self.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
