"""Process time of `g4kit --help` and `g4kit runs`: user plus system seconds, least of several starts.

    python benchmarks/cli_startup.py [--runs 100]

Exits with 1 where a figure is above its limit. The least is taken because other processes only ever add to it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

STARTS = 7


@dataclass(frozen=True)
class Case:
    arguments: tuple[str, ...]
    limit_s: float
    """Process time at most, in seconds."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="runs in the bucket that `g4kit runs` lists")
    options = parser.parse_args()
    cases = [Case(("--help",), 0.2), Case(("runs",), 0.5), Case(("runs", "--json"), 0.5)]
    with tempfile.TemporaryDirectory() as root:
        make_runs(Path(root), options.runs)
        measured = [(case, *least(case, {**os.environ, "G4KIT_ROOT": root})) for case in cases]
    for case, process_s, wall_s in measured:
        command = " ".join(("g4kit", *case.arguments))
        print(f"{command:<18} {process_s:.3f} s of process time, {wall_s:.3f} s of wall time (limit {case.limit_s} s)")
    return int(any(process_s > case.limit_s for case, process_s, _ in measured))


def least(case: Case, environ: dict[str, str]) -> tuple[float, float]:
    """(process seconds, wall seconds) of the fastest start."""
    starts = [one_start(case.arguments, environ) for _ in range(STARTS)]
    return min(process_s for process_s, _ in starts), min(wall_s for _, wall_s in starts)


def one_start(arguments: tuple[str, ...], environ: dict[str, str]) -> tuple[float, float]:
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "g4kit", *arguments], env=environ, check=True, capture_output=True)
    after, ended = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime), ended - begun


def make_runs(root: Path, count: int) -> None:
    """Finished and unfinished runs as they lie in a bucket, each with its execution."""
    for number in range(count):
        run_id, created_at = f"bench-20260101-{number:06}-0a1b", "2026-01-01T12:00:00+00:00"
        recipe = {"name": "bench", "model": {"id": "tiny-gemma4"}, "data": {"dataset": "digits"}}
        documents = {
            f"runs/{run_id}/recipe.json": {"recipe": recipe, "target": "local", "created_at": created_at},
            f"runs/{run_id}/status.json": {"state": "running", "phase": "train", "step": 120, "total_steps": 350},
            f"local/executions/{run_id}-{number:08x}/execution.json": {
                "run_id": run_id,
                "launch_id": f"{number:08x}",
                "created_at": created_at,
            },
        }
        if number % 2:
            documents[f"runs/{run_id}/results.json"] = {"state": "succeeded", "final": {"accuracy": 0.95}}
        for name, document in documents.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(document))


if __name__ == "__main__":
    sys.exit(main())
