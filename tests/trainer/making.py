"""What the trainer's tests are made of: images, examples, tiny models with and without adapters, batches."""

import io
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from g4trainer import recipe as recipes
from g4trainer import tiny
from g4trainer.collator import Collator
from g4trainer.dataset import Example
from g4trainer.model import attach_lora, load_base

CPU = torch.device("cpu")
PROMPT = "Which digit is it?"
ANSWERS = ("zero", "three", "seven nine", "four", "one two three", "five", "eight", "six")
"""Labels of unequal length, from one token to several."""


def picture(width: int = 20, height: int = 16, *, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """An image of random pixels."""
    noise = random.Random(seed).randbytes(width * height * 3)
    image = Image.frombytes("RGB", (width, height), noise)
    return image if mode == "RGB" else image.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def example(answer: str = "seven", *, prompt: str = PROMPT, images: int = 1, seed: int = 0) -> Example:
    files = tuple(encoded(picture(seed=seed + number)) for number in range(images))
    return Example(f"train/{seed}", files, prompt, answer)


def examples(answers: tuple[str, ...] = ANSWERS) -> list[Example]:
    return [example(answer, seed=seed) for seed, answer in enumerate(answers)]


def collator(like: tiny.Like = "E2B", **options: Any) -> Collator:
    return Collator(tiny.make_processor(like), **{"max_soft_tokens": 70, **options})


def settings(**lora: Any) -> recipes.Lora:
    return recipes.Lora(**{"r": 8, "lora_alpha": 8, **lora})


def base_model(folder: Path, quantization: str = "nf4") -> Any:
    """A base model on the CPU, as a run loads it."""
    chosen = recipes.Model.model_validate({"id": "tiny-gemma4", "quantization": quantization, "max_soft_tokens": 70})
    return load_base(folder, chosen, device=CPU)


def adapted_model(folder: Path, *, quantization: str = "nf4", **lora: Any) -> Any:
    """A base model with fresh adapters."""
    torch.manual_seed(0)
    return attach_lora(base_model(folder, quantization), settings(**lora), base_model="tiny-gemma4")


def fill_adapters(model: Any, *, std: float = 0.05) -> None:
    """Gives lora_B random values, as if it had been trained: with its initial zeros an adapter changes nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def inputs_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model's forward takes of a training batch, for logits at every position."""
    return {k: v for k, v in batch.items() if k not in ("labels", "kept_labels", "logits_to_keep")}


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits at every position, without dropout: (batch, sequence, vocabulary)."""
    model.eval()
    with torch.inference_mode():
        made: torch.Tensor = model(**inputs_of(batch), use_cache=False).logits
    return made


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())
