"""What to try next, and what to keep, when settings are tried on the card before the first step; no torch is needed.

The prediction chooses what is tried first. Where that does not fit, the fastest setting of clearly less memory is next,
and so on. Where it fits and memory is left that the prediction had not expected, one faster setting is tried beside it,
if what the run would save is more than its first pass costs, most of which is compilation; the faster of the two stays.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from g4trainer.planner import Setting
from g4trainer.vram import FRAGMENTATION

LESS = 0.9
"""Of the memory predicted for a setting that did not fit, what the next one may need."""


@dataclass(frozen=True)
class Tried:
    """A setting, and what a micro-batch of the longest samples took on the card, of all ranks the most."""

    setting: Setting
    peak_bytes: int | None
    """With gradients, and room for the optimizer; None where memory ran out."""
    seconds: float
    """A sample, forward and backward."""
    first_seconds: float
    """Of the first pass, which compiles."""

    def fits(self, limit_bytes: int) -> bool:
        return self.peak_bytes is not None and self.peak_bytes * (1 + FRAGMENTATION) <= limit_bytes

    def to_json(self) -> dict[str, Any]:
        return {
            "per_device_train_batch_size": self.setting.micro_batch,
            "activation_checkpointing": self.setting.activation_checkpointing,
            "peak_bytes": self.peak_bytes,
            "predicted_bytes": self.setting.memory.total,
            "seconds_a_sample": None if self.peak_bytes is None else round(self.seconds, 5),
            "first_pass_seconds": round(self.first_seconds, 3),
        }


@dataclass(frozen=True)
class Room:
    """What a decision goes by besides what was tried."""

    limit_bytes: int
    """What this process may hold on its card."""
    held_bytes: int
    """Of that, what is there before a pass: weights and adapters."""
    samples: int
    """That the run trains on each card, epoch by epoch."""


def next_setting(settings: Sequence[Setting], tried: Sequence[Tried], room: Room) -> Setting | None:
    """What to try after what was tried; None where that is enough.

    settings: by predicted seconds, the fastest first. tried: not empty.
    """
    last = tried[-1]
    if last.fits(room.limit_bytes):
        return _faster(settings, last, room) if len(tried) == 1 else None
    if any(one.fits(room.limit_bytes) for one in tried):
        return None
    return next(_with_less(settings, last.setting), None)


def best_of(tried: Sequence[Tried], room: Room) -> Setting:
    """The setting that was fastest among those that fit; where none did, the one that was tried last."""
    fitting = [one for one in tried if one.fits(room.limit_bytes)]
    return min(fitting, key=lambda one: one.seconds).setting if fitting else tried[-1].setting


def _with_less(settings: Sequence[Setting], failed: Setting) -> Iterator[Setting]:
    """What needs clearly less than what did not fit; then what needs least of all."""
    yield from (setting for setting in settings if setting.memory.total <= LESS * failed.memory.total)
    least = min(settings, key=lambda setting: setting.memory.total)
    if least.memory.total < failed.memory.total:
        yield least


def _faster(settings: Sequence[Setting], first: Tried, room: Room) -> Setting | None:
    """A setting that should be faster and should fit, by how far the prediction was off, and pays for being tried."""
    chosen, peak = first.setting, first.peak_bytes or 0
    scale = (peak - room.held_bytes) / max(1, chosen.memory.total - room.held_bytes)
    for setting in settings:
        expected = room.held_bytes + scale * (setting.memory.total - room.held_bytes)
        saved_s = (1 - setting.seconds / chosen.seconds) * first.seconds * room.samples
        if setting.allowed and expected * (1 + FRAGMENTATION) <= room.limit_bytes and saved_s > first.first_seconds:
            return setting
    return None
