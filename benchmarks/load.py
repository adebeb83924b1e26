"""Start-up: load-and-quantize from bf16, writing the NF4 copy, loading that copy; seconds and memory of each.

    python -m benchmarks.load --size 31B --layers 20      # on a GPU; the whole 31B takes 81 GB of disk for both folders
    python -m benchmarks.load --tiny                      # on the CPU, the same code over a tiny model

A folder of random bf16 weights is written, in shards as large as the published ones. Then each stage runs in a process
of its own: what a run calls to load its base model, `g4trainer quantize`, and the loading again. Before each, what it
reads is dropped from the page cache; printed is the share that was there nevertheless. Host memory is the process's
peak, in all (mapped files included, whose pages the system takes back when it needs them) and without such pages.
"""

# ruff: noqa: E402 torchvision's operators must be declared before anything imports transformers or peft

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from g4trainer import torchvision_operators

torchvision_operators.declare()

import torch
from benchmarks import true_shapes
from safetensors.torch import save_file
from transformers import AutoModelForMultimodalLM

from g4trainer import gemma
from g4trainer import recipe as recipes
from g4trainer.model import load_base
from g4trainer.quantize import make_copy
from g4trainer.rundir import write_json
from g4trainer.staged import NF4_COPY

SHARD_BYTES = 5 * 10**9
"""About what a shard of the published 31B has."""
SAMPLE_S = 0.01
"""Between two looks at the process's memory."""
GB = 1e9


def main() -> int:
    parser = true_shapes.parser_of_shapes(__doc__)
    parser.add_argument("--on", type=Path, help="a folder of the disk to measure; default the temporary one")
    parser.add_argument("--stage", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        name, folder = options.stage
        print(json.dumps(measured(STAGES[name], Path(folder))))
        return 0
    with tempfile.TemporaryDirectory(prefix="g4kit-load-", dir=options.on) as root:
        model = Path(root) / "models" / f"gemma-4-{options.size}-it"
        config = (
            true_shapes.tiny_config(options.size)
            if options.tiny
            else true_shapes.true_config(options.size, options.layers)
        )
        begun = time.perf_counter()
        parameters = write_random(model, config)
        whole = gemma.facts_of(gemma.true_config(options.size)).parameters
        print(
            f"{model.name}: {parameters:,} random bf16 weights, {parameters / whole:.1%} of the whole one's, "
            f"written in {time.perf_counter() - begun:.0f} s; {device_name()}, torch {torch.__version__}",
            flush=True,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        copy = model.with_name(f"{model.name}{NF4_COPY}")
        for title, stage, folder in (
            ("load and quantize bf16", "load", model),
            ("write the NF4 copy", "quantize", model),
            ("load the NF4 copy", "load", copy),
        ):
            cached = drop_from_cache(folder)
            result = in_a_process(stage, folder)
            size = bytes_of(folder)
            print(
                json.dumps(
                    {
                        "stage": title,
                        "read_gb": round(size / GB, 2),
                        "cached_before": cached,
                        **result,
                        "gb_per_second": round(size / GB / result["seconds"], 2),
                        **({} if options.tiny else {"seconds_of_whole": round(result["seconds"] * whole / parameters)}),
                    }
                ),
                flush=True,
            )
    return 0


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def write_random(folder: Path, config: Any) -> int:
    """A staged model's folder with random weights in bf16, tokenizer and processor left out; returns its parameters.

    The audio tower is left out. One shard is in memory at a time.
    """
    folder.mkdir(parents=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(config, dtype=torch.bfloat16)
    document = {**config.to_dict(), "model_type": gemma.MODEL_TYPE, "architectures": [type(model).__name__]}
    write_json(folder / "config.json", document)
    tied = set(model.all_tied_weights_keys)
    shapes = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    shard: dict[str, torch.Tensor] = {}
    shard_of: dict[str, str] = {}
    for name, tensor in shapes.items():
        if shard and sum(one.nbytes for one in shard.values()) + tensor.nbytes > SHARD_BYTES:
            shard_of |= _write_shard(folder, shard, len(set(shard_of.values())))
            shard = {}
        shard[name] = random_tensor(name, tensor.shape, device)
    shard_of |= _write_shard(folder, shard, len(set(shard_of.values())))
    size = sum(tensor.nbytes for tensor in shapes.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": shard_of})
    files = {path.name: {"size": path.stat().st_size} for path in folder.iterdir()}
    write_json(folder / "STAGED.json", {"source": "random", "revision": "0", "files": files})
    return sum(tensor.numel() for tensor in shapes.values())


def random_tensor(name: str, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """In bf16 on the CPU; bounds and scales, which are buffers without a dimension, are ones."""
    if not shape:
        return torch.ones(shape, dtype=torch.bfloat16)
    return true_shapes.initial(name, shape, device, torch.bfloat16).cpu()


def _write_shard(folder: Path, tensors: dict[str, torch.Tensor], number: int) -> dict[str, str]:
    """The file's name by tensor. Written to disk, so that the page cache can let go of it."""
    path = folder / f"model-{number + 1:05d}.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return dict.fromkeys(tensors, path.name)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def drop_from_cache(folder: Path) -> str:
    """Asks the system to drop a folder's weights from its page cache; the share that is still there, where it tells."""
    os.sync()
    paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        command = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, paths)]
        listed = subprocess.run(command, check=True, capture_output=True, text=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return f"{sum(map(int, listed.stdout.split())) / bytes_of(folder):.0%}"


def in_a_process(stage: str, folder: Path) -> dict[str, Any]:
    """What `measured` returns in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.load", "--stage", stage, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def load(folder: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.zeros(1, device=device)
    load_base(folder, recipes.Model(id="random"), device=device)
    if device.type == "cuda":
        torch.cuda.synchronize()


def quantize(folder: Path) -> None:
    make_copy(folder)


STAGES: dict[str, Callable[[Path], None]] = {"load": load, "quantize": quantize}


def measured(work: Callable[[Path], None], folder: Path) -> dict[str, Any]:
    """Seconds of the work alone, imports apart, and the peaks of memory in GB."""
    with PeakMemory() as peak:
        begun = time.perf_counter()
        work(folder)
        seconds = time.perf_counter() - begun
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "seconds": round(seconds, 2),
        "host_peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB, 2),
        "host_peak_without_mapped_files_gb": round(peak.bytes / GB, 2),
        "host_before_gb": round(peak.before / GB, 2),
        "gpu_peak_gb": round(gpu / GB, 2),
    }


class PeakMemory:
    """The process's largest anonymous memory, looked at every SAMPLE_S; `before` is that of the imports."""

    def __init__(self) -> None:
        self.before = self.bytes = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.bytes = max(self.bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, pinned and shared memory included; see proc_pid_status(5)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[part].split()[0]) * 1024 for part in ("RssAnon", "RssShmem"))


if __name__ == "__main__":
    raise SystemExit(main())
