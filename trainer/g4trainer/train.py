"""One attempt of a run, from recipe.json to results.json.

Every phase leaves its result in the run directory and is skipped where that is there already, so an attempt simply
does what the ones before it did not finish:

    load       base model at NF4, LoRA attached and verified
    baseline   evaluation/baseline.json, before training
    train      checkpoints/, metrics/, then adapter/
    final      evaluation/final.json, after training
    report     results.json, written last
"""

import logging
import platform
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from transformers import TrainingArguments, set_seed

from g4trainer import __version__
from g4trainer.checkpoint import ADAPTER_FILE, CheckpointError, newest_checkpoint, read_tensors
from g4trainer.claims import Claim
from g4trainer.claims import attempts as read_attempts
from g4trainer.collator import Collator
from g4trainer.dataset import DataError, Splits, load_splits
from g4trainer.deadline import Deadline
from g4trainer.evaluate import Generator, longest_answer, predict, read_predictions, score, to_lines
from g4trainer.exits import FINAL, ExitCode, Failure, Interrupted, ModelError, OutOfMemory, TrainerError
from g4trainer.metrics import MetricsLog, Publisher, Status, now, status_interval_s
from g4trainer.model import (
    ADAPTER,
    adapter_tensors,
    attach_lora,
    compile_layers,
    load_adapter_weights,
    load_base,
    load_processor,
)
from g4trainer.planner import Plan, choose_plan, training_arguments
from g4trainer.recipe import FrozenRecipe, RecipeError, load_frozen, lora_config
from g4trainer.rundir import RunDir, file_entry, manifest, read_json, write_bytes, write_json
from g4trainer.trainer import RunTrainer

log = logging.getLogger(__name__)
EvaluationName = Literal["baseline", "final"]
PHASES = ("load", "baseline", "train", "final")
TRAINING_SUMMARY = "training_summary.json"
ADAPTER_CONFIG = "adapter_config.json"
HEADLINE = ("count", "accuracy", "accuracy_interval_95", "macro_f1", "unknown_rate", "exact_match")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


def run_attempt(run: RunDir, deadline: Deadline) -> ExitCode:
    """Does what is left of a run. Never raises for an end with a known cause: it is written down and returned."""
    if run.results.exists():
        log.info("%s: finished already; results are in %s", run.run_id, run.results)
        return ExitCode.DONE
    if run.failed.exists():
        failed = read_json(run.failed)
        log.error("%s: failed for good: %s To mend it: %s", run.run_id, failed["reason"], failed["remedy"])
        return ExitCode(failed["exit_code"])
    interval_s = status_interval_s()
    try:
        with Claim(run, interval_s=interval_s) as claim, Publisher(interval_s) as publisher:
            status = Status(run.status, publisher, attempt=claim.attempt)
            try:
                status.start()
                Attempt(run, deadline, claim, publisher, status).execute()
            except (TrainerError, RecipeError, DataError, CheckpointError, torch.OutOfMemoryError) as error:
                failure = failure_of(error)
                claim.note(outcome=failure.reason)
                return _end(run, status, failure, claim.attempt)
            finally:
                status.stop()
    except TrainerError as error:  # the run is another's: nothing may be written
        log.error("%s To mend it: %s", error, error.remedy)
        return error.code
    except OSError as error:
        log.error("%s: cannot be written: %s. Make room, or allow writing there, and run it again.", run.path, error)
        return ExitCode.FAILED
    return ExitCode.DONE


def failure_of(error: Exception) -> Failure:
    """The exit code, reason and remedy of an exception with a known cause."""
    match error:
        case TrainerError():
            return Failure(error.code, str(error), error.remedy)
        case RecipeError():
            return Failure(ExitCode.BAD_INPUT, str(error), "correct the recipe and launch it as a new run.")
        case DataError():
            return Failure(ExitCode.BAD_INPUT, str(error), "correct the data, stage it again and launch again.")
        case CheckpointError():
            return Failure(ExitCode.BAD_INPUT, str(error), "launch the changed recipe as a new run.")
        case _:
            return Failure(ExitCode.OUT_OF_MEMORY, str(error), OutOfMemory.remedy)


def _end(run: RunDir, status: Status, failure: Failure, attempt: int) -> ExitCode:
    state = "interrupted" if failure.code is ExitCode.INTERRUPTED else "failed"
    status.update(state=state, message=failure.reason)
    log.log(logging.INFO if state == "interrupted" else logging.ERROR, "%s: %s", run.run_id, failure.reason)
    if failure.code in FINAL:
        log.error("To mend it: %s", failure.remedy)
        write_json(
            run.failed,
            {
                "exit_code": int(failure.code),
                "reason": failure.reason,
                "remedy": failure.remedy,
                "attempt": attempt,
                "time": now(),
            },
        )
    return failure.code


class Attempt:
    """The phases of one attempt, in order. Each method is one phase."""

    def __init__(self, run: RunDir, deadline: Deadline, claim: Claim, publisher: Publisher, status: Status) -> None:
        self.run, self.deadline, self.claim, self.publisher, self.status = run, deadline, claim, publisher, status
        self.frozen: FrozenRecipe = load_frozen(run.recipe)
        self.recipe = self.frozen.recipe
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.seconds: dict[str, float] = {}

    def execute(self) -> None:
        self._phase("load", self.load)
        self._phase("baseline", self.evaluate_baseline)
        self._phase("train", self.train)
        self._phase("final", self.evaluate_final)
        self.status.update(state="running", phase="report", progress=None)
        self.finish()
        self.claim.note(outcome="succeeded")
        self.status.update(state="succeeded", phase="done", eta_s=0)

    def _phase(self, name: str, work: Any) -> None:
        self.deadline.check()
        self.status.update(state="loading" if name == "load" else "running", phase=name, progress=None)
        log.info("phase %s", name)
        started = time.monotonic()
        try:
            work()
        finally:
            self.seconds[name] = round(time.monotonic() - started, 3)
            self.claim.note(seconds={**self.seconds, "total": round(self.deadline.elapsed_s(), 3)})

    def load(self) -> None:
        """Data, base model and adapter; the plan, once it is known what they need."""
        recipe, root = self.recipe, self.run.root
        self.splits: Splits = load_splits(
            _staged(root / "datasets" / recipe.data.dataset), recipe.data, seed=recipe.training.seed
        )
        log.info(
            "data: %d to train, %d to validate, %d to test",
            *(len(part) for part in (self.splits.train, self.splits.validation, self.splits.test)),
        )
        if self.splits.shared_images:
            log.warning(
                "%d test images are also in the training data: the accuracy flatters", self.splits.shared_images
            )
        folder = _staged(root / "models" / recipe.model.id)
        processor = load_processor(folder)
        self.collator = Collator(
            processor, max_soft_tokens=recipe.model.max_soft_tokens, supervise=recipe.data.supervise
        )
        base = load_base(folder, recipe.model, device=self.device)
        set_seed(recipe.training.seed)
        self.model = attach_lora(base, recipe.lora, base_model=recipe.model.id)
        self.initial_adapter = {name: tensor.clone() for name, tensor in adapter_tensors(self.model).items()}
        self.plan = self._plan()
        if self.device.type == "cuda":
            compile_layers(self.model)
        stated = recipe.evaluation.max_new_tokens
        self.generator = Generator(
            self.model,
            self.collator,
            self.splits.labels,
            max_new_tokens=longest_answer(self.collator, self.splits.labels) if stated == "auto" else stated,
            constrained=recipe.evaluation.constrained,
        )

    def _plan(self) -> Plan:
        """plan.json as an earlier attempt wrote it, else what fits this machine."""
        if self.run.plan.exists():
            return Plan.from_json(read_json(self.run.plan))
        plan = choose_plan(
            self.recipe,
            train_samples=len(self.splits.train),
            validation_samples=len(self.splits.validation),
            **self._what_fits(),
        )
        self._write_plan(plan)
        return plan

    def _what_fits(self) -> dict[str, Any]:
        if self.device.type == "cpu":
            return {"micro_batch": 32, "activation_checkpointing": "none", "evaluation_batch_size": 64}
        return {"micro_batch": 8, "activation_checkpointing": "full", "evaluation_batch_size": 32}

    def _write_plan(self, plan: Plan) -> None:
        device: Literal["cuda", "cpu"] = "cuda" if self.device.type == "cuda" else "cpu"
        arguments = training_arguments(self.recipe, plan, device=device, output_dir="output")
        write_json(self.run.training_args, arguments)
        write_json(self.run.lora_config, lora_config(self.recipe.lora, base_model=self.recipe.model.id))
        write_json(self.run.plan, plan.to_json())

    def evaluate_baseline(self) -> None:
        if self.recipe.evaluation.baseline:
            with self.model.disable_adapter():
                self._evaluate("baseline")

    def evaluate_final(self) -> None:
        self._evaluate("final")

    def _evaluate(self, name: EvaluationName) -> None:
        """Answers every test image, keeping finished batches for the next attempt; then scores them."""
        result_path = self.run.evaluation / f"{name}.json"
        if result_path.exists():
            return
        partial, whole = (self.run.evaluation / f"{name}.{kind}.jsonl" for kind in ("partial", "predictions"))
        examples = self.splits.test

        def on_batch(predictions: Sequence[Any]) -> None:
            self.publisher.publish(partial, lambda: to_lines(predictions))
            self.status.update(progress={"done": len(predictions), "total": len(examples)})
            self.deadline.check()
            self.claim.check()

        self.model.eval()
        predictions = predict(
            self.generator,
            examples,
            batch_size=self.plan.evaluation_batch_size,
            finished=read_predictions(partial),
            on_batch=on_batch,
        )
        write_bytes(whole, to_lines(predictions))
        result = score(predictions, self.splits.labels)
        write_json(result_path, result)
        self.publisher.remove(partial)
        log.info("%s: accuracy %s on %d test images", name, result["accuracy"], result["count"])

    def train(self) -> None:
        """Trains from the newest committed checkpoint, or from the start; then writes the adapter."""
        if (self.run.adapter / ADAPTER_CONFIG).exists():
            log.info("the adapter is there already: training is skipped")
            load_adapter_weights(self.model, read_tensors(self.run.adapter / ADAPTER_FILE))
            return
        trainer = self._train_within_memory()
        step, total = trainer.state.global_step, self.plan.total_steps
        if step < total:
            raise Interrupted(
                f"stopped at step {step} of {total}: {trainer.stopped}; the next attempt goes on from here."
            )
        trainer.restore_best()
        self._write_adapter(trainer)

    def _train_within_memory(self) -> RunTrainer:
        """Trains; out of GPU memory it goes on from the newest checkpoint with half the micro-batch."""
        while True:
            trainer = self._trainer()
            checkpoint = newest_checkpoint(self.run.checkpoints, self.frozen.recipe_hash)
            if checkpoint:
                log.info("resuming from step %d", checkpoint.step)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
            except torch.OutOfMemoryError as error:
                self._shrink(error)
            else:
                return trainer
            del trainer
            load_adapter_weights(self.model, self.initial_adapter)
            self.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()

    def _shrink(self, error: torch.OutOfMemoryError) -> None:
        """Halves the micro-batch in the plan, the effective batch unchanged. Raises OutOfMemory where it is 1."""
        smaller = self.plan.halved()
        if smaller is None:
            raise OutOfMemory(f"out of GPU memory at a micro-batch of {self.plan.per_device_train_batch_size}: {error}")
        log.warning(
            "out of GPU memory: micro-batch %d becomes %d, the effective batch stays %d",
            self.plan.per_device_train_batch_size,
            smaller.per_device_train_batch_size,
            self.recipe.training.effective_batch_size,
        )
        self.plan = smaller
        self._write_plan(smaller)

    def _trainer(self) -> RunTrainer:
        arguments = {**read_json(self.run.training_args), "output_dir": tempfile.mkdtemp(prefix="g4trainer-")}
        return RunTrainer(
            model=self.model,
            args=TrainingArguments(**arguments),
            collator=self.collator,
            train=self.splits.train,
            validation=self.splits.validation,
            plan=self.plan,
            run=self.run,
            recipe_hash=self.frozen.recipe_hash,
            load_best=self.recipe.training.load_best_model,
            claim=self.claim,
            deadline=self.deadline,
            status=self.status,
            metrics=MetricsLog(self.run, self.publisher, attempt=self.claim.attempt),
        )

    def _write_adapter(self, trainer: RunTrainer) -> None:
        """adapter/ as PEFT loads it, its config last: without that, the adapter is not there."""
        content = safetensors.torch.save(adapter_tensors(self.model), metadata={"format": "pt"})
        write_bytes(self.run.adapter / ADAPTER_FILE, content)
        write_json(self.run.adapter / TRAINING_SUMMARY, trainer.summary())
        with tempfile.TemporaryDirectory(prefix="g4trainer-") as local:
            self.model.peft_config[ADAPTER].save_pretrained(local)
            write_bytes(self.run.adapter / ADAPTER_CONFIG, (Path(local) / ADAPTER_CONFIG).read_bytes())

    def finish(self) -> None:
        """results.json: the metrics, the times, and the SHA-256 of everything that was made. Written last."""
        own = {**self.seconds, "total": self.deadline.elapsed_s()}
        earlier = [attempt["seconds"] for attempt in read_attempts(self.run) if attempt["attempt"] < self.claim.attempt]
        seconds = {
            name: round(sum(attempt.get(name, 0.0) for attempt in (*earlier, own)), 3) for name in (*PHASES, "total")
        }
        evaluations = {
            name: read_json(path) if (path := self.run.evaluation / f"{name}.json").exists() else None
            for name in ("baseline", "final")
        }
        artifacts: dict[str, Any] = {}
        for folder in (self.run.adapter, self.run.evaluation):
            entries = manifest(folder)
            artifacts |= {f"{folder.name}/{name}": entry for name, entry in entries.items()}
        for path in (self.run.recipe, self.run.plan, self.run.lora_config, self.run.training_args):
            artifacts[path.name] = file_entry(path)
        write_json(
            self.run.results,
            {
                "state": "succeeded",
                "run_id": self.run.run_id,
                "recipe_hash": self.frozen.recipe_hash,
                **{
                    name: result and {key: result[key] for key in HEADLINE if key in result}
                    for name, result in evaluations.items()
                },
                "train": read_json(self.run.adapter / TRAINING_SUMMARY),
                "data": {
                    "train": len(self.splits.train),
                    "validation": len(self.splits.validation),
                    "test": len(self.splits.test),
                    "shared_images": self.splits.shared_images,
                },
                "seconds": seconds,
                "attempts": self.claim.attempt,
                "versions": _versions(),
                "artifacts": artifacts,
            },
        )


def _staged(folder: Path) -> Path:
    """The folder, if everything its STAGED.json lists is there. Raises ModelError with what to do."""
    kind = "model" if folder.parent.name == "models" else "data"
    remedy = f"stage it with `g4kit stage {kind}`, and launch again."
    try:
        files = read_json(folder / "STAGED.json")["files"]
    except FileNotFoundError:
        raise ModelError(f"{folder}: not staged, for it has no STAGED.json.", remedy) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: STAGED.json is damaged: {error}.", remedy) from error
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            raise ModelError(f"{folder}: {name} is missing or not of {entry['size']} bytes.", remedy)
    return folder


def _versions() -> dict[str, str]:
    return {"g4trainer": __version__, "python": platform.python_version()} | {name: version(name) for name in PACKAGES}
