"""The evaluations of a run: every image of a part answered, over several attempts if need be, then scored."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from g4trainer.artifacts import finished_predictions
from g4trainer.attempt import Attempt
from g4trainer.dataset import Example
from g4trainer.evaluate import Generator, Prediction, predict, score, to_lines
from g4trainer.exits import ShortOfMemory
from g4trainer.run_plan import RunPlan
from g4trainer.rundir import write_bytes, write_json

EvaluationName = Literal["baseline", "validation", "final"]

log = logging.getLogger(__name__)


class RunEvaluator:
    """Evaluates the model as it is now, batches as the plan says."""

    def __init__(self, attempt: Attempt, plan: RunPlan, generator: Generator) -> None:
        self._attempt, self._plan, self._generator = attempt, plan, generator

    def evaluate(self, name: EvaluationName, part: Sequence[Example]) -> None:
        """Leaves evaluation/<name>.json, unless it is there; finished batches are kept for the next attempt."""
        attempt, folder = self._attempt, self._attempt.run.evaluation
        partial, whole, scores = (folder / f"{name}{end}" for end in (".partial.jsonl", ".predictions.jsonl", ".json"))
        if attempt.ranks.share(scores.exists()):
            if attempt.ranks.leads:
                attempt.publisher.remove(partial)
            return
        answered = attempt.ranks.share(finished_predictions(partial) if attempt.ranks.leads else [])
        predictions = self._answer(part, answered, partial)
        if not attempt.ranks.leads:
            return
        result = score(predictions, self._generator.labels)
        attempt.claim.check()
        write_bytes(whole, to_lines(predictions))
        write_json(scores, result)
        attempt.publisher.remove(partial)
        log.info("%s: accuracy %s on %d images", name, result["accuracy"], result["count"])

    def _answer(self, part: Sequence[Example], answered: list[Prediction], partial: Path) -> list[Prediction]:
        """Predictions for all images of a part; out of GPU memory it goes on with half the batch.

        answered: those of an earlier attempt. partial: where answers are published as they come.
        """
        attempt, total, started = self._attempt, len(part), time.monotonic()

        def on_batch(predictions: list[Prediction]) -> None:
            nonlocal answered, started
            answered = predictions
            attempt.publisher.publish(partial, lambda: to_lines(predictions))
            attempt.status.update(progress={"done": len(predictions), "total": total})
            attempt.deadline.reserve("batch", time.monotonic() - started)
            started = time.monotonic()
            if len(predictions) < total:
                attempt.deadline.check()
            attempt.claim.check()

        self._generator.model.eval()
        while True:
            try:
                return predict(
                    self._generator,
                    part,
                    batch_size=self._plan.current.evaluation_batch_size,
                    finished=answered,
                    on_batch=on_batch,
                    ranks=attempt.ranks,
                )
            except torch.OutOfMemoryError as error:
                if attempt.ranks.size > 1:
                    raise ShortOfMemory("evaluation", f"out of GPU memory answering: {error}") from error
                self._plan.shrink("evaluation", error)
            torch.cuda.empty_cache()
