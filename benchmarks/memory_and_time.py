"""Predicted against measured: peak memory and step time of true shapes on a CUDA card, and what fits smaller cards.

    python -m benchmarks.memory_and_time                        # every setting below: 40 to 130 seconds each on an H200
    python -m benchmarks.memory_and_time --only E4B --steps 2
    python -m benchmarks.memory_and_time --tiny                 # on the CPU, the same code over a tiny model

Random weights, the trainer's own LoRA, attention and compilation (true_shapes.py builds them). Memory is
torch.cuda.max_memory_allocated; time is that of the steps after the first, none of which waits for the one before. Each
setting then takes a step with this process's memory capped at what a smaller card has beside its CUDA context: what is
said to fit must, and nothing else. Prints a Markdown table, and exits with 1 where memory is off by more than 5 %, time
by more than 15 %, or a card holds what it should not or the reverse.
"""

# ruff: noqa: E402 torchvision's operators must be declared before anything imports transformers or peft

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from g4trainer import torchvision_operators

torchvision_operators.declare()

import torch
from benchmarks import true_shapes

from g4trainer import gemma, timing, vram
from g4trainer import recipe as recipes
from g4trainer.attention import choose_attention
from g4trainer.calibration import MEMORY_WITHIN, TIME_WITHIN
from g4trainer.compiled import compile_layers
from g4trainer.forward import never_wait
from g4trainer.limits import ACCELERATORS
from g4trainer.model import attach_lora

CARDS = {"NVIDIA H200": "nvidia-h200-141gb", "NVIDIA L4": "nvidia-l4", "NVIDIA RTX PRO 6000": "nvidia-rtx-pro-6000"}


@dataclass(frozen=True)
class Setting:
    size: gemma.Size
    r: int
    soft_tokens: int
    micro_batch: int
    checkpointing: vram.Checkpointing

    @property
    def name(self) -> str:
        return (
            f"{self.size} r={self.r} {self.soft_tokens} soft tokens, batch {self.micro_batch}, "
            f"checkpointing {self.checkpointing}"
        )

    def recipe(self, accelerator: str) -> recipes.Recipe:
        document = {
            "name": "benchmark",
            "model": {"id": f"gemma-4-{self.size}-it", "max_soft_tokens": self.soft_tokens},
            "data": {"dataset": "random"},
            "lora": {"r": self.r, "lora_alpha": self.r},
            "training": {"effective_batch_size": self.micro_batch},
            "job": {"accelerator": accelerator},
        }
        return recipes.parse_recipe(document, source="benchmark")


SETTINGS = (
    Setting("31B", 64, 280, 1, "full"),
    Setting("31B", 64, 280, 8, "full"),
    Setting("31B", 64, 280, 8, "half"),
    Setting("31B", 64, 280, 4, "none"),
    Setting("31B", 64, 1120, 1, "none"),
    Setting("31B", 16, 280, 4, "none"),
    Setting("31B", 16, 70, 8, "none"),
    Setting("26B-A4B", 64, 280, 8, "full"),
    Setting("26B-A4B", 64, 280, 8, "none"),
    Setting("E4B", 64, 280, 8, "none"),
    Setting("E4B", 64, 280, 16, "full"),
    Setting("E4B", 64, 1120, 2, "half"),
    Setting("E2B", 64, 280, 4, "half"),
    Setting("E2B", 64, 280, 8, "none"),
)
CAPPED = ("nvidia-l4", "nvidia-rtx-pro-6000")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="settings whose name holds this text")
    parser.add_argument("--raw", type=Path, help="a file that all that was measured is written to, a JSON line each")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of each setting; the first is not timed")
    parser.add_argument("--tiny", action="store_true", help="the structure of the sizes at a tiny width")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        sys.stderr.write("no CUDA card: memory and time of true shapes cannot be measured; write --tiny.\n")
        return 2
    torch.backends.cuda.enable_cudnn_sdp(False)
    chosen = [setting for setting in SETTINGS if not options.only or options.only in setting.name]
    print(f"{len(chosen)} settings, torch {torch.__version__}, {card_title(device)}\n")
    cards = " | ".join(f"{ACCELERATORS[card].memory_gib} GB said, did" for card in CAPPED)
    print(f"| setting | GiB predicted | measured | error | s/sample predicted | measured | error | {cards} |")
    print(f"{'|---' * (7 + len(CAPPED))}|", flush=True)
    right = True
    for setting, result in measured(chosen, options, device):
        right &= row(setting, result, device)
        if options.raw:
            with options.raw.open("a") as lines:
                lines.write(json.dumps({**asdict(setting), **result}) + "\n")
    return 0 if right else 1


def measured(chosen: list[Setting], options: Any, device: torch.device) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Each setting with its figures; the model is built once for settings that differ in neither size nor rank."""
    for (size, r), settings in groupby(chosen, key=lambda setting: (setting.size, setting.r)):
        config = true_shapes.tiny_config(size) if options.tiny else true_shapes.true_config(size, None)
        model = loaded(config, size, r, device)
        for setting in settings:
            yield setting, run(model, config, setting, options.steps, device)
        del model
        torch.compiler.reset()
        free()


def loaded(config: Any, size: gemma.Size, r: int, device: torch.device) -> Any:
    torch.manual_seed(0)
    settings = recipes.Lora(r=r, lora_alpha=r)
    model = attach_lora(true_shapes.build(config, device), settings, base_model=f"gemma-4-{size}-it")
    never_wait(model)
    if device.type == "cuda":
        compile_layers(model)
    return model


def run(model: Any, config: Any, setting: Setting, steps: int, device: torch.device) -> dict[str, Any]:
    """A few steps of one setting, as a run would take them."""
    base = model.get_base_model()
    batch = samples(setting, config, device)
    choose_attention(base, "auto", tokens=batch["input_ids"].shape[1], device=device)
    base.activation_checkpointing_disable()
    if setting.checkpointing != "none":
        every = 2 if setting.checkpointing == "half" else 1
        base.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    free()
    result = true_shapes.measure(model, batch, steps, device)
    if device.type == "cuda":
        result["ran_within"] = {card: runs_within(card, model, batch) for card in CAPPED}
    return result


def runs_within(card: str, model: Any, batch: dict[str, torch.Tensor]) -> bool:
    """Whether a step runs in the memory of that card, less the CUDA context's."""
    free()
    torch.cuda.set_per_process_memory_fraction(free_on(card) / torch.cuda.mem_get_info()[1])
    try:
        true_shapes.measure(model, batch, 1, torch.device("cuda"))
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        free()
        torch.cuda.set_per_process_memory_fraction(1.0)
    return True


def samples(setting: Setting, config: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """Images that fill their budget, as the prediction assumes, and the text of true_shapes."""
    shape = {70: (7, 10), 140: (10, 14), 280: (14, 20), 560: (20, 28), 1120: (28, 40)}[setting.soft_tokens]
    true_shapes.BUDGET, (true_shapes.ROWS, true_shapes.COLUMNS) = setting.soft_tokens, shape
    return true_shapes.batch_of(setting.micro_batch, config, device)


def row(setting: Setting, result: dict[str, Any], device: torch.device) -> bool:
    """Prints one line; returns whether both predictions are near enough (always so without a card)."""
    name = accelerator_of(device)
    model = vram.Model(setting.recipe(name), gemma.true_config(setting.size))
    shape = model.shape(true_shapes.TEXT_TOKENS)
    step = vram.Step(
        setting.micro_batch,
        setting.checkpointing,
        vram.attention_for("auto", shape.tokens),
        accumulates=False,
    )
    memory = vram.training(model, shape, step)
    gib = memory.total / vram.GIB
    seconds = timing.step_seconds(
        model,
        shape,
        timing.CARDS[name],
        micro_batch=setting.micro_batch,
        checkpointing=setting.checkpointing,
        accumulation=1,
    )
    seconds /= setting.micro_batch
    said = {card: vram.with_reserve(memory).total <= free_on(card) for card in CAPPED}
    did = result.get("ran_within", {})
    fits = " | ".join(f"{answer(said[card])}, {answer(did.get(card))}" for card in CAPPED)
    print(
        f"| {setting.name} | {gib:.1f} | {result['peak_gib']:.1f} | {off(gib, result['peak_gib']):+.1%} "
        f"| {seconds:.3f} | {result['seconds_a_sample']:.3f} | {off(seconds, result['seconds_a_sample']):+.1%} "
        f"| {fits} |",
        flush=True,
    )
    if device.type == "cpu":
        return bool(result["finite"])
    near = abs(off(gib, result["peak_gib"])) <= MEMORY_WITHIN
    timely = abs(off(seconds, result["seconds_a_sample"])) <= TIME_WITHIN
    return near and timely and said == did and bool(result["finite"])


def answer(fits: bool | None) -> str:
    return "-" if fits is None else "yes" if fits else "no"


def free_on(card: str) -> int:
    return int(ACCELERATORS[card].memory_gib * vram.GIB) - vram.CUDA_CONTEXT


def off(predicted: float, found: float) -> float:
    return predicted / found - 1 if found else 0.0


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def card_title(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU: nothing here is a measurement"


def accelerator_of(device: torch.device) -> str:
    """The name in limits.json; on other cards times are compared with an H200's, and told so by their error."""
    title = card_title(device)
    return next((name for start, name in CARDS.items() if title.startswith(start)), timing.CALIBRATED_ON)


if __name__ == "__main__":
    raise SystemExit(main())
