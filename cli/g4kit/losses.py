"""The loss of a run as a line of text, from its metrics."""

import itertools
import json
import math
from collections.abc import Sequence

from g4kit.cloud.base import Bucket, ObjectNotFoundError
from g4kit.runs import run_folder

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 24
"""Characters of a sparkline."""


def training_losses(bucket: Bucket, run_id: str) -> list[float]:
    """Training loss by step, over all attempts; what one lost and a later one repeated counts once, as the later.

    A segment that is being replaced, or damaged, is left out: the line is there to look at.
    """
    losses: dict[int, float] = {}
    for segment in bucket.objects(f"{run_folder(run_id)}/metrics/"):
        try:
            lines = [json.loads(text) for text in bucket.read(segment.name).splitlines()]
        except (ObjectNotFoundError, ValueError):
            continue
        losses |= {line["step"]: line["loss"] for line in lines if line.get("kind") == "train"}
    return [losses[step] for step in sorted(losses)]


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Means of equal parts of the values, in eight heights on a logarithmic scale; empty where there are none.

    A loss falls over orders of magnitude: on a linear scale all but the beginning would lie flat.
    """
    finite = [math.log(max(value, 1e-9)) for value in values if math.isfinite(value)]
    if not finite:
        return ""
    parts = min(width, len(finite))
    edges = [round(index * len(finite) / parts) for index in range(parts + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, spread = min(means), (max(means) - min(means)) or 1.0
    return "".join(BARS[round((mean - low) / spread * (len(BARS) - 1))] for mean in means)
