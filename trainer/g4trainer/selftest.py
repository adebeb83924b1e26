"""Proves that an image or a machine can train: the whole of a small run on the embedded model, in a minute."""

import logging
import tempfile
from pathlib import Path

from g4trainer import tiny
from g4trainer.deadline import Deadline
from g4trainer.exits import ExitCode
from g4trainer.launch import freeze
from g4trainer.metrics import read_metrics
from g4trainer.recipe import Recipe
from g4trainer.rundir import RunDir, create_json, manifest, read_json, write_json
from g4trainer.train import run_attempt

STEPS = 6

log = logging.getLogger(__name__)


def selftest() -> ExitCode:
    """Makes the embedded model and data, trains a few steps, and checks that the loss fell."""
    with tempfile.TemporaryDirectory(prefix="g4trainer-selftest-") as folder:
        root = Path(folder)
        tiny.write_model(root / "models" / "tiny-gemma4")
        tiny.write_digits(root / "datasets" / "digits")
        for staged in (root / "models" / "tiny-gemma4", root / "datasets" / "digits"):
            mark_staged(staged, source="builtin")
        run = RunDir(root / "runs" / "selftest")
        create_json(run.recipe, freeze(_recipe(), "selftest", target="trainer").model_dump(mode="json"))
        code = run_attempt(run, Deadline(None))
        if code is not ExitCode.DONE:
            return code
        losses = [line["loss"] for line in read_metrics(run) if line["kind"] == "train"]
        if read_json(run.results)["train"]["steps"] != STEPS or not losses[-1] < losses[0]:
            log.error("selftest: the loss did not fall: %s", losses)
            return ExitCode.FAILED
    log.info("selftest: passed; the loss fell from %.3f to %.3f in %d steps", losses[0], losses[-1], STEPS)
    return ExitCode.DONE


def mark_staged(folder: Path, *, source: str) -> None:
    """Writes STAGED.json for a folder that is complete."""
    entries = {name: {"size": entry["size"]} for name, entry in manifest(folder).items()}
    write_json(folder / "STAGED.json", {"files": entries, "source": source, "revision": None})


def _recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "name": "selftest",
            "model": {"id": "tiny-gemma4", "max_soft_tokens": 70},
            "data": {
                "dataset": "digits",
                "prompt": "Which digit is it?",
                "train_size": 54,
                "validation_size": 6,
                "test_size": 8,
            },
            "training": {"learning_rate": 2e-3, "num_train_epochs": 2, "effective_batch_size": 16},
        }
    )
