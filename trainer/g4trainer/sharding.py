"""Evaluation of a finished run over many tasks, each on its share of the test samples.

    evaluation/shards/<k>-of-<n>.predictions.jsonl  answers of one share
    evaluation/shards/<k>-of-<n>.json               that it is whole, and what it was made with; written last
    evaluation/sharded.predictions.jsonl            all answers, in the test split's order
    evaluation/sharded.json                         their metrics, scored as the run's own evaluation is; written last

A share is every n-th batch, not every n-th sample: each batch is the one that a whole evaluation would have answered,
padding included, so the answers are the same. Whoever finds all shares whole puts them together; the bytes are the same
whoever it is.
"""

import hashlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from g4trainer.artifacts import ADAPTER_WEIGHTS, HEADLINE, TRAINING_SUMMARY, finished_predictions
from g4trainer.claims import metadata_age_s
from g4trainer.dataset import DataError, Splits, load_splits
from g4trainer.deadline import Deadline
from g4trainer.evaluate import Prediction, half_batch, predict, read_predictions, score, to_lines
from g4trainer.exits import ExitCode, TrainerError
from g4trainer.metrics import status_interval_s
from g4trainer.outcome import KNOWN, end_request
from g4trainer.predict import Predictor
from g4trainer.recipe import Size
from g4trainer.rundir import RunDir, file_entry, read_json, write_bytes, write_json
from g4trainer.staged import staged_folder

FOLDER = "shards"
NAME = "sharded"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """One of `count` shares, from 0."""

    index: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.index}-of-{self.count}"

    def rows(self, total: int, batch_size: int) -> list[int]:
        """The samples that it answers: every `count`-th batch."""
        return [row for row in range(total) if row // batch_size % self.count == self.index]


def evaluate_shard(run: RunDir, shard: Shard, test_size: Size | None, deadline: Deadline) -> ExitCode:
    """Answers a share and, where it was the last one, puts all together.

    test_size: of the test split; None for as many as the run's own evaluation took.
    Never raises for what has a known cause; where no retry can help, evaluation/shards/failed.json tells it.
    """
    failed = run.evaluation / FOLDER / "failed.json"
    if failed.exists():
        return ExitCode(read_json(failed)["exit_code"])
    try:
        _Evaluation(run, shard, test_size, deadline).execute()
    except KNOWN as error:
        return end_request(failed, error)
    return ExitCode.DONE


class _Evaluation:
    def __init__(self, run: RunDir, shard: Shard, test_size: Size | None, deadline: Deadline) -> None:
        self._run, self._shard, self._deadline = run, shard, deadline
        self._predictor = Predictor(run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        recipe = self._predictor.frozen.recipe
        size = recipe.data.test_size if test_size is None else test_size
        folder = staged_folder(run.root / "datasets" / recipe.data.dataset)
        data = recipe.data.model_copy(update={"test_size": size})
        self._splits: Splits = load_splits(folder, data, seed=recipe.training.seed)
        self._origin = {
            "recipe_hash": self._predictor.frozen.recipe_hash,
            "adapter_sha256": read_json(run.adapter / TRAINING_SUMMARY)["files"][ADAPTER_WEIGHTS]["sha256"],
            "data_sha256": hashlib.sha256((folder / "STAGED.json").read_bytes()).hexdigest(),
            "test_size": size,
            "samples": len(self._splits.test),
            "batch_size": self._predictor.batch_size,
        }

    def execute(self) -> None:
        if self._committed(self._shard) is None:
            predictions = self._answer()
            data = to_lines(predictions)
            write_bytes(self._path(self._shard, ".predictions.jsonl"), data)
            marker = {"count": len(predictions), "sha256": hashlib.sha256(data).hexdigest(), "origin": self._origin}
            write_json(self._path(self._shard, ".json"), marker)
            self._partial.unlink(missing_ok=True)
            log.info("share %s: %d answers", self._shard.name, len(predictions))
        # After this wait everything that was committed before this share is to be seen: the last one sees all.
        time.sleep(metadata_age_s(self._run.root) or 0.0)
        self._merge()

    def _answer(self) -> list[Prediction]:
        """Of this share; goes on where an earlier attempt was stopped. Raises Interrupted, OutOfMemory."""
        size, partial = self._predictor.batch_size, self._partial
        examples = [self._splits.test[row] for row in self._shard.rows(len(self._splits.test), size)]
        answered = finished_predictions(partial)
        if not examples:
            return []
        self._predictor.load(examples[0])
        interval_s, published_s, started = status_interval_s(), time.monotonic(), time.monotonic()

        def on_batch(predictions: list[Prediction]) -> None:
            nonlocal answered, published_s, started
            answered = predictions
            log.info("share %s: %d of %d answers", self._shard.name, len(predictions), len(examples))
            self._deadline.reserve("batch", time.monotonic() - started)
            stopping = len(predictions) < len(examples) and self._deadline.reason() is not None
            if stopping or time.monotonic() - published_s >= interval_s:
                write_bytes(partial, to_lines(predictions))
                published_s = time.monotonic()
            if stopping:
                self._deadline.check()
            started = time.monotonic()

        while True:
            try:
                return predict(
                    self._predictor.generator, examples, batch_size=size, finished=answered, on_batch=on_batch
                )
            except torch.OutOfMemoryError as error:
                size = half_batch(size, error)
            log.warning("out of GPU memory: going on with %d images at a time", size)
            torch.cuda.empty_cache()

    def _merge(self) -> None:
        """Scores all answers, if every share is whole. Raises TrainerError where one is damaged."""
        shards = [Shard(index, self._shard.count) for index in range(self._shard.count)]
        parts = {shard: part for shard in shards if (part := self._committed(shard)) is not None}
        if len(parts) < len(shards):
            log.info("%d of %d shares are whole; the last one puts them together", len(parts), len(shards))
            return
        test = self._splits.test
        placed: dict[int, Prediction] = {}
        for shard, part in parts.items():
            placed |= dict(zip(shard.rows(len(test), self._predictor.batch_size), part, strict=True))
        ordered = [placed[row] for row in range(len(test))]
        if [prediction.id for prediction in ordered] != [example.id for example in test]:
            raise DataError("the shares' answers are of other samples than the test split holds now: the data changed.")
        result = score(ordered, self._splits.labels) | {"shards": self._shard.count, "origin": self._origin}
        answers, metrics = (self._run.evaluation / f"{NAME}{end}" for end in (".predictions.jsonl", ".json"))
        write_bytes(answers, to_lines(ordered))
        write_json(metrics, result)
        self._note(result, answers, metrics)
        log.info("all %d answers: accuracy %s", len(ordered), result["accuracy"])

    def _note(self, result: dict[str, Any], *files: Path) -> None:
        """Adds it to results.json, so that `fetch` brings it."""
        results = read_json(self._run.results)
        results["artifacts"] |= {path.relative_to(self._run.path).as_posix(): file_entry(path) for path in files}
        results[NAME] = {key: result[key] for key in (*HEADLINE, "shards") if key in result}
        write_json(self._run.results, results)

    def _committed(self, shard: Shard) -> list[Prediction] | None:
        """A share's answers; None where it is not whole, or was made of another evaluation.

        Raises TrainerError where its file is not the one that was written; its marker is gone then.
        """
        marker, answers = self._path(shard, ".json"), self._path(shard, ".predictions.jsonl")
        try:
            document = read_json(marker)
            if document["origin"] != self._origin:
                return None
            if file_entry(answers)["sha256"] == document["sha256"]:
                return read_predictions(answers)
        except FileNotFoundError:
            if not marker.exists():
                return None
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s: %s", marker, error)
        marker.unlink(missing_ok=True)
        raise TrainerError(f"{answers}: not as it was written.", "evaluate again: this share is answered anew.")

    @property
    def _partial(self) -> Path:
        """Answers so far. Another choice of samples, or another adapter, has another file."""
        digest = hashlib.sha256(json.dumps(self._origin, sort_keys=True).encode()).hexdigest()[:8]
        return self._path(self._shard, f".{digest}.partial.jsonl")

    def _path(self, shard: Shard, ending: str) -> Path:
        return self._run.evaluation / FOLDER / f"{shard.name}{ending}"
