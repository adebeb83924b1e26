"""Whether an optimizer step is finite, decided on the device and read by the host one step later."""

import math
from dataclasses import dataclass

import torch

from g4trainer.exits import NonFiniteLoss


@dataclass(frozen=True)
class _Watched:
    """A step whose numbers are on their way to the host."""

    step: int
    learning_rate: float
    numbers: torch.Tensor
    """(2,) fp32 on the host: the gradient's norm and the loss."""
    arrived: torch.cuda.Event | None
    """None where they are there already."""


class FiniteGuard:
    """Keeps steps that are not finite from the weights, and raises NonFiniteLoss for them."""

    def __init__(self) -> None:
        self._watched: _Watched | None = None

    def watch(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        norm: torch.Tensor,
        loss: torch.Tensor,
        step: int,
        learning_rate: float,
    ) -> None:
        """Before `optimizer.step()`: it will change nothing where the norm or the loss is not finite.

        optimizer: AdamW with `fused=True`, which reads `found_inf` on the device as it does for torch.amp.GradScaler.
        """
        numbers = torch.stack([norm.detach().float(), loss.detach().float().reshape(())])
        optimizer.found_inf = (~numbers.isfinite().all()).float()
        arrived = None
        if numbers.is_cuda:
            numbers = numbers.to("cpu", non_blocking=True)  # into pinned memory
            arrived = torch.cuda.Event()
            arrived.record()
        self._watched = _Watched(step, learning_rate, numbers, arrived)

    def check(self) -> None:
        """Raises NonFiniteLoss where the step that was watched last is not finite; waits for that step alone."""
        if self._watched is None:
            return
        watched, self._watched = self._watched, None
        if watched.arrived is not None:
            watched.arrived.synchronize()
        for what, value in zip(("gradient's norm", "loss"), watched.numbers.tolist(), strict=True):
            if not math.isfinite(value):
                raise NonFiniteLoss(
                    f"the {what} is {value} at step {watched.step}, the learning rate {watched.learning_rate:.3g}."
                )
