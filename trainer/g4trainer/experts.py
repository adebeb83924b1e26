"""Mixture-of-experts layers whose weights are held at NF4, or have LoRA of their own, or both.

transformers' own grouped product would keep each layer's experts in bf16 for the backward pass, 1.5 GB of them in
26B-A4B. Here both passes dequantize them for themselves, and only the packed weights are kept. PEFT would add what LoRA
changes to the weights, of all 128 experts, on every call; here the rows pass the two factors beside the weight.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Params4bit
from peft.tuners.lora import ParamWrapper
from transformers.integrations.moe import ExpertsInterface, _grouped_mm, grouped_mm_experts_forward

from g4trainer import nf4

NF4_EXPERTS = "g4kit_nf4_experts"
ALIGNMENT_BYTES = 16
"""What each row of a matrix must be a multiple of in a grouped product on a GPU."""


class Factors(NamedTuple):
    """LoRA on a weight of experts (experts, outputs, inputs): `scaling * up @ down`."""

    down: torch.Tensor
    """(experts, r, inputs): lora_A."""
    up: torch.Tensor
    """(experts, outputs, r): lora_B."""
    scaling: float


def register() -> str:
    """Makes it known to transformers; returns the name to set as the implementation of the experts."""
    ExpertsInterface.register(NF4_EXPERTS, forward)
    return NF4_EXPERTS


def forward(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    lora: Mapping[str, Factors] | None = None,
) -> torch.Tensor:
    """The weighted sum of what each token's experts say.

    hidden_states: (tokens, hidden). top_k_index, top_k_weights: (tokens, experts a token). Returns (tokens, hidden).
    lora: by the name of the weight that is adapted.
    """
    lora = lora or {}
    if not lora and not isinstance(module.gate_up_proj, Params4bit):
        result: torch.Tensor = grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return result
    tokens, chosen = top_k_index.shape
    expert, order = torch.sort(top_k_index.reshape(-1))  # (tokens x chosen,): rows of one expert stand together
    counts = torch.histc(expert.float(), bins=module.num_experts, min=0, max=module.num_experts - 1)
    ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
    rows = hidden_states[order // chosen]
    inner = module._apply_gate(_product(rows, module.gate_up_proj, ends, lora.get("gate_up_proj")))
    outputs = _product(inner, module.down_proj, ends, lora.get("down_proj"))
    weighted = outputs * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return weighted[places].view(tokens, chosen, -1).sum(dim=1).to(hidden_states.dtype)


class ExpertsLora(ParamWrapper):
    """LoRA on one 3-D weight of experts: PEFT's wrapper, its tensors and their names, with another forward pass.

    PEFT's own takes a packed weight's shape for the weight's, and hands the experts a changed weight.
    """

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """x: (tokens, hidden), and what else `forward` above takes."""
        if self.disable_adapters or self.merged:
            result: torch.Tensor = super().forward(x, *args, **options)
        else:
            [adapter] = self.active_adapters
            lora = {**options.pop("lora", {}), self.parameter_name: self.factors(adapter)}
            result = self.base_layer(x, *args, lora=lora, **options)
        return result

    def factors(self, adapter: str) -> Factors:
        """Views of PEFT's tensors: lora_A (experts x r, inputs), lora_B (outputs, r x experts)."""
        down = self.lora_A[adapter].weight.unflatten(0, (self.num_experts, -1))
        up = self.lora_B[adapter].weight.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1)
        return Factors(down, up, self.scaling[adapter])

    def get_delta_weight(self, adapter_name: str, *_: Any, **__: Any) -> torch.Tensor:
        """What the adapter adds to the weight, (experts, outputs, inputs) in the adapter's own dtype, where it is."""
        down, up, scaling = self.factors(adapter_name)
        return torch.bmm(up, down) * scaling

    def _get_in_out_features(self, module: torch.nn.Module) -> tuple[int, int]:
        weight = self.get_param()
        state = getattr(weight, "quant_state", None)
        self.num_experts, outputs, inputs = weight.shape if state is None else state.shape
        self._param_ndim = 3
        return outputs, inputs  # PEFT swaps them: it expects (experts, inputs, outputs) and is told otherwise


ExpertsLora.__name__ = ParamWrapper.__name__  # by it PEFT knows, in `_inject_parameters`, what it may wrap once more


def _product(rows: torch.Tensor, weight: Any, ends: torch.Tensor, lora: Factors | None) -> torch.Tensor:
    """Each row times its expert's weight, and its adapter. rows: (rows, inputs). Returns (rows, outputs)."""
    if isinstance(weight, Params4bit):
        state = weight.quant_state
        base = _GroupedProduct.apply(rows.to(state.dtype), ends, tuple(state.shape), *nf4.tensors_of(weight))
    else:
        base = _grouped_mm(rows, weight.transpose(-2, -1), ends)
    if lora is None:
        return base
    down, up = _aligned(lora, base.dtype)
    narrow = _grouped_mm(rows, down.transpose(-2, -1), ends)  # (rows, r)
    return base + _grouped_mm(narrow, up.transpose(-2, -1), ends) * lora.scaling


def _aligned(lora: Factors, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors in the dtype of the product, with zeros up to a rank that a grouped product takes."""
    down, up = lora.down.to(dtype), lora.up.to(dtype).contiguous()
    missing = -up.shape[-1] % (ALIGNMENT_BYTES // dtype.itemsize)
    return (F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing))) if missing else (down, up)


class _GroupedProduct(torch.autograd.Function):
    """Each group of rows times the transpose of its expert's weight; the weights have no gradient."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, ends: torch.Tensor, shape: tuple[int, ...], *tensors: torch.Tensor
    ) -> torch.Tensor:
        """rows: (rows, inputs), sorted by expert. ends: (experts,) int32, where each one's rows end.

        tensors: of the weight (experts, outputs, inputs), see nf4.tensors_of.
        """
        ctx.save_for_backward(ends, *tensors)
        ctx.shape = shape
        weight = nf4.dequantize(*tensors, shape=shape, dtype=rows.dtype)
        return _grouped_mm(rows, weight.transpose(-2, -1), ends)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ends, *tensors = ctx.saved_tensors
        weight = nf4.dequantize(*tensors, shape=ctx.shape, dtype=gradient.dtype, again=True)
        return (_grouped_mm(gradient.contiguous(), weight, ends), *[None] * (2 + len(tensors)))
