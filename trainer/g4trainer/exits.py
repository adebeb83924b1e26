"""How an attempt ends: exit codes, the exceptions behind them, and what a person can do about each."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

MemoryPart = Literal["training", "evaluation"]
"""What a plan can do with less GPU memory."""


class ExitCode(IntEnum):
    """Exit codes of the trainer; the command line's `--wait` passes them on."""

    DONE = 0
    FAILED = 1
    """Unexpected: a retry may help."""
    BAD_INPUT = 2
    """The recipe, the data or the model is wrong: a retry cannot help."""
    OUT_OF_MEMORY = 3
    NON_FINITE = 4
    INTERRUPTED = 75
    """Stopped on purpose with a checkpoint: the next attempt resumes."""
    KILLED = 130
    """Second SIGINT."""


FINAL = frozenset({ExitCode.BAD_INPUT, ExitCode.OUT_OF_MEMORY, ExitCode.NON_FINITE})
"""Codes after which no retry can help; they are kept in failed.json."""


class TrainerError(Exception):
    """An end with a known cause. The message says what happened, `remedy` what to do."""

    code = ExitCode.FAILED
    remedy = "run it again; if it happens again, look at the log."

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy or self.remedy


class ModelError(TrainerError):
    """A base model, tokenizer or adapter that cannot be used as asked."""

    code = ExitCode.BAD_INPUT
    remedy = "stage a Gemma 4 instruction-tuned model, or correct the recipe, and launch again."


class OutOfMemory(TrainerError):
    """The GPU's memory is too small, with nothing left to shrink."""

    code = ExitCode.OUT_OF_MEMORY
    remedy = "choose a larger accelerator, a smaller model, fewer soft tokens or a lower lora.r, and launch again."


class ShortOfMemory(TrainerError):
    """One of several processes ran out of GPU memory: the others cannot go back with it, so all end and begin again."""

    remedy = "nothing: the next attempt takes a plan that needs less memory."

    def __init__(self, part: MemoryPart, message: str) -> None:
        super().__init__(message)
        self.part = part


class RankFailed(TrainerError):
    """Another process of this attempt failed or died; its exit code is the attempt's."""

    def __init__(self, rank: int, code: ExitCode, reason: str, remedy: str, *, part: MemoryPart | None = None) -> None:
        super().__init__(f"{reason} (rank {rank})", remedy)
        self.code = code
        self.part = part
        """Of what it was short of memory, if that was it."""


class NonFiniteLoss(TrainerError):
    """The loss or a gradient became infinite or not a number."""

    code = ExitCode.NON_FINITE
    remedy = "lower training.learning_rate, or look for damaged samples, and launch again."


class Interrupted(TrainerError):
    """Stopped on purpose, with everything committed."""

    code = ExitCode.INTERRUPTED
    remedy = "nothing: the next attempt goes on from the last checkpoint."


class NotOurs(TrainerError):
    """This attempt may not write the run directory."""


class RunTaken(NotOurs):
    """Another attempt is writing this run directory."""

    remedy = "wait for it, or cancel it; then run this again."


class RunEnded(NotOurs):
    """Another attempt finished the run, or failed for good, while this one was starting."""

    remedy = "nothing."

    def __init__(self, run_id: str, code: ExitCode) -> None:
        super().__init__(f"{run_id}: another attempt ended this run meanwhile.")
        self.code = code


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended, as failed.json and status.json tell it."""

    code: ExitCode
    reason: str
    remedy: str
