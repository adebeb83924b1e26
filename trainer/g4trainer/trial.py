"""Settings tried on the card before the first step: the plan then rests on what was measured there.

A pass is that of a step: the longest samples, forward and backward, gradients kept from the pass before, as much
memory taken as the optimizer will and, of several GPUs, as gradients that are sent. Nothing of it remains but compiled
layers: gradients are dropped, and every random generator is set back, so that a run's results are the same with and
without a trial (the tests compare them).
"""

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from g4trainer.dataset import Example
from g4trainer.planner import Plan, Setting
from g4trainer.ranks import Ranks
from g4trainer.state import pack_random_states, unpack_random_states
from g4trainer.trainer import RunTrainer
from g4trainer.trial_choice import Room, Tried, best_of, next_setting
from g4trainer.vram import ADAM

log = logging.getLogger(__name__)


class Gauge(Protocol):
    """How the memory of a device is read."""

    limit_bytes: int
    """What this process may hold."""

    def held_bytes(self) -> int:
        """That it holds now."""

    @contextlib.contextmanager
    def watched(self, plan: Plan) -> Iterator[None]:
        """Around the passes of a plan. May raise torch.OutOfMemoryError."""

    def peak_bytes(self) -> int:
        """The most that was held in the last `watched`, once all of its work is done."""


class CudaGauge:
    """Torch's own count of the current GPU."""

    def __init__(self) -> None:
        free, _ = torch.cuda.mem_get_info()
        self.limit_bytes = free + torch.cuda.memory_reserved()

    def held_bytes(self) -> int:
        return int(torch.cuda.memory_allocated())

    @contextlib.contextmanager
    def watched(self, plan: Plan) -> Iterator[None]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield
        torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        return int(torch.cuda.max_memory_allocated())


def gauge_of(device: torch.device) -> Gauge | None:
    """None on a CPU, where the choice does not go by memory: nothing is tried there."""
    return CudaGauge() if device.type == "cuda" else None


def try_settings(
    plan: Plan,
    settings: Sequence[Setting],
    *,
    gauge: Gauge,
    trainer_of: Callable[[Plan], RunTrainer],
    examples: Sequence[Example],
    epochs: float,
    ranks: Ranks,
    check: Callable[[], None],
) -> Plan:
    """The plan with the setting that did best, and with what was measured in `trial`; the same on every rank.

    settings: g4trainer.planner.settings_of, that of the plan among them.
    examples: to train on. check: called before each setting; raises where it is time to stop.
    The base model must be whole on each rank: those that share one pass in step, and here memory may end one early.
    """
    samples = int(len(examples) * epochs / ranks.size)
    room = Room(int(ranks.least(gauge.limit_bytes)), int(ranks.most(gauge.held_bytes())), samples)
    longest = sorted(examples, key=length, reverse=True)
    randomness = pack_random_states()
    tried: list[Tried] = []
    setting: Setting | None = _planned(plan, settings)
    try:
        while setting is not None:
            check()
            tried.append(_try(plan_with(plan, setting), setting, gauge, trainer_of, longest, ranks))
            log.info("tried %s", tried[-1].to_json())
            setting = next_setting(settings, tried, room)
    finally:
        unpack_random_states(randomness)
    return replace(plan_with(plan, best_of(tried, room)), trial=[one.to_json() for one in tried])


def length(example: Example) -> tuple[int, int]:
    """By which samples are compared: images first, then characters."""
    return len(example.images), len(example.prompt) + len(example.answer)


def plan_with(plan: Plan, setting: Setting) -> Plan:
    """The plan with a setting's micro-batch and checkpointing; the effective batch stays."""
    share = plan.per_device_train_batch_size * plan.gradient_accumulation_steps
    return replace(
        plan,
        per_device_train_batch_size=setting.micro_batch,
        gradient_accumulation_steps=share // setting.micro_batch,
        activation_checkpointing=setting.activation_checkpointing,
    )


def _planned(plan: Plan, settings: Sequence[Setting]) -> Setting:
    chosen = plan.per_device_train_batch_size, plan.activation_checkpointing
    return next(one for one in settings if (one.micro_batch, one.activation_checkpointing) == chosen)


def _try(
    plan: Plan,
    setting: Setting,
    gauge: Gauge,
    trainer_of: Callable[[Plan], RunTrainer],
    longest: Sequence[Example],
    ranks: Ranks,
) -> Tried:
    trainer = trainer_of(plan)
    micro = setting.micro_batch
    samples = list(itertools.islice(itertools.cycle(longest), micro))
    if micro > 1:  # all are padded to the longest answer, too
        samples[-1] = max(longest, key=lambda example: len(example.answer))
    batch = trainer.data_collator(samples)
    first = last = 0.0
    short = False
    try:
        with gauge.watched(plan), trainer.as_in_training(), _room_for_the_rest(trainer):
            first, last = (_timed(trainer, batch) for _ in range(2))
    except torch.OutOfMemoryError:
        short = True
    finally:
        trainer.model.zero_grad(set_to_none=True)
    peak = 0 if short else gauge.peak_bytes()
    del trainer
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    short, peak = ranks.any(short), int(ranks.most(peak))
    return Tried(setting, None if short else peak, ranks.most(last) / micro, ranks.most(first))


@contextlib.contextmanager
def _room_for_the_rest(trainer: RunTrainer) -> Iterator[None]:
    """Takes as much memory as the moments of AdamW, which come with the first step, and as gradients on their way."""
    held = [
        torch.empty(parameter.numel() * ADAM, dtype=torch.uint8, device=parameter.device)
        for parameter in trainer.trained_parameters()
    ]
    held += trainer.new_buffers()
    yield
    del held


def _timed(trainer: RunTrainer, batch: dict[str, Any]) -> float:
    """Seconds of a pass, all of its work on the device done."""
    begun = time.monotonic()
    trainer.pass_over(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - begun
