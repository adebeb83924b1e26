"""What an attempt keeps free for its next steps, where the host is ahead of the device."""

from types import SimpleNamespace
from typing import Any

import pytest

from g4trainer.deadline import Deadline
from g4trainer.progress import Progress
from g4trainer.run_callback import STEPS_AHEAD, RunCallback

LIMIT_S, SAFETY_S = 1000.0, 30.0
DEVICE_S = 40.0


def ignored(*_: Any, **__: Any) -> None:
    """Of what a step is told to, nothing matters here."""


def test_a_wait_for_the_device_is_part_of_its_step() -> None:
    """As where every step is logged: the host is done with it at once, and waits for the device before the line."""
    deadline = Deadline(LIMIT_S)
    trainer: Any = SimpleNamespace(
        attempt=SimpleNamespace(
            claim=SimpleNamespace(check=ignored),
            deadline=deadline,
            status=SimpleNamespace(update=ignored),
            ranks=SimpleNamespace(size=1),
        ),
        plan=SimpleNamespace(total_steps=9, save_steps=9),
        writer=SimpleNamespace(expected_s=lambda: 0.0),
        progress=Progress(),
        take_samples=lambda: 8,
        eval_dataset=None,
    )
    callback = RunCallback(trainer)
    control = SimpleNamespace(should_save=False, should_training_stop=False, should_evaluate=False)
    for step in (1, 2):
        callback.start_step_clock()
        callback.on_step_end(None, SimpleNamespace(global_step=step), control)
        callback.prolong_step(DEVICE_S)
    assert trainer.progress.seconds == pytest.approx(2 * DEVICE_S, abs=1)
    assert deadline.remaining_s() == pytest.approx(LIMIT_S - SAFETY_S - STEPS_AHEAD * DEVICE_S, abs=1)
