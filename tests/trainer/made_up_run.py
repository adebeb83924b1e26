"""A finished run that nobody trained: every file that the report reads, filled with plausible figures."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g4trainer.artifacts import artifacts, results
from g4trainer.dataset import Example, Splits
from g4trainer.evaluate import Prediction, score, to_lines
from g4trainer.launch import freeze
from g4trainer.recipe import Recipe
from g4trainer.rundir import RunDir, write_bytes, write_json

RUN_ID = "made-up-20260102-030405-0a1b"
STEPS = 120
RESUMED_AT = 81
"""The first attempt was killed after step 90; the second went on from the checkpoint of step 80."""
DAY = "2026-01-02T03"
PRICES = {"as_of": "2026-10", "usd_a_second": 0.0005}


@dataclass(frozen=True)
class MadeUp:
    run: RunDir
    results: dict[str, Any]
    test: Sequence[Example]
    after: list[Prediction]


def make(
    root: Path,
    test: Sequence[Example],
    labels: Sequence[str],
    *,
    baseline: bool = True,
    mistakes: float = 0.1,
    dataset: str = "digits",
    prices: dict[str, Any] | None = None,
) -> MadeUp:
    """Writes the run under `root/runs`. mistakes: share of the final answers that are wrong."""
    run = RunDir(root / "runs" / RUN_ID)
    task = "classify" if labels else "chat"
    recipe = Recipe.model_validate(
        {
            "name": "made-up",
            "model": {"id": "tiny-gemma4", "max_soft_tokens": 70},
            "data": {"dataset": dataset, "task": task, "prompt": "Which is it?"},
            "evaluation": {"baseline": baseline},
        }
    )
    frozen = freeze(recipe, RUN_ID, target="local").model_copy(update={"prices": prices})
    write_json(run.recipe, frozen.model_dump(mode="json"))
    for path in (run.plan, run.lora_config, run.training_args):
        write_json(path, {"per_device_train_batch_size": 8, "save_steps": None, "activation_checkpointing": "none"})
    write_bytes(run.adapter / "adapter_model.safetensors", b"weights")
    if baseline:
        _evaluate(run, "baseline", test, labels, 0.8, seed=1)
    after = _evaluate(run, "final", test, labels, mistakes, seed=2)
    _log_metrics(run)
    _note_attempts(run)
    splits = Splits(test[:4], test[:2], test, tuple(labels), shared_images=1)
    own = {"load": 4.0, "train": 60.0, "final": 6.0, "total": 75.0}
    document = results(run, frozen, splits, TRAIN, attempt=2, own=own)
    write_bytes(run.report, b"written later")
    write_json(run.results, document | {"artifacts": artifacts(run)})
    run.report.unlink()
    return MadeUp(run, document, test, after)


TRAIN = {
    "steps": STEPS,
    "samples": STEPS * 8,
    "samples_per_second": 10.25,
    "loss": 0.05,
    "best_step": 100,
    "best_validation_loss": 0.0712,
    "peak_memory_bytes": 3 << 30,
    "trainable_parameters": 484352,
    "checkpoints": 4,
    "checkpoint_seconds": 0.4,
}


def _evaluate(
    run: RunDir, name: str, test: Sequence[Example], labels: Sequence[str], mistakes: float, *, seed: int
) -> list[Prediction]:
    chance = random.Random(seed)
    predictions = [_answer(example, labels, chance.random() < mistakes, chance) for example in test]
    write_bytes(run.evaluation / f"{name}.predictions.jsonl", to_lines(predictions))
    write_json(run.evaluation / f"{name}.json", score(predictions, labels))
    return predictions


def _answer(example: Example, labels: Sequence[str], wrong: bool, chance: random.Random) -> Prediction:
    truth = example.answer
    if not wrong:
        return Prediction(example.id, truth, truth, truth, True)
    if not labels:
        return Prediction(example.id, truth, "something else", "something else", False)
    if chance.random() < 0.2:
        return Prediction(example.id, truth, None, "I cannot tell.", False)
    said = labels[(list(labels).index(truth) + chance.choice((1, 1, 1, 2))) % len(labels)]
    return Prediction(example.id, truth, said, said, False)


def _log_metrics(run: RunDir) -> None:
    first = [_line(step, minute=1) for step in range(1, 91)]
    second = [_line(step, minute=20) for step in range(RESUMED_AT, STEPS + 1)]
    for attempt, lines in ((1, first), (2, second)):
        text = "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["step"]))
        write_bytes(run.metrics / f"{attempt:04d}.jsonl", text.encode())
    validation = [
        {"kind": "eval", "step": step, "eval_loss": 0.07 + abs(100 - step) / 80, "time": f"{DAY}:21:00.000+00:00"}
        for step in range(20, STEPS + 1, 20)
    ]
    text = "".join(json.dumps(line) + "\n" for line in validation)
    write_bytes(run.metrics / "0002.jsonl", (run.metrics / "0002.jsonl").read_bytes() + text.encode())


def _line(step: int, *, minute: int) -> dict[str, Any]:
    wave = 1 + 0.3 * math.sin(step * 2.4)
    second = step * 0.6
    return {
        "kind": "train",
        "step": step,
        "loss": 12 * math.exp(-step / 20) * wave + 0.02,
        "learning_rate": 1e-3 * (step / 12 if step < 12 else (STEPS - step) / (STEPS - 12)),
        "grad_norm": 5 * math.exp(-step / 40) * wave,
        "samples_per_second": 13.0,
        "peak_memory_bytes": (2 << 30) + min(step, 40) * (1 << 24),
        "time": f"{DAY}:{minute + int(second // 60):02d}:{second % 60:06.3f}+00:00",
    }


def _note_attempts(run: RunDir) -> None:
    for attempt, minute in ((1, 1), (2, 20)):
        claim = {"attempt": attempt, "host": "vm", "pid": 1, "started": f"{DAY}:{minute:02d}:00.000+00:00", "beats": 3}
        seconds = {"load": 5.0, "baseline": 3.0, "train": 54.0, "total": 65.0} if attempt == 1 else {"total": 70.0}
        write_json(run.claims / f"{attempt:04d}-aaaa.json", {**claim, "seconds": seconds})
