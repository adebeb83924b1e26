"""Compilation of layers one by one, so that all layers of a kind share their graphs.

In training a whole layer is compiled, and checkpointing stays outside of it: seen from inside, the compiler would keep
half of what was to be computed again. In generation the vision layers are compiled too, but of the text layers only the
parts that know nothing of the cache: a cache is longer after every token, and another object in every layer, and each
would be compiled anew.
"""

import functools
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4RMSNorm,
    Gemma4TextDecoderLayer,
    Gemma4TextMLP,
    Gemma4VisionEncoderLayer,
)

from g4trainer import nf4

COMPILED_ON = ("cuda",)
"""Devices on which compiling pays."""
COMPILE_FROM_PARAMETERS = 1_000_000_000
"""Smaller models train in less time than compiling them takes: half a minute for each shape of a batch."""
RECOMPILE_LIMIT = 128
"""Graphs that the layers of a model may have: by kind of layer, length and batch. torch's own limit of 8 would leave
the rest uncompiled without a word."""
BACKEND = "inductor"
CACHE_KEY_TAG = "grouped products as traced"
"""Keeps out graphs on disk that were compiled without `_keep_layouts_of_grouped_products`: torch's own key for them
does not tell."""

log = logging.getLogger(__name__)


def compile_layers(model: torch.nn.Module, *, backend: str | None = None) -> int:
    """Compiles each decoder and vision layer by itself, so that all share one graph; returns how many.

    Layers whose weights processes share (FSDP2) are gathered before their graph begins, and let go of after it.
    Where there is no C compiler, which Triton needs, nothing is compiled, and a warning says so.
    backend: of torch.compile; None takes BACKEND.
    """
    backend = backend or BACKEND
    if backend == "inductor" and not (os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")):
        log.warning("no C compiler on this machine: the layers are not compiled, and training is slower")
        return 0
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    if backend == "inductor":
        _keep_layouts_of_grouped_products()
    nf4.use_in_compiled_layers(model)
    layers = [
        module for module in model.modules() if isinstance(module, Gemma4TextDecoderLayer | Gemma4VisionEncoderLayer)
    ]
    for layer in layers:
        layer.__class__ = _compiled(layer.__class__, backend)
    log.info("%d layers are compiled, each kind where it is first used", len(layers))
    return len(layers)


@contextmanager
def generating(model: torch.nn.Module) -> Iterator[None]:
    """Makes compiled text layers ready for a cache, and takes that back; uncompiled models stay as they are.

    Without a backward pass to keep scores for, scaled_dot_product_attention is the faster one (benchmarks/README.md).
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Gemma4TextDecoderLayer) and is_compiled(layer)]
    if not layers:
        yield
        return
    configuration: Any = layers[0].config
    attention = configuration._attn_implementation
    parts = [part for layer in layers for part in layer.modules() if isinstance(part, Gemma4TextMLP | Gemma4RMSNorm)]
    try:
        configuration._attn_implementation = "sdpa"
        for layer in layers:
            layer.in_parts = True
        for part in parts:
            part.compile(dynamic=False, backend=BACKEND)
        yield
    finally:
        configuration._attn_implementation = attention
        for part in parts:
            part._compiled_call_impl = None
        for layer in layers:
            layer.in_parts = False


def is_compiled(layer: torch.nn.Module) -> bool:
    """Whether a layer is one of those that `compile_layers` made."""
    return hasattr(layer, "in_parts")


def _keep_layouts_of_grouped_products() -> None:
    """Makes inductor hand every grouped product, of both passes, its operands in the layouts they were traced with.

    By itself (torch 2.13, `require_dense`) it makes sure that one stride of an operand is 1, whichever; the product
    needs one of the last two to be. A contiguous copy of a permuted tensor, as experts.py makes of lora_B, would be
    laid out in the order in which it is read, and refused when the layer runs.
    """
    # Not above: it takes over a second, and only a run that compiles needs it.
    from torch._inductor.lowering import add_layout_constraint, constrain_to_fx_strides

    add_layout_constraint(torch.ops.aten._grouped_mm.default, constrain_to_fx_strides)
    torch.compiler.config.cache_key_tag = CACHE_KEY_TAG


@functools.cache
def _compiled(kind: Any, backend: str) -> Any:
    """A class of layers whose forward pass is compiled; transformers puts checkpointing around that."""
    if hasattr(kind, "in_parts"):
        kind = kind.__mro__[1]
    compiled = torch.compile(kind.forward, dynamic=False, backend=backend)

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        return (kind.forward if self.in_parts else compiled)(self, *arguments, **options)

    return type(kind.__name__, (kind,), {"forward": forward, "in_parts": False})
