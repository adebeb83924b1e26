"""One run on one card and on two: the same losses, how much faster, and whether it outlives a killed process.

    python -m benchmarks.two_cards --out two_cards.json
    python -m benchmarks.two_cards --sharded       # weights in bf16, which the two cards share (FSDP2); none is killed
    python -m benchmarks.two_cards --tiny          # two processes on the CPU, the same code over a tiny model

Needs two GPUs of one host. The model has 31B's true width, its whole vision tower and 12 of its 60 text layers, with
random NF4 weights; samples are of 504 tokens, 5 to 14 of them supervised. Everything else is the trainer's own: an
attempt as `python -m g4trainer run` does it, under torchrun where there are two processes, in four parts:

    one card    effective batch 8 as 8 x 1, or cut by --micro-batch, to the end
    two cards   effective batch 8 as 4 x 1 on each card; a process of it gets SIGKILL
    resumed     the killed run to its end, a copy of it on one card, another on two

With --sharded the first two, to the end, of a model that is read from disk as a run reads it. Prints a table, then one
JSON document. Exits with 1 where losses differ by more than --tolerance, where the killed run did not end by itself, or
where a resumed one did not go on from its checkpoint.
"""

# ruff: noqa: E402 torchvision's operators must be declared before anything imports transformers or peft

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from g4trainer import torchvision_operators

torchvision_operators.declare()

import torch
from benchmarks import load, true_shapes
from transformers import set_seed

from g4trainer import __main__ as program
from g4trainer import gemma, train
from g4trainer.attention import choose_attention
from g4trainer.collator import IGNORED
from g4trainer.compiled import compile_layers
from g4trainer.dataset import Splits
from g4trainer.forward import never_wait
from g4trainer.launch import freeze
from g4trainer.metrics import read_metrics
from g4trainer.model import attach_lora, load_base
from g4trainer.planner import Plan
from g4trainer.recipe import Recipe
from g4trainer.rundir import RunDir, read_json, write_json
from g4trainer.trainer import RunTrainer

EFFECTIVE_BATCH = 8
SAMPLES = 64
"""That are made; a step takes others than the one before."""
STEPS, LOGGED_EVERY, SAVED_AT, KILLED_AT = 36, 3, 30, 32
WARM_STEPS = 12
"""Steps that are not timed: the first compile, and some more find memory for the first time."""
LEARNING_RATE = 2e-4
FLAGS = ("tiny", "no_compile", "sharded")
"""Options that the processes of a part are given too."""
PART_S = 360
"""Longer than any part takes; a part that hangs is a failure."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="text layers to keep")
    parser.add_argument("--micro-batch", type=int, default=EFFECTIVE_BATCH, help="samples a pass at most")
    parser.add_argument("--resume-on", type=int, nargs="*", default=(1, 2), help="cards, for a run each")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--sharded", action="store_true", help="weights in bf16, shared by the two cards")
    parser.add_argument("--tiny", action="store_true", help="the structure of the size at a tiny width, on the CPU")
    parser.add_argument("--tolerance", type=float, default=0.02, help="of a loss, relative")
    parser.add_argument("--out", type=Path, help="where the JSON document goes too")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    if not options.tiny and torch.cuda.device_count() < 2:
        sys.exit(f"two_cards: CUDA shows {torch.cuda.device_count()} GPUs; run it where there are two, or with --tiny.")
    with tempfile.TemporaryDirectory(prefix="two-cards-") as folder:
        result = measure(Path(folder), options)
    print(table(result))
    print(json.dumps(result))
    if options.out:
        write_json(options.out, result)
    return 0 if result["passed"] else 1


def measure(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    one, two = new_run(root, "one-card"), new_run(root, "two-cards")
    if options.sharded:
        write_base(one, options)
    parts = {"one card": start(one, 1, options)}
    losses = {"one card": losses_of(one)}
    if options.sharded:
        parts["two cards"] = start(two, 2, options)
        losses["two cards"] = losses_of(two)
    else:
        parts["two cards, one killed"] = start(two, 2, options, TWO_CARDS_KILL=str(KILLED_AT))
        losses["two cards"] = losses_of(two)
        for count in options.resume_on:
            run = copy_of(two, f"resumed-on-{count}")
            parts[f"resumed on {count}"] = start(run, count, options)
            losses[f"resumed on {count}"] = losses_of(run, since=SAVED_AT)
    differences = {f"{other} and one card": difference(losses[other], losses["one card"]) for other in list(losses)[1:]}
    if {"resumed on 1", "resumed on 2"} <= losses.keys():
        differences["resumed on 2 and on 1"] = difference(losses["resumed on 2"], losses["resumed on 1"])
    alone, together = samples_a_second(one), samples_a_second(two)
    speed = {"one card": alone, "two cards": together}
    problems = [f"{name}: exit code {part['exit_code']}" for name, part in parts.items() if not part["as_expected"]]
    problems += [f"{name}: no step was timed" for name, value in speed.items() if value is None]
    problems += [f"losses of {name}: differ by {by:.2g}" for name, by in differences.items() if by > options.tolerance]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "text_layers": options.layers,
        "tiny": options.tiny,
        "sharded": options.sharded,
        "samples_per_second": speed,
        "seconds_a_step": {"one card": step_seconds(one), "two cards": step_seconds(two)},
        "speedup": round(together / alone, 3) if alone and together else None,
        "largest_relative_difference_of_a_loss": {name: float(f"{by:.3g}") for name, by in differences.items()},
        "peak_memory_gib": {
            name: round(read_json(path)["train"]["peak_memory_bytes"] / 2**30, 2)
            for name, run in (("one card", one), ("two cards", two))
            if (path := run.adapter / "training_summary.json").exists()
        },
        "parts": parts,
        "losses": losses,
        "problems": problems,
        "passed": not problems,
    }


def new_run(root: Path, name: str) -> RunDir:
    run = RunDir(root / "runs" / name)
    recipe = Recipe.model_validate(
        {
            "name": "two-cards",
            "model": {"id": "gemma-4-31B-it"},
            "data": {"dataset": "random", "validation_size": 0},
            "training": {
                "learning_rate": LEARNING_RATE,
                "num_train_epochs": 1,  # at an epoch's end the loader begins anew
                "effective_batch_size": EFFECTIVE_BATCH,
                "load_best_model": False,
            },
            "evaluation": {"baseline": False},
        }
    )
    write_json(run.recipe, freeze(recipe, name, target="trainer").model_dump(mode="json"))
    model = root / "models" / recipe.model.id  # the number of loader processes goes by it
    write_json(model / "config.json", gemma.true_config("31B"))
    write_json(model / "STAGED.json", {"files": {}})
    return run


def write_base(run: RunDir, options: argparse.Namespace) -> None:
    """The base model as staged: random bf16 weights where a run's model is looked for."""
    folder = run.root / "models" / "random"
    begun = time.monotonic()
    parameters = load.write_random(folder, config_of(options))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"{parameters:,} random bf16 weights written in {time.monotonic() - begun:.0f} s", flush=True)


def config_of(options: argparse.Namespace) -> Any:
    return true_shapes.tiny_config("31B") if options.tiny else true_shapes.true_config("31B", options.layers)


def start(run: RunDir, cards: int, options: argparse.Namespace, **environment: str) -> dict[str, Any]:
    """Runs an attempt in processes of its own; returns how it ended."""
    own = ["-m", "benchmarks.two_cards", "--worker", str(run.path), "--layers", str(options.layers)]
    own += ["--micro-batch", str(options.micro_batch)]
    own += [f"--{on.replace('_', '-')}" for on in FLAGS if getattr(options, on)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node"]
    log = run.path / "log"
    begun = time.monotonic()
    with log.open("ab") as output:
        try:
            code = subprocess.run(
                [sys.executable, *([*torchrun, str(cards)] if cards > 1 else []), *own],
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
                cwd=Path(__file__).parents[1],
                timeout=PART_S,
                env={
                    **os.environ,
                    "NCCL_NVLS_ENABLE": "0",
                    "G4KIT_STATUS_INTERVAL_S": "1",
                    "OMP_NUM_THREADS": "4" if torch.cuda.is_available() else "1",
                    **({"CUDA_VISIBLE_DEVICES": first_card()} if cards == 1 else {}),
                    **environment,
                },
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    killed = "TWO_CARDS_KILL" in environment
    text = log.read_text(errors="replace")
    as_expected = ("a process of this attempt died" in text and code > 0) if killed else code == 0
    if not killed and (run.checkpoints.parent / "killed").exists():
        as_expected &= f"resuming from step {SAVED_AT}" in text
    if not as_expected:
        print(text[-6000:], file=sys.stderr)
    ended = {"exit_code": code, "as_expected": as_expected, "seconds": round(time.monotonic() - begun, 1)}
    print(f"{run.path.name} on {cards}: {ended}", flush=True)
    print(json.dumps({"losses": losses_of(run), "seconds a step, first attempt": step_seconds(run)}), flush=True)
    return ended


def first_card() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def copy_of(run: RunDir, name: str) -> RunDir:
    copy = RunDir(run.path.with_name(name))
    shutil.copytree(run.path, copy.path)
    (copy.path / "log").unlink()
    (copy.path / "killed").touch()
    recipe = read_json(copy.recipe)
    write_json(copy.recipe, recipe | {"run_id": name})
    return copy


def losses_of(run: RunDir, *, since: int = 0) -> dict[int, float]:
    return {
        line["step"]: line["loss"] for line in read_metrics(run) if line["kind"] == "train" and line["step"] > since
    }


def difference(losses: dict[int, float], reference: dict[int, float]) -> float:
    """The largest relative difference over the steps that both have; infinite where they have none in common."""
    common = losses.keys() & reference.keys()
    return max((abs(losses[step] - reference[step]) / abs(reference[step]) for step in common), default=float("inf"))


def samples_a_second(run: RunDir) -> float | None:
    """By the median of the first attempt's warm steps before its first checkpoint; None where it had none."""
    timed = [seconds for step, seconds in step_seconds(run).items() if WARM_STEPS < step <= SAVED_AT]
    return round(EFFECTIVE_BATCH / statistics.median(timed), 3) if timed else None


def step_seconds(run: RunDir) -> dict[int, float]:
    """Seconds a step of the first attempt, the mean of those up to the one that is named."""
    path = run.metrics / "0001.jsonl"
    lines = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    times = {line["step"]: datetime.fromisoformat(line["time"]).timestamp() for line in lines}
    return {
        step: round((times[step] - times[before]) / (step - before), 4) for before, step in itertools.pairwise(times)
    }


def table(result: dict[str, Any]) -> str:
    speed = result["samples_per_second"]
    rows = [f"{result['device']}, torch {result['torch']}, {result['text_layers']} text layers", ""]
    rows += [f"{name:<32}{value or '-':>10} samples/s" for name, value in speed.items()]
    rows += [f"{'speedup':<32}{result['speedup'] or '-':>10}", ""]
    rows += [f"{name:<32}{gib:>10.2f} GiB at most on a card" for name, gib in result["peak_memory_gib"].items()]
    rows += [""]
    rows += [
        f"{name:<32}{by:>10.2g} largest relative difference of a loss"
        for name, by in result["largest_relative_difference_of_a_loss"].items()
    ]
    rows += [
        "",
        *(
            f"{name:<32}{part['seconds']:>10.1f} s, exit code {part['exit_code']}"
            for name, part in result["parts"].items()
        ),
    ]
    rows += ["", "step" + "".join(f"{name:>16}" for name in result["losses"])]
    for step in result["losses"]["one card"]:
        found = (losses.get(step) for losses in result["losses"].values())
        rows.append(f"{step:>4}" + "".join(f"{'' if loss is None else f'{loss:.5f}':>16}" for loss in found))
    return "\n".join([*rows, "", *(result["problems"] or ["passed"])])


# What runs in each process


def worker(options: argparse.Namespace) -> int:
    """One attempt of the trainer, with a model and samples made here instead of staged ones."""

    class Cards(train.Phases):
        def load(self) -> None:
            self._make(options)

        def _make(self, options: argparse.Namespace) -> None:
            config = config_of(options)
            torch.backends.cuda.enable_cudnn_sdp(False)
            if options.sharded:
                settings = self.recipe.model.model_copy(update={"quantization": "none"})
                folder = self.run.root / "models" / "random"
                base = load_base(folder, settings, device=self.device, shards=self.ranks.size)
            else:
                base = true_shapes.build(config, self.device)
            samples: Any = Samples(config)
            choose_attention(base, "auto", tokens=samples.tokens, device=self.device)
            set_seed(self.recipe.training.seed)
            lora = self.recipe.lora.model_copy(update={"r": 4 if options.tiny else 64})
            self.model = attach_lora(base, lora, base_model=self.recipe.model.id)
            never_wait(self.model)
            self.initial_adapter = {}
            self.splits = Splits(list(range(STEPS * EFFECTIVE_BATCH)), [], [], (), 0)  # type: ignore[arg-type]
            self.collator = samples
            self.attempt.own_the_run()
            self.plan.follow(plan_for(self.run, self.ranks.size, options.micro_batch))
            if self.device.type == "cuda" and not options.no_compile:
                compile_layers(self.model)

        def final(self) -> None:
            pass

        def report(self) -> None:
            pass

    train.Phases = Cards  # type: ignore[misc]
    die_at = os.environ.get("TWO_CARDS_KILL")
    if die_at and os.environ.get("RANK") == "1":
        kill_at(int(die_at))
    return program.main(["run", str(options.worker)])


def plan_for(run: RunDir, processes: int, micro_batch: int) -> Plan:
    """As few micro-batches a step on each card as that one allows; a resumed run keeps what it had."""
    if run.plan.exists():
        return Plan.from_json(read_json(run.plan))
    micro = min(micro_batch, EFFECTIVE_BATCH // processes)
    plan = Plan(
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=EFFECTIVE_BATCH // processes // micro,
        activation_checkpointing="none",
        evaluation_batch_size=1,
        total_steps=STEPS,
        warmup_steps=2,
        eval_steps=STEPS + 1,
        save_steps=SAVED_AT,
        logging_steps=LOGGED_EVERY,
        processes=processes,
    )
    if os.environ.get("RANK", "0") == "0":
        write_json(run.plan, plan.to_json())
    return plan


def kill_at(step: int) -> None:
    """This process gets SIGKILL at the beginning of a step."""
    training_step = RunTrainer.training_step

    def killed(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(self, *arguments, **options)

    RunTrainer.training_step = killed  # type: ignore[method-assign]


class Samples:
    """Collates numbers of samples: random tokens and pixels by the number, the last 5 to 14 tokens supervised."""

    image_id = -1

    def __init__(self, config: Any) -> None:
        self._made = []
        for number in range(SAMPLES):
            torch.manual_seed(number)
            self._made.append(true_shapes.batch_of(1, config, torch.device("cpu")))
        self.tokens = self._made[0]["input_ids"].shape[1]

    def __call__(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        batch = {name: torch.cat([self._made[number % SAMPLES][name] for number in numbers]) for name in self._made[0]}
        supervised = [5 + number % 10 for number in numbers]
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        width = max(supervised)
        batch["logits_to_keep"] = torch.zeros(len(numbers), width, dtype=torch.int64)
        batch["kept_labels"] = torch.full((len(numbers), width), IGNORED)
        for row, count in enumerate(supervised):
            batch["labels"][row, -count:] = batch["input_ids"][row, -count:]
            batch["logits_to_keep"][row, :count] = torch.arange(self.tokens - count - 1, self.tokens - 1)
            batch["kept_labels"][row, :count] = batch["input_ids"][row, -count:]
        return batch


if __name__ == "__main__":
    raise SystemExit(main())
