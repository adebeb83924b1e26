"""A forward pass that never waits for the device, as training needs it.

transformers' own cuts the padding off what the vision tower returns, counts on the host what is left of each image, and
looks for the places of image tokens: each of these waits until the device has done all that it was asked before, and
masked_scatter does so in the backward pass once more. Meanwhile no kernel is started, and what the host had got ahead
is gone. Here the padding stays, and each soft token finds its place by an index that is made on the device. Embeddings
that are kept on the host (g4trainer.host_embedding) still wait to be told the tokens.
"""

import functools
from typing import Any

import torch
from transformers.models.gemma4.modeling_gemma4 import Gemma4Model, Gemma4VisionPooler


def never_wait(model: torch.nn.Module) -> None:
    """Makes a Gemma 4 place its images on the device where no cache is used: with one, it generates, and stays as is.

    Outputs and gradients are those of transformers' forward pass (the tests compare them).
    """
    for module in list(model.modules()):
        if isinstance(module, Gemma4VisionPooler):
            module.__class__ = _Pooler
        elif isinstance(module, Gemma4Model):
            module.__class__ = _placing(module.__class__)


class _Pooler(Gemma4VisionPooler):
    """Pools patches to soft tokens; where `keeps_padding`, the vision tower's cut of the padding takes them all."""

    keeps_padding = False

    def forward(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, Any]:
        """Soft tokens (images, slots, hidden), and an index of those that are none of padding."""
        tokens, valid = super().forward(*arguments, **options)
        return tokens, ... if self.keeps_padding else valid


@functools.cache
def _placing(kind: Any) -> Any:
    """A class of models as `kind`, which may be one of FSDP2's, with images placed on the device."""

    def forward(
        self: Any,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        *,
        image_position_ids: Any = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Any:
        if input_ids is None or pixel_values is None or use_cache or past_key_values is not None:
            cached = {"use_cache": use_cache, "past_key_values": past_key_values}
            images = {"pixel_values": pixel_values, "image_position_ids": image_position_ids}
            return kind.forward(self, input_ids=input_ids, **images, **cached, **options)
        image, video, audio = self.get_placeholder_mask(input_ids)
        soft = image | video | audio
        words = torch.where(soft, self.config.text_config.pad_token_id, input_ids)
        embeddings = self.get_input_embeddings()(words)  # (batch, sequence, hidden)
        features, counts = _soft_tokens(self, pixel_values, image_position_ids)
        options["per_layer_inputs"] = _per_layer_inputs(self, words, embeddings, soft)
        options["inputs_embeds"] = _placed(embeddings, image, features.to(embeddings.dtype), counts)
        return kind.forward(self, use_cache=use_cache, **options)

    return type(kind.__name__, (kind,), {"forward": forward})


def _per_layer_inputs(
    model: Any, words: torch.Tensor, embeddings: torch.Tensor, soft: torch.Tensor
) -> torch.Tensor | None:
    """What every layer of E2B and E4B adds, of the tokens alone; None for the other sizes."""
    text = model.config.text_config
    if not text.hidden_size_per_layer_input:
        return None
    padding = model.language_model.embed_tokens.weight[text.pad_token_id]
    made: torch.Tensor = model.language_model.get_per_layer_inputs(
        words, torch.where(soft[..., None], padding, embeddings)
    )
    return made


def _soft_tokens(model: Any, pixel_values: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of all images with their padding (images, slots, hidden), and how many each has (images,)."""
    tower = model.vision_tower
    tower.pooler.keeps_padding = True
    try:
        encoded = tower(pixel_values=pixel_values, pixel_position_ids=positions, return_dict=True).last_hidden_state
    finally:
        tower.pooler.keeps_padding = False
    patches = (positions != -1).all(dim=-1).sum(dim=-1)
    return model.embed_vision(inputs_embeds=encoded), patches // tower.config.pooling_kernel_size**2


def _placed(
    embeddings: torch.Tensor, image: torch.Tensor, features: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Embeddings (batch, sequence, hidden) with the images' soft tokens, in order, where `image` is true.

    features: (images, slots, hidden), of each image the first `counts` real. Padding goes to a row that is dropped.
    """
    torch._assert_async(image.sum() == counts.sum())
    slots = features.shape[1]
    slot = torch.arange(slots, device=counts.device)
    order = torch.argsort(image.flatten(), descending=True, stable=True)  # places of image tokens come first
    numbers = (counts.cumsum(0) - counts)[:, None] + slot  # (images, slots): which soft token of the batch it is
    places = torch.where(slot < counts[:, None], order[numbers.clamp(max=len(order) - 1)], len(order))
    rows = torch.cat([embeddings.flatten(0, 1), embeddings.new_zeros(1, embeddings.shape[-1])])
    return rows.index_copy(0, places.flatten(), features.flatten(0, 1))[:-1].view_as(embeddings)
