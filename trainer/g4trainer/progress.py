"""What a run has done over all its attempts."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Progress:
    """Kept in every checkpoint."""

    seconds: float = 0.0
    """Time in training steps, data loading included; validation and checkpoints are not."""
    samples: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    last_loss: float | None = None
    peak_memory_bytes: int = 0
    checkpoints: int = 0
    checkpoint_seconds: float = 0.0
    """Time that training stood still for checkpoints."""
    unlogged_loss: float = 0.0
    """Sum of the losses since the last line of the log."""
    logged_step: int = 0
    validation_owed: bool = False
    """The attempt was stopped while it measured the validation loss of this step: the next one begins with that."""

    def summary(self, *, steps: int, trainable_parameters: int, peak_memory_bytes: int) -> dict[str, Any]:
        """`train` of results.json. peak_memory_bytes: of this attempt."""
        return {
            "steps": steps,
            "samples": self.samples,
            "samples_per_second": self.samples / self.seconds if self.seconds else None,
            "loss": self.last_loss,
            "best_step": self.best_step,
            "best_validation_loss": self.best_loss,
            "peak_memory_bytes": max(self.peak_memory_bytes, peak_memory_bytes),
            "trainable_parameters": trainable_parameters,
            "checkpoints": self.checkpoints,
            "checkpoint_seconds": round(self.checkpoint_seconds, 3),
        }


def peak_memory_bytes() -> int:
    """Peak that torch held on this process's GPU since the reset; 0 without one."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0
