"""What the memory and time models were fitted to, and their error on each row: `python -m g4trainer.calibration`.

Measured on one H200 (torch 2.11.0, 790 TFLOP/s bf16 on large matrix products) through a bare training loop
(benchmarks/memory_and_time.py): true shapes with random NF4 weights, LoRA on all linear layers, layers compiled, 10
supervised tokens a sample. Memory is torch.cuda.max_memory_allocated.

Activations are counted, not fitted: the rows marked with memory only showed what is in flight within a layer's backward
pass. The time model's constants come from the forward and backward passes of the rows marked so, each measured for
itself. All else is a check.
"""

import sys
from dataclasses import dataclass, replace

from g4trainer import gemma, timing, vram
from g4trainer.recipe import parse_recipe

TEXT_TOKENS = 238
MEMORY_WITHIN, TIME_WITHIN = 0.05, 0.15
"""What the errors shall stay within."""


@dataclass(frozen=True)
class Row:
    """One measured setting."""

    size: gemma.Size
    r: int
    soft_tokens: int
    step: vram.Step
    peak_gib: float | None
    """None where what a layer keeps has changed since."""
    seconds_a_sample: float | None
    """None where the kernels of a run have changed since, or are not those that a run takes."""
    fitted: str = ""
    """What the model took from this row; empty where it is a check."""
    tokens: int | None = None
    """Of a sample; None where the image fills its budget."""
    missed: bool = False
    """Whether the time model is off by more than TIME_WITHIN."""


def _step(micro_batch: int, checkpointing: vram.Checkpointing, attention: vram.Attention = "eager") -> vram.Step:
    return vram.Step(micro_batch, checkpointing, attention, accumulates=False)


ROWS = (
    Row("31B", 64, 280, _step(4, "none", "sdpa"), 71.8, None, tokens=504),
    Row("31B", 64, 280, _step(4, "none"), 78.9, 0.1674, tokens=504),
    Row("31B", 64, 280, _step(6, "none"), 106.3, None, tokens=504),
    Row("31B", 64, 280, _step(1, "full"), 25.4, 0.712, "time"),
    Row("31B", 64, 280, _step(8, "full"), 29.3, 0.255, "time"),
    Row("31B", 64, 280, _step(8, "half"), 81.8, 0.216),
    Row("31B", 64, 280, _step(4, "none"), 80.2, 0.184, "time"),
    Row("31B", 64, 1120, _step(1, "none", "sdpa"), 60.9, 1.002, "time"),
    Row("31B", 16, 280, _step(4, "none"), 74.7, 0.186),
    Row("31B", 16, 70, _step(8, "none"), 72.0, 0.095, "time"),
    Row("26B-A4B", 64, 280, _step(4, "none"), 42.3, 0.083, tokens=504),
    Row("26B-A4B", 64, 280, _step(8, "full"), 18.8, 0.0996, "memory, time"),
    Row("26B-A4B", 64, 280, _step(8, "none"), 69.1, 0.0706, "time"),
    Row("E4B", 64, 280, _step(8, "none"), 47.6, 0.045, tokens=504),
    Row("E4B", 64, 280, _step(8, "none"), 47.8, 0.0446),
    Row("E4B", 64, 280, _step(16, "full"), 16.0, 0.048, "memory, time"),
    Row("E4B", 64, 1120, _step(2, "half", "sdpa"), 25.4, 0.297, missed=True),
    Row("E2B", 64, 280, _step(4, "half"), 16.0, 0.1024),
    Row("E2B", 64, 280, _step(8, "none"), 38.5, 0.0363),
)
"""The last three were measured after all was fitted. One was missed: it takes 0.20 s forward, which the model says the
host needs, and 0.39 s backward, which it says the card needs. The model lets the host get ahead meanwhile; it does, by
1,024 kernels at most.

Left out: rows whose patch embedder was quantized (80.2 GiB at 4, 94.3 at 5: the vision tower then partly computes
in fp32), those with torch._functorch's activation memory budget, which no recipe sets, and those of layers that are not
compiled."""


def model_of(row: Row) -> vram.Model:
    document = {
        "name": "calibration",
        "model": {"id": f"gemma-4-{row.size}-it", "max_soft_tokens": row.soft_tokens},
        "lora": {"r": row.r, "lora_alpha": row.r},
        "data": {"dataset": "random"},
    }
    return vram.Model(parse_recipe(document, source="calibration"), gemma.true_config(row.size))


def shape_of(row: Row) -> vram.Shape:
    full = model_of(row).shape(TEXT_TOKENS)
    return replace(full, tokens=row.tokens or full.tokens)


def memory_error(row: Row) -> float | None:
    """Predicted peak against measured, less 1."""
    if row.peak_gib is None:
        return None
    return vram.training(model_of(row), shape_of(row), row.step).total / vram.GIB / row.peak_gib - 1


def time_error(row: Row) -> float | None:
    """Predicted seconds a sample against measured, less 1."""
    if row.seconds_a_sample is None:
        return None
    seconds = timing.step_seconds(
        model_of(row),
        shape_of(row),
        timing.CARDS[timing.CALIBRATED_ON],
        micro_batch=row.step.micro_batch,
        checkpointing=row.step.checkpointing,
        accumulation=1,
    )
    return seconds / row.step.micro_batch / row.seconds_a_sample - 1


def markdown() -> str:
    """The table of all rows."""
    titles = "size, r, soft tokens, batch, checkpointing, attention, GiB, memory error, s/sample, time error, used for"
    columns = titles.split(", ")
    lines = [f"| {' | '.join(columns)} |", f"{'|---' * len(columns)}|"]
    for row in ROWS:
        memory, seconds = memory_error(row), time_error(row)
        lines.append(
            f"| {row.size} | {row.r} | {row.soft_tokens} | {row.step.micro_batch} | {row.step.checkpointing} "
            f"| {row.step.attention} | {row.peak_gib or '-'} | {'-' if memory is None else f'{memory:+.1%}'} "
            f"| {row.seconds_a_sample or '-'} | {'-' if seconds is None else f'{seconds:+.1%}'} "
            f"| {f'fitting {row.fitted}' if row.fitted else 'checking'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(markdown() + "\n")
