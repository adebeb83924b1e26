"""Images become patches: what Gemma 4's image processor makes, as bytes, for the device to turn into numbers.

The processor rescales pixels to numbers from 0 to 1 and then cuts the image into patches: four bytes a pixel are moved
about, sent from a worker to the trainer, pinned and copied to the GPU. Here the pixels stay bytes until they are on the
device, and keep the order of the file, colours last, in which a row of a patch is one piece of memory. The numbers are
the processor's to the bit (the tests compare them); benchmarks/README.md has the times.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms
from transformers.models.gemma4.image_processing_gemma4 import Gemma4ImageProcessor, get_aspect_ratio_preserving_size

RESCALE_FACTOR = 1 / 255


class Patches(NamedTuple):
    """Of several images."""

    values: torch.Tensor
    """(images, patches, 3 * patch_size**2) uint8, 0 where padded; float32 where a processor does more than rescale."""
    positions: torch.Tensor
    """(images, patches, 2) int64: column and row of each patch, -1 where padded."""
    soft_tokens: list[int]
    """Of each image."""


def patches_of(processor: Any, images: Sequence[Image.Image], max_soft_tokens: int) -> Patches:
    """What an image processor makes of RGB images, uint8 where it only resizes and rescales."""
    if not _only_rescales(processor):
        made = processor(list(images), max_soft_tokens=max_soft_tokens, return_tensors="pt")
        counts = [int(count) for count in made["num_soft_tokens_per_image"]]
        return Patches(made["pixel_values"], made["image_position_ids"], counts)
    side, pooling = processor.patch_size, processor.pooling_kernel_size
    budget = max_soft_tokens * pooling**2
    values = torch.zeros(len(images), budget, 3 * side**2, dtype=torch.uint8)
    positions = torch.empty(len(images), budget, 2, dtype=torch.int64)
    counts = []
    for index, image in enumerate(images):
        height, width = get_aspect_ratio_preserving_size(image.height, image.width, side, budget, pooling)
        rows, columns = height // side, width // side
        pixels = _resized(image, height, width)
        pieces = pixels.reshape(rows, side, columns, side * 3).permute(0, 2, 1, 3)  # each row of a patch in one piece
        values[index, : rows * columns].view(rows, columns, side, side * 3).copy_(pieces)
        positions[index] = _grid(rows, columns, budget)
        counts.append(rows * columns // pooling**2)
    return Patches(values, positions, counts)


def as_numbers(values: torch.Tensor) -> torch.Tensor:
    """Patches as the model takes them: float32 from 0 to 1. Those that are numbers already stay as they are."""
    return values * RESCALE_FACTOR if values.dtype == torch.uint8 else values


def _only_rescales(processor: Any) -> bool:
    """Whether it is the processor of the published sizes, with their settings."""
    return (
        type(processor) is Gemma4ImageProcessor
        and processor.do_resize
        and processor.resample == Image.Resampling.BICUBIC
        and processor.do_rescale
        and processor.rescale_factor == RESCALE_FACTOR
        and not processor.do_normalize
    )


def _resized(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """(height, width, 3) uint8, by the kernel that the processor takes."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # colours first by name, last in memory
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.resize(pixels, [height, width], interpolation=bicubic, antialias=True).permute(1, 2, 0)


@functools.lru_cache(maxsize=64)
def _grid(rows: int, columns: int, budget: int) -> torch.Tensor:
    """Column and row of each patch, row by row, then -1 up to the budget."""
    grid = torch.full((budget, 2), -1)
    grid[: rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
    return grid
