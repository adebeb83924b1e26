"""The input pipeline without a model: samples a second for each core, and where their time goes.

    python -m benchmarks.input_pipeline                        # Oxford-IIIT Pet's common size, 0, 1 and 2 workers
    python -m benchmarks.input_pipeline --photo 4032 3024 --samples 64

JPEG files of real photos (scikit-learn's two, cut at random places) pass through what a run uses: the data set's
decoder, Gemma 4's image processor, the collator, and the loader that the Trainer makes from the run's arguments. Parts
are measured in seconds of one core, so that other work on the machine does not count; rates are by the wall clock.
The tokenizer is the embedded one of 512 tokens: that of the published models is not needed to time the rest.
"""

# ruff: noqa: E402 torchvision's operators must be declared before anything imports transformers or peft

import argparse
import io
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from g4trainer import torchvision_operators

torchvision_operators.declare()

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import Trainer, TrainingArguments

from g4trainer import recipe as recipes
from g4trainer import tiny
from g4trainer.collator import Collator
from g4trainer.dataset import Example
from g4trainer.pixels import patches_of
from g4trainer.planner import choose_plan, training_arguments

PHOTO = (500, 375)
"""Pixels: the most common size of Oxford-IIIT Pet."""
QUALITY = 90
PATCH_SIZE, POOLING_KERNEL_SIZE, SOFT_TOKENS = 16, 3, 280
STOCK = "transformers' image processor"
"""For comparison: a run does without it."""
PARTS = ("decoding", "image processor", STOCK, "the whole")
LABELS = tuple(f"breed number {number}" for number in range(37))
PROMPT = f"Which breed is it? Answer with one of: {', '.join(LABELS)}."
BUSY = {"31B on an H200": 0.167, "E4B on an H200": 0.045}
"""Seconds a sample of training steps, from benchmarks/README.md."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=int, nargs=2, default=PHOTO, metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--samples", type=int, default=256, help="of each measurement")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--numbers", action="store_true", help="send patches in fp32, not as bytes, for comparison")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker
    collator = make_collator(pixels_as_bytes=not options.numbers)
    examples = make_examples(options.samples, tuple(options.photo))
    size = statistics.mean(len(example.images[0]) for example in examples)
    print(
        f"{options.samples} JPEG files of {options.photo[0]} x {options.photo[1]}, {size / 1000:.0f} kB on average; "
        f"micro-batches of {options.micro_batch}; {os.cpu_count()} cores, torch {torch.__version__}"
    )
    parts = seconds_by_part(collator, examples, options.micro_batch)
    total = parts["the whole"]
    for name, seconds in parts.items():
        print(f"  {name:<31} {1000 * seconds:7.2f} ms a sample  {seconds / total:6.1%}")
    print(f"  {1 / total:.0f} samples a second for each core")
    for workers in options.workers:
        print(json.dumps(loaded(collator, examples, options.micro_batch, workers)), flush=True)
    for what, seconds in BUSY.items():
        print(f"{what}, {seconds} s a sample: {total / seconds:.2f} cores are busy")
    return 0


def make_collator(*, pixels_as_bytes: bool) -> Collator:
    """With the processor of the published sizes, but for its tokenizer."""
    tiny.PATCH_SIZE, tiny.POOLING_KERNEL_SIZE = PATCH_SIZE, POOLING_KERNEL_SIZE
    processor = tiny.make_processor("31B")
    return Collator(processor, max_soft_tokens=SOFT_TOKENS, pad_to_multiple_of=64, pixels_as_bytes=pixels_as_bytes)


def make_examples(count: int, size: tuple[int, int]) -> list[Example]:
    """JPEG files of that size, no two alike: parts of two photos of 640 x 427, enlarged where the size is larger."""
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    draw = random.Random(0)
    examples = []
    for number in range(count):
        photo = photos[number % len(photos)]
        width = draw.randint(photo.width // 2, photo.width)
        height = min(photo.height, width * size[1] // size[0])
        left, top = draw.randint(0, photo.width - width), draw.randint(0, photo.height - height)
        buffer = io.BytesIO()
        photo.crop((left, top, left + width, top + height)).resize(size).save(buffer, format="JPEG", quality=QUALITY)
        examples.append(Example(f"train/{number}", (buffer.getvalue(),), PROMPT, LABELS[number % len(LABELS)]))
    return examples


def seconds_by_part(collator: Collator, examples: list[Example], micro_batch: int) -> dict[str, float]:
    """Of one core, a sample; the parts add up to a batch as a worker makes it, `sending` left out."""
    processor = collator.processor.image_processor
    batches = [examples[at : at + micro_batch] for at in range(0, len(examples), micro_batch)]
    collator(batches[0])  # what is done once
    seconds = dict.fromkeys(PARTS, 0.0)
    for batch in batches:  # a batch at a time, so that no more than a batch of pictures is in memory
        with timed(seconds, "decoding"):
            opened = [example.open_images() for example in batch]
        with timed(seconds, "image processor"):
            for images in opened:
                patches_of(processor, images, SOFT_TOKENS)
        with timed(seconds, STOCK):
            for images in opened:
                processor(images, max_soft_tokens=SOFT_TOKENS, return_tensors="pt")
        with timed(seconds, "the whole"):
            collator(batch)
    parts = {name: value / len(examples) for name, value in seconds.items()}
    parts["tokens and collating"] = parts["the whole"] - parts["decoding"] - parts["image processor"]
    return parts


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Adds the processor time of this thread to a part."""
    begun = time.thread_time()
    yield
    seconds[part] += time.thread_time() - begun


def loaded(collator: Collator, examples: list[Example], micro_batch: int, workers: int) -> dict[str, Any]:
    """Rate of the loader that the Trainer makes from a run's arguments, and what it takes of the cores.

    The first epoch is not timed: in it the workers start.
    """
    loader = trainer_loader(collator, examples, micro_batch, workers)
    for _ in loader:
        pass
    own, children = time.process_time(), workers_seconds()
    begun = time.perf_counter()
    samples = sum(len(batch["input_ids"]) for batch in loader)
    wall = time.perf_counter() - begun
    here = time.process_time() - own
    in_workers = workers_seconds() - children
    return {
        "workers": workers,
        "samples_per_second": round(samples / wall, 1),
        "ms_of_a_core_in_workers": round(1000 * in_workers / samples, 2),
        "ms_of_a_core_in_the_trainer": round(1000 * here / samples, 2),
    }


def trainer_loader(collator: Collator, examples: list[Example], micro_batch: int, workers: int) -> Any:
    """The training batches of a run with that many workers, an epoch each time it is gone through."""
    document = {
        "name": "benchmark",
        "model": {"id": "x", "max_soft_tokens": SOFT_TOKENS},
        "data": {"dataset": "x"},
        "training": {"per_device_train_batch_size": micro_batch},
    }
    recipe = recipes.parse_recipe(document, source="benchmark")
    plan = choose_plan(
        recipe,
        train_samples=len(examples),
        validation_samples=0,
        micro_batch=micro_batch,
        activation_checkpointing="none",
        evaluation_batch_size=1,
    )
    arguments = training_arguments(recipe, plan, device="cpu", output_dir=tempfile.mkdtemp())
    arguments |= {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    trainer = Trainer(
        model=torch.nn.Linear(1, 1),
        args=TrainingArguments(**arguments),
        data_collator=collator,
        train_dataset=examples,
    )
    return trainer.get_train_dataloader()


def workers_seconds() -> float:
    """Processor time so far of the live processes that this one started."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = 0.0
    for path in Path("/proc/self/task").glob("*/children"):
        for child in path.read_text().split():
            fields = (Path("/proc") / child / "stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / ticks  # utime and stime, see proc_pid_stat(5)
    return total


if __name__ == "__main__":
    raise SystemExit(main())
