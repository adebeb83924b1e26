"""NF4 weights back to bf16 in one Triton kernel, their statistics included, for compiled layers and for experts.

bitsandbytes takes two operators for a weight with double quantization, each called through Python: over a step of the
31B that is some 2,400 calls, for which the GPU waits (benchmarks/README.md). A compiled layer launches this kernel
itself. The values are bitsandbytes' to the bit; outside compiled layers its own code goes on to run, which for a few
rows has faster products.
"""

import copy
import importlib.util
import math
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState

from g4trainer.vram import NF4_BLOCK, STATISTICS_BLOCK

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton
    import triton.language as tl

SCALES_A_PROGRAM = 64
"""Of 16 to 128, the fastest on an H200: 76 us for 21,504 x 5,376 weights, where bitsandbytes takes 139."""


class CompiledLinear4bit(bitsandbytes.nn.Linear4bit):
    """An NF4 layer that dequantizes with the kernel where it is compiled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., inputs). Returns (..., outputs) in the dtype of x."""
        if not torch.compiler.is_compiling():
            outside: torch.Tensor = super().forward(x)
            return outside
        state = self.weight.quant_state
        result: torch.Tensor = _Product.apply(x.to(self.compute_dtype), tuple(state.shape), *tensors_of(self.weight))
        return result.to(x.dtype)


def use_in_compiled_layers(model: torch.nn.Module) -> int:
    """Makes every NF4 layer on CUDA take the kernel where it is compiled; returns how many do."""
    layers = [module for module in model.modules() if _fits(module)] if HAS_TRITON else []
    for layer in layers:
        layer.__class__ = CompiledLinear4bit
    return len(layers)


def tensors_of(weight: Any) -> tuple[torch.Tensor, ...]:
    """Of a bitsandbytes Params4bit, the tensors that `dequantize` takes, in its order."""
    state = weight.quant_state
    return weight, state.absmax, state.state2.code, state.state2.absmax, state.offset, state.code


def whole(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """A weight in the dtype and shape of its state, by bitsandbytes, on any device.

    Taken for one row: on CPUs with AVX-512, bitsandbytes 0.50.2 gives the weights of rows that end within a block of
    scales another block's scale, as in the vision tower's down_proj of 26B-A4B and 31B, with 4,304 inputs.
    """
    one_row = copy.copy(state)
    one_row.shape = torch.Size([1, math.prod(state.shape)])
    weights: torch.Tensor = bitsandbytes.functional.dequantize_4bit(packed, one_row)
    return weights.view(state.shape)


def dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    scale_code: torch.Tensor,
    scale_scales: torch.Tensor,
    offset: torch.Tensor,
    code: torch.Tensor,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    again: bool = False,
) -> torch.Tensor:
    """The weights as a tensor of that shape, from what bitsandbytes' QuantState holds; off CUDA by bitsandbytes.

    packed: (weights / 2, 1) uint8, the first of two weights in the upper half of a byte.
    scales: one uint8 for NF4_BLOCK weights, an index into scale_code (256,) fp32.
    scale_scales: one fp32 for STATISTICS_BLOCK scales; offset: fp32, added to each scale. code: (16,) fp32.
    again: whether it is the backward pass's call: it tells the compiler that the two are not one.
    """
    if not (packed.is_cuda and HAS_TRITON):
        nested = QuantState(scale_scales, blocksize=STATISTICS_BLOCK, code=scale_code, dtype=torch.float32)
        state = QuantState(scales, torch.Size(shape), code, NF4_BLOCK, "nf4", dtype, offset, nested)
        return whole(packed, state)
    weights = torch.empty(shape, dtype=dtype, device=packed.device)
    count = scales.numel()
    grid = (triton.cdiv(count, SCALES_A_PROGRAM),)
    _dequantize[grid](
        packed, scales, scale_code, scale_scales, offset, code, weights, count, packed.numel(), SCALES_A_PROGRAM, again
    )
    return weights


class _Product(torch.autograd.Function):
    """x (..., inputs) times the transpose of a weight (outputs, inputs) held at NF4; the weight has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: tuple[int, ...], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.shape = shape
        return x @ dequantize(*tensors, shape=shape, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight = dequantize(*ctx.saved_tensors, shape=ctx.shape, dtype=gradient.dtype, again=True)
        return (gradient @ weight, *[None] * 7)


def _fits(module: torch.nn.Module) -> bool:
    """Whether it is a layer as g4trainer.quantization makes them, on a GPU: nested NF4 without a bias."""
    if not isinstance(module, bitsandbytes.nn.Linear4bit) or not module.weight.is_cuda or module.bias is not None:
        return False
    state = module.weight.quant_state
    return bool(state.nested and state.blocksize == NF4_BLOCK and state.state2.blocksize == STATISTICS_BLOCK)


if HAS_TRITON:

    @triton.jit
    def _dequantize(  # type: ignore[no-untyped-def]
        packed,
        scales,
        scale_code,
        scale_scales,
        offset,
        code,
        weights,
        count,
        size,
        ROWS: tl.constexpr,  # noqa: N803 Triton's constants are upper-case
        again: tl.constexpr,
    ):
        """A program dequantizes the weights of ROWS scales."""
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = rows < count
        index = tl.load(scales + rows, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scale_code + index) * tl.load(scale_scales + rows // 256, mask=inside) + tl.load(offset)
        start = rows.to(tl.int64)[:, None]
        places = start * 32 + tl.arange(0, 32)[None, :]
        pairs = tl.load(packed + places, mask=places < size, other=0).to(tl.int32)
        first = tl.load(code + (pairs >> 4)) * scale[:, None]
        second = tl.load(code + (pairs & 15)) * scale[:, None]
        outputs = start * 64 + tl.arange(0, 64)[None, :]
        values = tl.interleave(first, second).to(weights.dtype.element_ty)
        tl.store(weights + outputs, values, mask=outputs < 2 * size)
