"""Images placed on the device: outputs and gradients of transformers' forward pass, and nothing asked of the host."""

from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForMultimodalLM
from transformers.models.gemma4.modeling_gemma4 import Gemma4Model, Gemma4VisionPooler

from g4trainer import attention, experts, tiny
from g4trainer.dataset import Example
from g4trainer.forward import never_wait
from g4trainer.model import attach_lora
from trainer.conftest import Folders
from trainer.making import adapted_model, collator, encoded, fill_adapters, inputs_of, picture, relative_error, settings

SIZES = get_args(tiny.Like)


def images_of_all_sizes() -> list[Example]:
    """Samples of one, two and three images, wide, high and small: soft tokens and padding are others in each."""
    shapes = ([(20, 16)], [(300, 7), (9, 200)], [(50, 50), (4, 4), (120, 90)])
    return [
        Example(f"train/{row}", tuple(encoded(picture(*size, seed=row)) for size in sizes), "Which one?", "seven")
        for row, sizes in enumerate(shapes)
    ]


def as_published(model: Any) -> Any:
    """The same model with transformers' own forward pass."""
    for module in model.modules():
        if isinstance(module, Gemma4VisionPooler | Gemma4Model):
            module.__class__ = Gemma4VisionPooler if isinstance(module, Gemma4VisionPooler) else Gemma4Model
    return model


def logits_and_gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(**inputs_of(batch), use_cache=False).logits
    logits.square().mean().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return logits.detach(), gradients


@pytest.mark.parametrize("like", SIZES)
def test_nothing_changes(like: tiny.Like, tiny_folder: Folders) -> None:
    model = adapted_model(tiny_folder(like))
    fill_adapters(model)
    batch = collator(like)(images_of_all_sizes())
    counts = (batch["image_position_ids"] != -1).all(dim=-1).sum(dim=-1)
    assert len(counts.unique()) > 2, "images must differ in what they fill of their budget"
    logits, gradients = logits_and_gradients(model, batch)
    expected_logits, expected_gradients = logits_and_gradients(as_published(model), batch)
    assert relative_error(logits, expected_logits) < 1e-6
    assert relative_error(gradients, expected_gradients) < 1e-5


def test_generation_is_left_as_it_is(tiny_folder: Folders) -> None:
    model = adapted_model(tiny_folder("E2B")).eval()
    batch = inputs_of(collator()(images_of_all_sizes()))
    with torch.inference_mode():
        cached = model(**batch, use_cache=True)
        expected = as_published(model)(**batch, use_cache=True)
    assert torch.equal(cached.logits, expected.logits)
    assert cached.past_key_values.get_seq_length() == batch["input_ids"].shape[1]


def test_text_alone_needs_no_image(tiny_folder: Folders) -> None:
    model = adapted_model(tiny_folder("E2B")).eval()
    ids = torch.arange(40, 60)[None]
    with torch.inference_mode():
        assert model(input_ids=ids, use_cache=False).logits.shape[:2] == (1, 20)


def test_more_soft_tokens_than_places_are_an_error(tiny_folder: Folders) -> None:
    model = adapted_model(tiny_folder("E2B"))
    batch = inputs_of(collator()(images_of_all_sizes()))
    image = batch["input_ids"] == collator().image_id
    batch["input_ids"][0, image[0].nonzero()[0]] = 40
    with pytest.raises(RuntimeError):
        model(**batch, use_cache=False)


@pytest.mark.parametrize("like", SIZES)
def test_no_pass_asks_for_a_number(like: tiny.Like) -> None:
    """On the meta device there are none: whatever waits for the device on a GPU raises here, backward too."""
    model = without_numbers(like)
    batch = {name: tensor.to("meta") for name, tensor in inputs_of(collator(like)(images_of_all_sizes())).items()}
    never_wait(model)
    model(**batch, use_cache=False).logits.sum().backward()
    adapters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert any("vision_tower" in name for name, _ in adapters)
    assert all(p.grad is not None for _, p in adapters)


def test_the_published_pass_does() -> None:
    """So the test above can fail."""
    model = without_numbers("31B")
    batch = {name: tensor.to("meta") for name, tensor in inputs_of(collator("31B")(images_of_all_sizes())).items()}
    with pytest.raises((RuntimeError, NotImplementedError), match=r"nonzero|meta"):
        model(**batch, use_cache=False)


def without_numbers(like: tiny.Like) -> Any:
    """A tiny model with adapters on the meta device, its attention as on a GPU."""
    config = tiny.make_config(like, tiny.make_tokenizer())
    config._experts_implementation = experts.register()
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(config, dtype=torch.bfloat16)
        model.requires_grad_(False)
        model.set_attn_implementation({"text_config": "eager", "vision_config": attention.register()})
        return attach_lora(model, settings(), base_model="tiny-gemma4").train()
