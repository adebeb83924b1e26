"""What the memory and time models were fitted to, and their error on each row: `python -m g4trainer.calibration`.

Measured on one H200 (torch 2.13.0, 790 TFLOP/s bf16 on large matrix products) through a bare training loop: the 31B at
its true shapes with random NF4 weights, LoRA r=64 on all linear layers, 504 tokens a sample of which 10 are supervised,
266 soft tokens of 2,520 patches. Memory is torch.cuda.max_memory_allocated.

Two factors of activations come from the rows marked so, and the time of a sample from one row with eager attention, the
kernels' own times taken from its profile. Other sizes, soft tokens and ranks follow from counting alone:
benchmarks/memory_and_time.py measures them, and they are not calibrated until benchmarks/README.md says so.
"""

import sys
from dataclasses import dataclass

from g4trainer import gemma, timing, vram
from g4trainer.recipe import parse_recipe

SHAPE = vram.Shape(tokens=504, patches=2520, supervised=10)


@dataclass(frozen=True)
class Row:
    """One measured setting of the 31B."""

    step: vram.Step
    peak_gib: float
    seconds_a_sample: float | None
    """None where the kernels of a run have changed since."""
    fitted: str
    """What the model took from this row; empty where it is a check."""
    note: str = ""


ROWS = (
    Row(vram.Step(4, "none", "sdpa", accumulates=False), 71.8, 0.208, "memory"),
    Row(vram.Step(4, "none", "eager", accumulates=False), 78.9, 0.1674, "memory, time"),
    Row(vram.Step(6, "none", "eager", accumulates=False), 106.3, None, "memory"),
    Row(vram.Step(2, "full", "sdpa", accumulates=False, compiled=False), 26.3, 0.655, "", "not compiled"),
    Row(vram.Step(8, "full", "sdpa", accumulates=False, compiled=False), 30.5, 0.443, "", "not compiled"),
    Row(vram.Step(2, "full", "sdpa", accumulates=True, compiled=False), 27.4, 0.769, "", "not compiled, 2 x 4"),
)
"""Left out: rows whose patch embedder was quantized (80.2 GiB at 4, 94.3 at 5: the vision tower then partly computes
in fp32), and those with torch._functorch's activation memory budget, which no recipe sets."""


def model_31b() -> vram.Model:
    document = {"name": "calibration", "model": {"id": "gemma-4-31B-it"}, "data": {"dataset": "random"}}
    return vram.Model(parse_recipe(document, source="calibration"), gemma.true_config("31B"))


def memory_error(row: Row) -> float:
    """Predicted peak against measured, less 1."""
    return vram.training(model_31b(), SHAPE, row.step).total / vram.GIB / row.peak_gib - 1


def time_error(row: Row) -> float | None:
    """Predicted seconds a sample against measured, less 1; None for what the time model does not describe.

    It describes what a run does on a GPU: compiled layers, and eager attention at these lengths.
    """
    if not row.step.compiled or row.step.attention != "eager" or row.seconds_a_sample is None:
        return None
    accumulation = 4 if row.step.accumulates else 1
    seconds = timing.step_seconds(
        model_31b(),
        SHAPE,
        timing.CARDS[timing.CALIBRATED_ON],
        micro_batch=row.step.micro_batch,
        checkpointing=row.step.checkpointing,
        accumulation=accumulation,
    )
    return seconds / (row.step.micro_batch * accumulation) / row.seconds_a_sample - 1


def markdown() -> str:
    """The table of all rows."""
    lines = [
        "| batch | checkpointing | attention | GiB measured | memory error | s/sample | time error | used for |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        seconds = time_error(row)
        used = f"fitting {row.fitted}" if row.fitted else "checking"
        lines.append(
            f"| {row.step.micro_batch} | {row.step.checkpointing} | {row.step.attention} | {row.peak_gib} "
            f"| {memory_error(row):+.1%} | {row.seconds_a_sample or 'older kernels'} "
            f"| {'not modelled' if seconds is None else f'{seconds:+.1%}'} "
            f"| {used}{', ' * bool(row.note)}{row.note} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(markdown() + "\n")
