"""The attention kernels, chosen by measurement (benchmarks/README.md).

In the language model, head dimensions of 256 and 512 with a mask leave scaled_dot_product_attention to a slow generic
kernel; up to about a thousand tokens plain matrix products, compiled with the layer, are faster.

In the vision tower every image is padded to the same number of patches, so scaled_dot_product_attention needs a mask,
and with a mask it falls back to a kernel several times slower than Flash Attention. Here the padded batch is seen as
one long row of sequences: of each image first its patches, then its padding. Flash Attention for sequences of
different lengths takes that as it is; no mask, no gathering, no synchronization with the host.
"""

import inspect
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

from g4trainer.vram import AttentionSetting, attention_for

VARLEN = "g4kit_varlen"
HAS_SCALE = "scale" in inspect.signature(varlen_attn).parameters


def choose_attention(model: Any, setting: AttentionSetting, *, tokens: int, device: torch.device) -> dict[str, str]:
    """Sets the kernels of a Gemma 4 and returns their names by part: `text_config`, `vision_config`.

    setting: `model.attn_implementation` of the recipe. tokens: length of a sample.
    """
    if device.type == "cuda":
        chosen = {"text_config": attention_for(setting, tokens), "vision_config": register()}
    else:
        chosen = {"text_config": "sdpa" if setting == "auto" else setting, "vision_config": "sdpa"}
    model.set_attn_implementation(chosen)
    return chosen


def register() -> str:
    """Makes the kernel known to transformers; returns the name to set as `_attn_implementation`."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, padding_mask)
    return VARLEN


def padding_mask(*, attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
    """The padding mask as it came: (batch, sequence) bool, True where valid."""
    return attention_mask


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Bidirectional attention over the valid part of each row; padding comes last and attends to itself.

    query, key, value: (batch, heads, sequence, head_dim) bf16 on CUDA.
    attention_mask: (batch, sequence) bool, True for valid positions, which come first; None where all are.
    Returns (batch, sequence, heads, head_dim), and None for the weights.
    """
    batch, heads, length, width = query.shape
    rows = [tensor.transpose(1, 2).reshape(batch * length, heads, width) for tensor in (query, key, value)]
    starts = sequence_starts(attention_mask, batch, length, query.device)
    options: dict[str, Any] = {}
    if scaling is not None:
        if HAS_SCALE:
            options["scale"] = scaling
        else:
            rows[0] = rows[0] * (scaling * width**0.5)
    output = varlen_attn(*rows, starts, starts, length, length, **options)
    return output.view(batch, length, heads, width), None


def sequence_starts(mask: torch.Tensor | None, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Where each sequence begins in the flattened batch, and its end: (2 * batch + 1,) int32.

    Of each row first its valid positions, then its padding; the second may be empty.
    """
    offsets = torch.arange(batch, device=device, dtype=torch.int32) * length
    valid = torch.full_like(offsets, length) if mask is None else mask.sum(dim=1, dtype=torch.int32)
    pairs = torch.stack([offsets, offsets + valid], dim=1).flatten()
    return torch.cat([pairs, torch.full_like(pairs[:1], batch * length)])
