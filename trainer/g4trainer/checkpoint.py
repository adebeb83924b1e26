"""Committed checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint exists if and only if its COMMITTED.json is there and every file it lists has the size and SHA-256 it
gives. COMMITTED.json is written last. Nothing here is ever unpickled: tensors are safetensors, the rest is JSON.
"""

import base64
import hashlib
import logging
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from g4trainer.rundir import FILE_MODE, manifest_problems, read_json, to_json, write_json

COMMITTED = "COMMITTED.json"
ADAPTER_FILE = "adapter_model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
TRAINER_STATE_FILE = "trainer_state.json"  # the name under which transformers' Trainer looks for it
FOLDER = re.compile(r"step-(\d{8,})")
KEPT = 2
"""Committed checkpoints that rotation leaves, besides the best one."""

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that must not be used."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose every file was verified."""

    folder: Path
    step: int


def write_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: dict[str, dict[str, torch.Tensor]],
    documents: dict[str, Any],
    recipe_hash: str,
    claim: str,
) -> Checkpoint:
    """Writes `root/step-%08d` and commits it.

    tensors: by file name, then by tensor name; on the CPU, contiguous.
    documents: JSON documents by file name.
    claim: name of the attempt's claim, so that a second writer is found out.
    Each byte is written once, as one sequential stream a file. Raises OSError; then nothing is committed.
    """
    folder = root / f"step-{step:08d}"
    if folder.exists():  # of an attempt that was interrupted here, or of one that is resumed from before
        remove_checkpoint(folder)
    folder.mkdir(parents=True)
    files = {}
    for name, content in tensors.items():
        files[name] = _write_hashed(folder / name, safetensors.torch.save(content, metadata={"format": "pt"}))
    for name, document in documents.items():
        files[name] = _write_hashed(folder / name, to_json(document))
    write_json(folder / COMMITTED, {"step": step, "recipe_hash": recipe_hash, "claim": claim, "files": files})
    return Checkpoint(folder, step)


def newest_checkpoint(root: Path, recipe_hash: str) -> Checkpoint | None:
    """The newest committed checkpoint whose every file agrees; damaged ones are reported and passed over.

    Raises CheckpointError where a committed one belongs to another recipe: it must never be resumed.
    """
    for folder in reversed(_folders(root)):
        problems = checkpoint_problems(folder, recipe_hash)
        if not problems:
            return Checkpoint(folder, step_of(folder))
        log.warning("checkpoint %s is passed over: %s", folder.name, "; ".join(problems))
    return None


def checkpoint_problems(folder: Path, recipe_hash: str) -> list[str]:
    """Why a folder is no valid checkpoint; empty when it is. Reads every byte.

    Raises CheckpointError where everything agrees but the recipe hash.
    """
    try:
        committed = read_json(folder / COMMITTED)
        files, step, written_hash = committed["files"], committed["step"], committed["recipe_hash"]
    except FileNotFoundError:
        return ["not committed"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{COMMITTED} is damaged ({error})"]
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        return [f"{COMMITTED} is damaged (its files are no table)"]
    problems = [] if step == step_of(folder) else [f"{COMMITTED} is of step {step}"]
    missing = {ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE, TRAINER_STATE_FILE} - files.keys()
    problems += [f"{name}: not in the manifest" for name in sorted(missing)]
    problems += manifest_problems(folder, files, leave_out=frozenset({COMMITTED}))
    if not problems and written_hash != recipe_hash:
        raise CheckpointError(
            f"{folder}: was made with another recipe (hash {written_hash[:12]}, this run's is {recipe_hash[:12]}); "
            f"it is not resumed. Launch the changed recipe as a new run."
        )
    return problems


def rotate(root: Path, *, keep: Iterable[int]) -> None:
    """Removes committed checkpoints but the newest two and those of the steps in `keep`, and older remains.

    A folder loses its COMMITTED.json first, so that one half removed is never taken for whole.
    """
    folders = _folders(root)
    committed = [folder for folder in folders if (folder / COMMITTED).exists()]
    if not committed:
        return
    kept = {*committed[-KEPT:]} | {folder for folder in committed if step_of(folder) in set(keep)}
    for folder in folders:
        if folder not in kept and folder.name < committed[-1].name:
            remove_checkpoint(folder)


def remove_checkpoint(folder: Path) -> None:
    """Deletes a checkpoint, its COMMITTED.json first."""
    (folder / COMMITTED).unlink(missing_ok=True)
    shutil.rmtree(folder)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file that was verified before."""
    return dict(safetensors.torch.load_file(path))


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = FOLDER.fullmatch(folder.name)
    if match is None:
        raise ValueError(folder)
    return int(match[1])


def pack_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Any]:
    """An optimizer's state_dict as tensors named `<parameter index>.<name>` and a JSON document of the rest."""
    tensors, scalars = {}, []
    for index, entry in state["state"].items():
        for name, value in entry.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().to("cpu").contiguous()
            else:
                scalars.append([index, name, value])
    return tensors, {"param_groups": state["param_groups"], "scalars": scalars}


def unpack_optimizer(tensors: dict[str, torch.Tensor], document: Any) -> dict[str, Any]:
    """The state_dict that `pack_optimizer` took apart."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    for index, name, value in document["scalars"]:
        state.setdefault(index, {})[name] = value
    return {"state": state, "param_groups": document["param_groups"]}


def pack_random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's CPU and every CUDA device's generator, as JSON."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _encode(torch.random.get_rng_state()),
        "cuda": [_encode(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def unpack_random_states(document: dict[str, Any]) -> None:
    """Sets every generator to what `pack_random_states` found. CUDA's are set where the number of devices agrees."""
    version, internal, gauss = document["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = document["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(_decode(document["torch"]))
    if torch.cuda.is_available() and len(document["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_decode(state) for state in document["cuda"]])


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first, committed or not."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if FOLDER.fullmatch(path.name)), key=step_of)


def _write_hashed(path: Path, content: bytes) -> dict[str, Any]:
    """Writes a file as one stream while hashing it; returns its manifest entry."""
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for block in _blocks(content):
            file.write(block)
            digest.update(block)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(FILE_MODE)
    return {"size": len(content), "sha256": digest.hexdigest()}


def _blocks(content: bytes, size: int = 16 * 2**20) -> Iterator[memoryview]:
    view = memoryview(content)
    return (view[start : start + size] for start in range(0, len(view), size))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
