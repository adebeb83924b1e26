"""The per-layer embeddings of E2B and E4B on the host: 4.7 and 5.6 GB that a small card has better uses for.

A token's row is 8,960 or 10,752 numbers of a table with 262,144 rows: a forward pass reads a thousandth of it. The rows
are looked up on the host and copied to the card, once a micro-batch; on an H200 that cost at most 3 % of a step of the
E4B (benchmarks/README.md).
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextScaledWordEmbedding

from g4trainer import recipe as recipes
from g4trainer import vram


class HostEmbedding(Gemma4TextScaledWordEmbedding):
    """An embedding whose table stays in host memory wherever the model goes."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids: (batch, sequence) int64, on any device. Returns (batch, sequence, width) on that device."""
        rows: torch.Tensor = super().forward(input_ids.cpu())
        return rows.to(input_ids.device, non_blocking=True)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        return self


def embeddings_on_host(settings: recipes.Model, device: torch.device) -> bool:
    """What the recipe says; by default, whether the card is small."""
    return vram.embeddings_on_host(settings.per_layer_embeddings, card_bytes(device))


def card_bytes(device: torch.device) -> int | None:
    """Memory of the device in all; None where it is no card."""
    return int(torch.cuda.mem_get_info()[1]) if device.type == "cuda" else None


def keep_on_host(model: torch.nn.Module) -> int:
    """Moves the per-layer embeddings of a model to the host; returns their bytes, 0 where it has none."""
    table = model.get_submodule("model.language_model")._modules.get("embed_tokens_per_layer")
    if table is None:
        return 0
    table.to("cpu")
    table.__class__ = HostEmbedding
    return int(table.weight.nbytes)
