"""Committed checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint exists if and only if its COMMITTED.json is there, is what was written, and every file it lists has the
size and SHA-256 it gives. COMMITTED.json is written last. Each byte is written once, as one sequential stream a file,
and read once: what was verified in memory is what is used. Nothing is ever unpickled: safetensors and JSON only.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from g4trainer.exits import ExitCode, TrainerError
from g4trainer.planner import CHECKPOINTS_KEPT
from g4trainer.rundir import to_json, write_bytes

COMMITTED = "COMMITTED.json"
ADAPTER_FILE = "adapter.safetensors"  # another name than in adapter/, which the bucket's lifecycle rules must keep
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
TRAINER_STATE_FILE = "trainer_state.json"  # the name under which transformers' Trainer looks for it
FILES = frozenset({ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE, TRAINER_STATE_FILE})
FOLDER = re.compile(r"step-(\d{8,})")
BLOCK_BYTES = 16 * 2**20
DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""How safetensors names what adapters, optimizers and base models hold."""

log = logging.getLogger(__name__)


class CheckpointError(TrainerError):
    """A checkpoint that must not be used, and that no retry replaces."""

    code = ExitCode.BAD_INPUT
    remedy = "launch the changed recipe as a new run."


@dataclass
class Checkpoint:
    """A committed checkpoint, in memory, every byte verified."""

    folder: Path
    step: int
    files: dict[str, bytes] = field(repr=False)

    def document(self, name: str) -> Any:
        """A JSON file of it."""
        return json.loads(self.files[name])

    def take_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors of a safetensors file of it, whose bytes are given up with that."""
        try:
            return dict(safetensors.torch.load(self.files.pop(name)))
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{self.folder / name}: is no safetensors file: {error}") from error


def write_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: dict[str, dict[str, torch.Tensor]],
    documents: dict[str, Any],
    recipe_hash: str,
    claim: str,
    before_commit: Callable[[], None] = lambda: None,
) -> Path:
    """Writes `root/step-%08d` and commits it.

    tensors: by file name, then by tensor name; on the CPU, contiguous, and of nobody who changes them meanwhile.
    documents: JSON documents by file name.
    claim: name of the attempt's claim, so that a second writer is found out.
    before_commit: may raise, then nothing is committed.
    Raises OSError; then nothing is committed, and what was written is removed where the disk lets it.
    """
    folder = root / f"step-{step:08d}"
    if folder.exists():  # of an attempt that was killed here
        remove_checkpoint(folder)
    try:
        folder.mkdir(parents=True)
        files = {name: write_hashed(folder / name, tensor_blocks(content)) for name, content in tensors.items()}
        for name, document in documents.items():
            files[name] = write_hashed(folder / name, iter([memoryview(to_json(document))]))
        before_commit()
        committed = {"step": step, "recipe_hash": recipe_hash, "claim": claim, "files": files}
        write_bytes(folder / COMMITTED, _seal(committed))
    except OSError:
        with contextlib.suppress(OSError):  # a disk that is full or lost: the first error says it
            remove_checkpoint(folder)
        raise
    return folder


def newest_checkpoint(root: Path, recipe_hash: str) -> Checkpoint | None:
    """The newest committed checkpoint whose every byte agrees; damaged ones are reported and passed over.

    Raises CheckpointError where a committed one belongs to another recipe: it must never be resumed.
    """
    for folder in reversed(checkpoint_folders(root)):
        checkpoint = read_checkpoint(folder, recipe_hash)
        if isinstance(checkpoint, Checkpoint):
            return checkpoint
        log.warning("checkpoint %s is passed over: %s", folder.name, "; ".join(checkpoint))
    return None


def read_checkpoint(folder: Path, recipe_hash: str, *, only: frozenset[str] = FILES) -> Checkpoint | list[str]:
    """A checkpoint, or the reasons why it is none.

    only: the files that are read and verified; all must be there.
    Raises CheckpointError where everything agrees but the recipe hash.
    """
    try:
        committed = _unseal((folder / COMMITTED).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return ["not committed"]
    except (IsADirectoryError, ValueError) as error:
        return [f"{COMMITTED}: damaged ({error})"]
    problems = [] if committed["step"] == step_of(folder) else [f"{COMMITTED}: is of step {committed['step']}"]
    entries = committed["files"]
    there = {path.name for path in folder.iterdir()} - {COMMITTED}
    problems += [f"{name}: not in the manifest" for name in sorted((there | FILES) - entries.keys())]
    problems += [f"{name}: missing" for name in sorted(entries.keys() - there)]
    if problems:
        return problems
    files = {}
    for name in sorted(only):
        entry = entries[name]
        if not (folder / name).is_file():
            return [f"{name}: is no file"]
        files[name] = content = (folder / name).read_bytes()
        if len(content) != entry["size"]:
            return [f"{name}: {len(content)} bytes of {entry['size']}"]
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            return [f"{name}: its SHA-256 is not the manifest's"]
    if committed["recipe_hash"] != recipe_hash:
        raise CheckpointError(
            f"{folder}: was made with another recipe (hash {committed['recipe_hash'][:12]}, this run's is "
            f"{recipe_hash[:12]}); it is not resumed."
        )
    return Checkpoint(folder, committed["step"], files)


def rotate(root: Path, *, keep: Iterable[int]) -> None:
    """Removes committed checkpoints but the newest two and those of the steps in `keep`, and older remains.

    A folder loses its COMMITTED.json first, so that one half removed is never taken for whole.
    """
    folders = checkpoint_folders(root)
    committed = [folder for folder in folders if (folder / COMMITTED).exists()]
    if not committed:
        return
    kept = {*committed[-CHECKPOINTS_KEPT:]} | {folder for folder in committed if step_of(folder) in set(keep)}
    for folder in folders:
        if folder not in kept and step_of(folder) < step_of(committed[-1]):
            remove_checkpoint(folder)


def remove_checkpoint(folder: Path) -> None:
    """Deletes a checkpoint, its COMMITTED.json first."""
    (folder / COMMITTED).unlink(missing_ok=True)
    shutil.rmtree(folder)


def checkpoint_folders(root: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first, committed or not."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if FOLDER.fullmatch(path.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = FOLDER.fullmatch(folder.name)
    if match is None:
        raise ValueError(folder)
    return int(match[1])


def tensor_blocks(tensors: dict[str, torch.Tensor]) -> Iterator[memoryview]:
    """A safetensors file (https://github.com/huggingface/safetensors#format) in blocks, without a copy of the data."""
    yield memoryview(header_of((name, tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in tensors.items()))
    for tensor in tensors.values():
        data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        yield from (data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES))


def header_of(tensors: Iterable[tuple[str, torch.dtype, Sequence[int], int]]) -> bytes:
    """What a safetensors file begins with. tensors: names, dtypes, shapes and bytes, in the order of the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape, size in tensors:
        start, end = end, end + size
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return struct.pack("<Q", len(text)) + text


def write_hashed(path: Path, blocks: Iterator[memoryview]) -> dict[str, Any]:
    """Writes a file as one stream while hashing it; returns its manifest entry."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=BLOCK_BYTES) as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _seal(document: dict[str, Any]) -> bytes:
    """COMMITTED.json: the document with its own SHA-256, so that damage to the manifest is found too."""
    return to_json({**document, "sha256": hashlib.sha256(to_json(document)).hexdigest()})


def _unseal(content: bytes) -> dict[str, Any]:
    """The document of a COMMITTED.json. Raises ValueError where one byte is not as `_seal` wrote it."""
    document = json.loads(content)
    if not isinstance(document, dict) or "sha256" not in document:
        raise ValueError("no sealed document")
    del document["sha256"]
    if _seal(document) != content:
        raise ValueError("its SHA-256 does not agree")
    return document
