"""What a test may ask of an attempt before it starts; each is called in the forked process."""

import contextlib
import datetime
import importlib
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch


def part(name: str) -> Any:
    """A module of the trainer, or `module.Class`, to be changed."""
    module, _, inner = name.partition(".")
    found = importlib.import_module(f"g4trainer.{module}")
    return getattr(found, inner) if inner else found


def memory_for(samples: int, answers: int) -> None:
    """Training runs out of memory above so many samples at once, evaluation above so many answers."""
    trainer, generator = part("trainer.RunTrainer"), part("evaluate.Generator")
    step, answer = trainer.training_step, generator._answer

    def limited_step(self: Any, model: Any, inputs: Any, *arguments: Any) -> Any:
        checkpointed = self.plan.activation_checkpointing == "full"
        if len(inputs["input_ids"]) > samples + checkpointed:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return step(self, model, inputs, *arguments)

    def limited_answer(self: Any, inputs: Any) -> Any:
        if len(inputs["input_ids"]) > answers:
            raise torch.OutOfMemoryError("simulated")
        return answer(self, inputs)

    trainer.training_step, generator._answer = limited_step, limited_answer


def card_for(samples: int) -> None:
    """Settings are tried as on a GPU, on which passes of more samples run out of memory."""
    gib = 2**30

    class Card:
        limit_bytes = 8 * gib

        def held_bytes(self) -> int:
            return 0

        @contextlib.contextmanager
        def watched(self, plan: Any) -> Iterator[None]:
            yield
            if plan.per_device_train_batch_size > samples:
                raise torch.OutOfMemoryError("simulated")

        def peak_bytes(self) -> int:
            return gib

    part("train").gauge_of = lambda device: Card()


def compiled() -> None:
    """Layers are compiled as on a GPU: graphs are captured and differentiated, their operators run one by one."""
    train = part("train")
    train.COMPILED_ON, train.COMPILE_FROM_PARAMETERS = ("cpu",), 0
    train.PADDING["cpu"] = train.PADDING["cuda"]
    part("compiled").BACKEND = "aot_eager"


def all_must_train() -> None:
    """A step fails where a module is left in evaluation mode: its activations would not be checkpointed."""
    trainer = part("trainer.RunTrainer")
    compute_loss = trainer.compute_loss

    def checked(self: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        left = [name for name, module in model.named_modules() if not module.training]
        if left:
            raise AssertionError(f"{len(left)} modules do not train, {left[0]} among them")
        return compute_loss(self, model, *arguments, **options)

    trainer.compute_loss = checked


def infinite_loss_at(step: int) -> None:
    trainer = part("trainer.RunTrainer")
    summed = trainer._summed_loss

    def infinite(self: Any, model: Any, inputs: Any) -> Any:
        loss, outputs = summed(self, model, inputs)
        return (loss * float("nan") if model.training and self.state.global_step + 1 == step else loss), outputs

    trainer._summed_loss = infinite


def bug_at(step: int) -> None:
    """An exception that nobody expects."""
    callback = part("run_callback.RunCallback")
    ended = callback.on_step_end

    def broken(self: Any, args: Any, state: Any, *event: Any, **context: Any) -> None:
        if state.global_step == step:
            raise ZeroDivisionError("a bug")
        ended(self, args, state, *event, **context)

    callback.on_step_end = broken


def signal_at(step: int, *names: str) -> None:
    """The process gets signals at the beginning of a step."""
    trainer = part("trainer.RunTrainer")
    training_step = trainer.training_step

    def signalled(self: Any, *arguments: Any) -> Any:
        if self.state.global_step + 1 == step and not self._samples_of_step:  # at its first micro-batch
            for name in names:
                os.kill(os.getpid(), signal.Signals[name])
                time.sleep(0.05)
        return training_step(self, *arguments)

    trainer.training_step = signalled


def signal_in(where: str, name: str) -> None:
    """The process gets a signal when it begins to `load`, `answer` or `validate`."""
    name_of, function = {
        "load": ("train", "load_processor"),
        "answer": ("evaluate.Generator", "_answer"),
        "validate": ("trainer.RunTrainer", "evaluate"),
    }[where]
    owner = part(name_of)
    original = getattr(owner, function)

    def signalled(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.Signals[name])
        time.sleep(0.05)
        return original(*arguments, **options)

    setattr(owner, function, signalled)


def hang_in_load() -> None:
    """Loading takes for ever, in one call that does not come back to Python's main thread."""

    def hang(*_: Any) -> None:
        print("hanging", flush=True)
        while True:
            torch.ones(2_000, 2_000) @ torch.ones(2_000, 2_000)

    part("train").load_processor = hang


def slow_steps(seconds: float) -> None:
    trainer = part("trainer.RunTrainer")
    step = trainer.training_step

    def slow(self: Any, *arguments: Any) -> Any:
        time.sleep(seconds)
        return step(self, *arguments)

    trainer.training_step = slow


def clock_jumps() -> None:
    """The wall clock jumps by up to four months, back and forth, whenever somebody looks."""
    jumps = random.Random(1)
    real_time = time.time

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.now(tz) + datetime.timedelta(seconds=jumps.uniform(-1e7, 1e7))

    time.time = lambda: real_time() + jumps.uniform(-1e7, 1e7)
    part("metrics").datetime = SimpleNamespace(datetime=Jumping, UTC=datetime.UTC)


def log_every(steps: int) -> None:
    """A line of metrics stands for several steps, as in runs of more than 400."""
    planning = part("run_plan")
    choose = planning.choose_plan
    planning.choose_plan = lambda *arguments, **options: replace(choose(*arguments, **options), logging_steps=steps)


def data_workers(count: int) -> None:
    """Images are decoded in processes of their own, as beside a GPU; the attempt leads its own process group."""
    os.setpgid(0, 0)
    part("planner").DATALOADER_WORKERS["cpu"] = count


def checkpoints_take(seconds: float) -> None:
    """What a checkpoint is expected to take."""
    part("checkpoint_writer.CheckpointWriter").expected_s = lambda _: seconds


def best_is(step: int) -> None:
    """Validation losses grow with the distance from a step."""
    trainer = part("trainer.RunTrainer")
    summed = trainer._summed_loss

    def weighted(self: Any, model: Any, inputs: Any) -> Any:
        loss, outputs = summed(self, model, inputs)
        return (loss if model.training else loss * 10 ** abs(self.state.global_step - step)), outputs

    trainer._summed_loss = weighted


def plain_report() -> None:
    """A page without plots: drawing them takes longer than these runs."""
    write = part("rundir").write_bytes
    part("train").write_report = lambda run, *_: write(run.report, b"<html></html>")
