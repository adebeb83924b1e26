"""Checkpoints as rank 0 finds them, the same on every rank."""

import logging
from pathlib import Path
from typing import Any

from g4trainer.checkpoint import (
    ADAPTER_FILE,
    TRAINER_STATE_FILE,
    Checkpoint,
    checkpoint_folders,
    newest_checkpoint,
    read_checkpoint,
    remove_checkpoint,
    step_of,
)
from g4trainer.exits import TrainerError
from g4trainer.model import load_adapter_weights
from g4trainer.ranks import Ranks
from g4trainer.rundir import write_bytes

log = logging.getLogger(__name__)


def newest_on_all_ranks(root: Path, recipe_hash: str, ranks: Ranks, *, scratch: Path) -> Checkpoint | None:
    """The checkpoint to go on from, None where there is none.

    Other ranks get the bytes of rank 0's, for a mount may show each host another state.
    root: the run's checkpoints. scratch: a folder of this process, for what the Trainer reads from a file.
    """
    newest = newest_checkpoint(root, recipe_hash) if ranks.leads else None
    if ranks.size == 1:
        return newest
    step = ranks.share(newest.step if newest else None)
    if step is None:
        return None
    files = ranks.share_files(newest.files if newest else None)
    if newest is not None:
        return newest
    folder = scratch / f"step-{step:08d}"
    write_bytes(folder / TRAINER_STATE_FILE, files[TRAINER_STATE_FILE])
    return Checkpoint(folder, step, files)


def load_best_adapter(model: Any, root: Path, step: int, recipe_hash: str, ranks: Ranks) -> None:
    """Puts the adapter of the checkpoint with the lowest validation loss into the model.

    Where that checkpoint is damaged, those that lead past it are of no use: they are removed, and TrainerError
    says that the next attempt trains again from before.
    """
    if ranks.leads:
        _read_best(model, root / f"step-{step:08d}", recipe_hash)
    ranks.share_tensors(p.data for p in model.parameters() if p.requires_grad)
    log.info("the adapter is that of step %d, with the lowest validation loss", step)


def _read_best(model: Any, folder: Path, recipe_hash: str) -> None:
    checkpoint = read_checkpoint(folder, recipe_hash, only=frozenset({ADAPTER_FILE}))
    if not isinstance(checkpoint, Checkpoint):
        for later in reversed(checkpoint_folders(folder.parent)):
            if step_of(later) >= step_of(folder):
                remove_checkpoint(later)
        raise TrainerError(
            f"{folder}: the best checkpoint is damaged ({'; '.join(checkpoint)}).",
            "nothing: the next attempt trains again from an earlier one.",
        )
    load_adapter_weights(model, checkpoint.take_tensors(ADAPTER_FILE))
