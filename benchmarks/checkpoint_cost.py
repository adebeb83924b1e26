"""What a checkpoint costs: bytes, the copy that training waits for, the write beside it, and reading it back.

    python benchmarks/checkpoint_cost.py                      the tiny model's size and Gemma 4 31B's (takes 15 GB)
    python benchmarks/checkpoint_cost.py --parameters 30272   a size of your own, in trainable parameters

The tensors are random, in fp32 as LoRA and AdamW hold them; the disk is the temporary folder's. What a mounted bucket
would take is derived from the bytes at 200 MiB/s.
"""

import argparse
import json
import resource
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from g4trainer.checkpoint import (
    ADAPTER_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    TRAINER_STATE_FILE,
    newest_checkpoint,
)
from g4trainer.checkpoint_writer import ASSUMED_BYTES_PER_S, CheckpointWriter
from g4trainer.state import pack_random_states

SIZES = {"tiny model, r=64": 484_352, "Gemma 4 31B, r=64": 534_467_584}
"""Trainable parameters of LoRA on every linear layer."""
PARAMETERS_A_TENSOR = 344_064
"""About a 31B adapter matrix: 5,376 x 64."""


class NoClaim:
    """Nobody else writes here."""

    name = "0001-benchmark"

    def check(self) -> None:
        pass


@dataclass(frozen=True)
class Cost:
    what: str
    parameters: int
    bytes: int
    first_copy_s: float
    """Training waits for it; the first one asks for the memory."""
    next_copy_s: float
    write_s: float
    """Beside the training: hash, write, fsync, commit, to a local disk."""
    read_s: float
    """Read, verify, make tensors."""
    derived_bucket_s: float
    """The bytes at 200 MiB/s."""
    peak_memory_bytes: int


def measure(what: str, parameters: int) -> Cost:
    adapter, moments = _tensors(parameters, ""), _tensors(parameters, ".exp_avg")
    moments |= _tensors(parameters, ".exp_avg_sq")
    with tempfile.TemporaryDirectory(prefix="g4kit-checkpoint-") as folder:
        root = Path(folder)
        claim: Any = NoClaim()
        writer = CheckpointWriter(root, "0" * 64, claim)
        documents = {STATE_FILE: {"random": pack_random_states()}, TRAINER_STATE_FILE: {}}
        copies, writes = [], []
        for step in (1, 2):
            started = time.monotonic()
            tensors = {ADAPTER_FILE: adapter, OPTIMIZER_FILE: moments}
            writer.submit(step, tensors=tensors, documents=documents, keep=())
            copied = time.monotonic()
            writer.wait()
            copies.append(round(copied - started, 3))
            writes.append(round(time.monotonic() - copied, 3))
        size = sum(path.stat().st_size for path in (root / "step-00000002").iterdir())
        del adapter, moments, tensors, writer
        begun = time.monotonic()
        checkpoint = newest_checkpoint(root, "0" * 64)
        assert checkpoint is not None
        checkpoint.take_tensors(ADAPTER_FILE)
        checkpoint.take_tensors(OPTIMIZER_FILE)
        read = time.monotonic()
    return Cost(
        what,
        parameters,
        size,
        copies[0],
        copies[1],
        min(writes),
        round(read - begun, 3),
        round(size / ASSUMED_BYTES_PER_S, 3),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _tensors(parameters: int, ending: str) -> dict[str, torch.Tensor]:
    sizes = [PARAMETERS_A_TENSOR] * (parameters // PARAMETERS_A_TENSOR)
    sizes += [parameters % PARAMETERS_A_TENSOR] if parameters % PARAMETERS_A_TENSOR else []
    return {f"{index}{ending}": torch.rand(size) for index, size in enumerate(sizes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, action="append", help="trainable parameters; may be given again")
    options = parser.parse_args()
    sizes = {f"{count:,} parameters": count for count in options.parameters or ()} or SIZES
    for what, parameters in sizes.items():
        print(json.dumps(asdict(measure(what, parameters)), indent=2), flush=True)


if __name__ == "__main__":
    main()
