"""Images as bytes are, once they are numbers, what Gemma 4's own image processor makes of them, to the bit."""

from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.gemma4.image_processing_gemma4 import Gemma4ImageProcessor

from g4trainer.pixels import as_numbers, patches_of
from trainer.making import collator, examples, picture

SIZES = ((500, 375), (375, 500), (1, 1), (8, 8), (3, 900), (10_000, 10), (640, 427), (912, 672), (1333, 1000))


@pytest.mark.parametrize("soft_tokens", [70, 280])
def test_patches_are_those_of_the_image_processor(soft_tokens: int) -> None:
    processor = Gemma4ImageProcessor()
    images = [picture(*size, seed=index) for index, size in enumerate(SIZES)]
    stock = processor(images, max_soft_tokens=soft_tokens, return_tensors="pt")
    made = patches_of(processor, images, soft_tokens)
    assert made.values.dtype == torch.uint8
    assert torch.equal(as_numbers(made.values), stock["pixel_values"])
    assert torch.equal(made.positions, stock["image_position_ids"])
    assert made.soft_tokens == [int(count) for count in stock["num_soft_tokens_per_image"]]


@pytest.mark.parametrize(
    "settings",
    [
        {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3},
        {"resample": Image.Resampling.BILINEAR},
        {"rescale_factor": 1 / 127.5},
    ],
)
def test_a_processor_of_other_settings_has_its_way(settings: dict[str, Any]) -> None:
    processor = Gemma4ImageProcessor(**settings)
    image = picture(64, 48, seed=1)
    stock = processor([image], max_soft_tokens=70, return_tensors="pt")
    made = patches_of(processor, [image], 70)
    assert torch.equal(as_numbers(made.values), stock["pixel_values"])
    assert not torch.equal(made.values, patches_of(Gemma4ImageProcessor(), [image], 70).values)


def test_a_batch_of_bytes_is_the_batch_of_numbers() -> None:
    samples = examples()
    numbers, in_bytes = (collator(pixels_as_bytes=choice)(samples) for choice in (False, True))
    assert (numbers["pixel_values"].dtype, in_bytes["pixel_values"].dtype) == (torch.float32, torch.uint8)
    in_bytes["pixel_values"] = as_numbers(in_bytes["pixel_values"])
    assert all(torch.equal(numbers[name], in_bytes[name]) for name in numbers)
