"""What report.html says, worked out from a run directory: plain values, no markup and no plots."""

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from g4trainer.claims import attempts
from g4trainer.dataset import Example, open_image
from g4trainer.evaluate import UNKNOWN, Z_95, Prediction, read_predictions, wilson_interval
from g4trainer.rundir import RunDir, read_json

GALLERY_SIZE = 48
"""Mistakes that are shown with their image."""
THUMBNAIL_PIXELS = 192
PIXEL_ART = 48
"""An image no larger than this is kept as it is, and enlarged without smoothing."""
TEXT_LIMIT = 240
"""Characters of an answer that are shown."""
CONFUSIONS_SHOWN = 10


@dataclass(frozen=True)
class Measured:
    """A fraction from 0 to 1 with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """What training changed, image by image."""

    difference: Measured
    """After minus before, from -1 to 1."""
    fixed: int
    broken: int
    still_right: int
    still_wrong: int


@dataclass(frozen=True)
class ClassRow:
    label: str
    images: int
    recall_before: float | None
    recall: float
    precision: float
    f1: float


@dataclass(frozen=True)
class Mistake:
    id: str
    truth: str
    after: str
    before: str | None
    """None where there is no baseline."""
    was_right: bool
    image: str
    """A data URL."""
    pixel_art: bool
    more_images: int


@dataclass(frozen=True)
class AttemptRow:
    number: int
    started: str
    seconds: float
    steps: str
    outcome: str
    finished: bool


@dataclass(frozen=True)
class Evaluations:
    """Scores and predictions of the final evaluation, and of the baseline where there is one."""

    final: dict[str, Any]
    after: list[Prediction]
    baseline: dict[str, Any] | None
    before: list[Prediction] | None


def read_evaluations(run: RunDir) -> Evaluations:
    """Raises FileNotFoundError where the final evaluation is not there."""
    final = read_json(run.evaluation / "final.json")
    after = read_predictions(run.evaluation / "final.predictions.jsonl")
    path = run.evaluation / "baseline.json"
    if not path.exists():
        return Evaluations(final, after, None, None)
    return Evaluations(final, after, read_json(path), read_predictions(run.evaluation / "baseline.predictions.jsonl"))


def measured(result: Mapping[str, Any]) -> Measured:
    """Accuracy of an evaluation; for chat, which has none, exact match."""
    value = result["exact_match"] if result["accuracy"] is None else result["accuracy"]
    return Measured(value, *wilson_interval(round(value * result["count"]), result["count"]))


def change(evaluations: Evaluations) -> Change | None:
    """None without a baseline.

    The interval is Wald's for the difference of paired proportions (A. Agresti, Categorical Data Analysis, 11.1).
    """
    if evaluations.before is None:
        return None
    pairs = Counter(
        (before.correct, after.correct) for before, after in zip(evaluations.before, evaluations.after, strict=True)
    )
    fixed, broken = pairs[False, True], pairs[True, False]
    count = sum(pairs.values())
    difference = (fixed - broken) / count
    half = Z_95 * math.sqrt(max(0.0, fixed + broken - (fixed - broken) ** 2 / count)) / count
    interval = Measured(difference, max(-1.0, difference - half), min(1.0, difference + half))
    return Change(interval, fixed, broken, pairs[True, True], pairs[False, False])


def class_rows(evaluations: Evaluations) -> list[ClassRow]:
    """One row a class, in the data set's order; empty for chat."""
    earlier = {row["label"]: row["recall"] for row in (evaluations.baseline or {}).get("per_class", ())}
    return [
        ClassRow(row["label"], row["support"], earlier.get(row["label"]), row["recall"], row["precision"], row["f1"])
        for row in evaluations.final.get("per_class", ())
    ]


def confusions(predictions: Sequence[Prediction]) -> list[tuple[str, str, int]]:
    """The most frequent mistakes: truth, what was said instead, how often."""
    pairs = Counter((p.truth, p.prediction or UNKNOWN) for p in predictions if not p.correct)
    return [(truth, said, count) for (truth, said), count in pairs.most_common(CONFUSIONS_SHOWN)]


def mistakes(evaluations: Evaluations, examples: Sequence[Example]) -> list[Mistake]:
    """The gallery: what was right before training first, then alike mistakes together, the frequent ones first."""
    by_id = {example.id: example for example in examples}
    before = {prediction.id: prediction for prediction in evaluations.before or ()}
    wrong = [prediction for prediction in evaluations.after if not prediction.correct]
    often = Counter((prediction.truth, prediction.prediction) for prediction in wrong)

    def order(prediction: Prediction) -> tuple[Any, ...]:
        pair = (prediction.truth, prediction.prediction)
        was_right = prediction.id in before and before[prediction.id].correct
        return not was_right, -often[pair], prediction.truth, prediction.prediction or ""

    return [
        _mistake(prediction, before.get(prediction.id), by_id[prediction.id])
        for prediction in sorted(wrong, key=order)[:GALLERY_SIZE]
    ]


def _mistake(after: Prediction, before: Prediction | None, example: Example) -> Mistake:
    image, pixel_art = thumbnail(example.images[0], example.id)
    return Mistake(
        id=after.id,
        truth=_short(after.truth),
        after=said(after),
        before=said(before) if before else None,
        was_right=before is not None and before.correct,
        image=image,
        pixel_art=pixel_art,
        more_images=len(example.images) - 1,
    )


def said(prediction: Prediction) -> str:
    """The label that was answered, else the answer itself in quotation marks."""
    if prediction.prediction is not None:
        return _short(prediction.prediction) or "(nothing)"
    return f"“{_short(prediction.raw_text)}”" if prediction.raw_text else "(nothing)"


def _short(text: str) -> str:
    return text if len(text) <= TEXT_LIMIT else text[: TEXT_LIMIT - 1] + "…"


def thumbnail(data: bytes, example_id: str) -> tuple[str, bool]:
    """A small copy of an image as a data URL, and whether it has so few pixels that each should be seen."""
    image = open_image(data, example_id)
    pixel_art = max(image.size) <= PIXEL_ART
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    if pixel_art:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="WEBP", quality=68, method=4)
    kind = "png" if pixel_art else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", pixel_art


def attempt_rows(run: RunDir, total_s: float) -> list[AttemptRow]:
    """What each attempt did and how it ended.

    total_s: seconds of all attempts. The last attempt is the one that finishes the run; it has not ended when it
    writes the report, so its share is what the others leave.
    """
    noted = attempts(run)
    rows = []
    for claim in noted:
        last = claim is noted[-1]
        seconds = claim["seconds"].get("total", 0.0)
        if last:
            seconds = max(0.0, total_s - sum(other["seconds"].get("total", 0.0) for other in noted[:-1]))
        outcome = "finished the run" if last else claim.get("outcome") or "ended without a word: killed, or lost"
        rows.append(
            AttemptRow(claim["attempt"], claim["started"], seconds, _steps(run, claim["attempt"]), outcome, last)
        )
    return rows


def _steps(run: RunDir, attempt: int) -> str:
    """First and last optimizer step in an attempt's segment of the metrics; none where it did not train."""
    path = run.metrics / f"{attempt:04d}.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    steps = [line["step"] for line in map(json.loads, lines) if line["kind"] == "train"]
    return f"{min(steps)} to {max(steps)}" if steps else "none"
