"""An estimate as people read it: a bar of the card's memory by part, the plan, time and price."""

from collections.abc import Sequence

from g4kit.estimating import Estimate
from g4kit.output import duration, hanging, table
from g4trainer.vram import GIB, Memory

BAR_WIDTH = 44
INDENT = 8
"""Columns of the words that the lines begin with."""
SYMBOLS = {
    "weights in NF4": "W",
    "unquantized weights": "U",
    "experts": "X",
    "LoRA": "L",
    "gradients": "G",
    "optimizer": "O",
    "batch": "b",
    "bf16 copies of LoRA": "c",
    "activations, text": "a",
    "activations, vision": "v",
    "generation cache": "k",
    "logits": "l",
    "workspace": "w",
    "fragmentation": "f",
}


def text(found: Estimate, columns: int | None = None) -> str:
    """The whole block, its lines wrapped where a terminal is that narrow."""
    fit, job = found.fit, found.recipe.job
    memory = fit.training if fit.training.total >= fit.evaluation.total else fit.evaluation
    evaluation, training = (_gib(one.total) for one in (fit.evaluation, fit.training))
    cut = (
        f"micro-batch {fit.micro_batch} x {found.accumulation}, activation checkpointing {fit.activation_checkpointing}"
    )
    lines = [
        f"{found.recipe.model.id} on {found.hardware.title}: {'fits' if found.fits else 'does not fit'}",
        f"memory  [{bar(memory, fit.free_bytes)}] {_gib(memory.total)} GiB of {_gib(fit.free_bytes)} that are free",
        *(f"          {SYMBOLS[name]} {name:<22} {_part(size)}" for name, size in memory.parts.items() if size),
        f"          peak: {memory.moment}; training {training} GiB, evaluation {evaluation} GiB",
        f"plan    {cut}, evaluation batch {fit.evaluation_batch_size}, {found.tokens} tokens a sample",
    ]
    if found.time:
        phases = ", ".join(f"{name} {duration(value)}" for name, value in found.time.phases.items() if value >= 1)
        low, high = duration(found.time.low), duration(found.time.high)
        lines.append(f"time    {duration(found.time.total)} ({low} to {high}): {phases}")
        lines.append(f"slices  {found.time.slices} of at most {job.max_attempts} attempts of {duration(job.timeout_s)}")
    lines.append(f"price   {_price(found)}")
    month = found.storage.usd_a_month(found.prices)
    if month is not None:
        model, run = (_gib(size) for size in (found.storage.model, found.storage.run))
        lines.append(
            f"bucket  ${month:.2f} a month for as long as it keeps the model ({model} GiB) and the run ({run} GiB)"
        )
    lines += [f"warning {warning}" for warning in found.warnings]
    lines += [f"to fit  {change.replace(chr(34), '')}" for change in found.nearest]
    return "\n".join(hanging(line, INDENT if number else 0, columns) for number, line in enumerate(lines))


def bar(memory: Memory, free_bytes: int) -> str:
    """Each part's share of the card in its symbol, what is left in dots; `!` past the end where it does not fit."""
    scale = BAR_WIDTH / max(free_bytes, memory.total)
    drawn, end = "", 0.0
    for name, size in memory.parts.items():
        end += size * scale
        drawn += SYMBOLS[name] * (round(end) - len(drawn))
    room = round(free_bytes * scale)
    return (drawn[:room] + "!" * (len(drawn) - room)).ljust(BAR_WIDTH, ".")


def comparison(estimates: Sequence[tuple[str, Estimate]]) -> str:
    """Cards side by side."""
    rows = []
    for name, found in estimates:
        fit, time, cost = found.fit, found.time, found.cost
        plan = f"{fit.micro_batch} x {found.accumulation}, {fit.activation_checkpointing}"
        rows.append(
            (
                name,
                "yes" if found.fits else "no",
                f"{_gib(fit.needed)} of {_gib(fit.free_bytes)}",
                plan if found.fits else "-",
                duration(time.total) if time else "-",
                f"{cost.expected:.2f}" if cost else "-",
            )
        )
    return table(("CARD", "FITS", "GIB", "PLAN", "TIME", "USD"), rows)


def _price(found: Estimate) -> str:
    if found.prices is None:
        return "nothing on this machine" if found.hardware.is_here else found.price_problem
    each = f"${found.prices.hour:.2f} an hour ({found.prices.region}, {found.prices.as_of})"
    if found.cost is None:
        return each
    cost = found.cost
    every = " for each execution" if cost.high > cost.worst else ""
    return f"${cost.expected:.2f} (${cost.low:.2f} to ${cost.high:.2f}), at worst ${cost.worst:.2f}{every}; {each}"


def _part(count: int) -> str:
    return f"{_gib(count):>6} GiB" if count >= GIB else f"{count / 2**20:6.0f} MiB"


def _gib(count: int) -> str:
    return f"{count / GIB:.1f}"
