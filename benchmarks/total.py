"""The published recipe from its first second to results.json, stage by stage, from measured figures.

    python -m benchmarks.total                                          # the figures of benchmarks/README.md
    python -m benchmarks.total --figures measured.json --json

11,040 samples (3,680 x 3) through the 31B, and 3,669 images answered before and after. What was measured on an H200 is
multiplied out for it, and scaled to the other cards by what `g4trainer.timing` says of both: its model of a step and of
an answer, from the cards' published dense bf16 rates and bandwidths. Loading, compiling and checkpoints hang on the
host and the bucket, and are taken as they were measured. `--figures` is a JSON object with some of FIGURES' names.
Neither a GPU nor torch is needed.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from g4trainer import gemma, planner, timing, vram
from g4trainer.recipe import Recipe, parse_recipe

MEASURED_ON = "nvidia-h200-141gb"
CARDS = {MEASURED_ON: 138.0, "nvidia-rtx-pro-6000": 94.5}
"""GiB that a process may hold."""
FIGURES: Mapping[str, float] = {
    "seconds_a_sample": 0.1750,
    "seconds_an_image": 0.0965,
    "micro_batch": 4,
    "evaluation_batch": 128,
    "start_s": 20.0,
    "load_s": 21.0,
    "compile_s": 105.0,
    "checkpoint_s": 2.0,
}
"""By default: the first four and `compile_s` of a whole run in benchmarks/README.md, `start_s` of imports and data
assumed, `load_s` 17 GiB at the 0.8 GiB/s assumed of a bucket (from a disk 17 s were measured), `checkpoint_s` that
training stands still for one, assumed."""
TRAIN_SAMPLES, EPOCHS, TEST_IMAGES = 3680, 3, 3669
TEXT_TOKENS = 238
TIMEOUT_S = 3600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, help="a JSON object of measured figures, in place of the defaults")
    parser.add_argument("--json", action="store_true", help="print the stages as JSON")
    options = parser.parse_args()
    stated = json.loads(options.figures.read_text()) if options.figures else {}
    unknown = sorted(set(stated) - set(FIGURES))
    if unknown:
        parser.error(f"--figures: got {unknown[0]!r}; write some of {', '.join(FIGURES)}.")
    figures = {**FIGURES, **stated}
    totals = {card: stages(card, figures) for card in CARDS}
    if options.json:
        print(json.dumps(totals, indent=2))
        return 0
    names = list(totals[MEASURED_ON])
    print(f"| seconds | {' | '.join(CARDS)} |\n|---|{'---|' * len(CARDS)}")
    for name in names:
        print(f"| {name} | {' | '.join(f'{totals[card][name]:.0f}' for card in CARDS)} |")
    print(f"| **in all** | {' | '.join(f'**{sum(totals[card].values()):.0f}**' for card in CARDS)} |")
    for card, found in totals.items():
        whole, load = sum(found.values()), found["start"] + found["load"]
        attempts = timing.attempts_needed(whole, load, TIMEOUT_S)
        print(f"{card}: {whole / 60:.0f} minutes, {attempts} attempts of {TIMEOUT_S} s, {settings(card, figures)}")
    return 0


def stages(card: str, figures: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage."""
    train = TRAIN_SAMPLES * EPOCHS * figures["seconds_a_sample"] * step_ratio(card, figures)
    answers = TEST_IMAGES * figures["seconds_an_image"] * answer_ratio(card, figures)
    return {
        "start": figures["start_s"],
        "load": figures["load_s"],
        "compilation": figures["compile_s"],
        "baseline": answers,
        "training": train,
        "checkpoints": figures["checkpoint_s"] * max(1, round(train / timing.CHECKPOINT_EVERY_S)),
        "final evaluation": answers,
    }


def settings(card: str, figures: Mapping[str, float]) -> str:
    """How a step is computed there."""
    micro, checkpointing = _cut(card, figures)
    return f"micro-batch {micro}, activation checkpointing {checkpointing}"


def step_ratio(card: str, figures: Mapping[str, float]) -> float:
    """Seconds of a step there, as a multiple of those where it was measured."""
    return _step_s(card, figures) / _step_s(MEASURED_ON, figures)


def answer_ratio(card: str, figures: Mapping[str, float]) -> float:
    """The same of an answered image."""
    model, shape = _subject(MEASURED_ON)
    batch = int(figures["evaluation_batch"])
    there, measured = (
        timing.answer_seconds(model, shape, timing.CARDS[name], batch=batch) for name in (card, MEASURED_ON)
    )
    return there / measured


def _step_s(card: str, figures: Mapping[str, float]) -> float:
    model, shape = _subject(card)
    micro, checkpointing = _cut(card, figures)
    share = model.recipe.training.effective_batch_size
    return timing.step_seconds(
        model,
        shape,
        timing.CARDS[card],
        micro_batch=micro,
        checkpointing=checkpointing,
        accumulation=share // micro,
    )


def _cut(card: str, figures: Mapping[str, float]) -> tuple[int, vram.Checkpointing]:
    """As measured on that card; on another, the fastest setting that is predicted to fit."""
    if card == MEASURED_ON:
        return int(figures["micro_batch"]), "none"
    model, shape = _subject(card)
    fit = planner.best_fit(model, shape, int(CARDS[card] * vram.GIB))
    return fit.micro_batch, fit.activation_checkpointing


def _subject(card: str) -> tuple[vram.Model, vram.Shape]:
    model = vram.Model(_recipe(card), gemma.true_config("31B"))
    return model, model.shape(TEXT_TOKENS)


def _recipe(card: str) -> Recipe:
    document = {"name": "total", "model": {"id": "gemma-4-31B-it"}, "data": {"dataset": "oxford-iiit-pet"}}
    return parse_recipe({**document, "job": {"accelerator": card}}, source="benchmark")


if __name__ == "__main__":
    raise SystemExit(main())
