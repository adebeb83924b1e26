"""What is held at NF4 and what is not; transformers' bitsandbytes quantizer, extended to the experts of 26B-A4B.

Stock bitsandbytes quantizes linear modules alone. The experts are 3-D parameters, 22.8 of 25.8 billion weights: left
in bf16 they take 46 GB, at NF4 12. Here they are quantized while they are read, one parameter at a time, or read from
a copy that holds them at NF4 already (g4trainer.quantize); g4trainer.experts computes with them.
"""

from typing import Any, ClassVar, Literal

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from g4trainer.vram import UNQUANTIZED_LINEARS

UNQUANTIZED = ("lm_head", *UNQUANTIZED_LINEARS)
"""Linear modules that stay in bf16, as suffixes of their names.

The head is tied to the embedding, and a 4-bit copy of it would be a broken layer. The routers of 26B-A4B choose experts
by rank: a small error in a score sends a token to another expert, and all routers together take 22 MB. The patch
embedder casts the pixels to the dtype of its own weights; at 4 bits it casts nothing, and the whole vision tower would
go on in fp32.

Embeddings, norms and the vision tower's position table are no linear modules and stay in bf16 too. Every other linear
layer, vision tower and projection included, and the experts of 26B-A4B are held at NF4 with double quantization.
"""
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
"""Parameters of a module of experts: (experts, outputs, inputs)."""
METHOD = "g4kit_nf4"
"""Under this name transformers finds the quantizer below."""
NF4_STATE = ".quant_state.bitsandbytes__nf4"
"""After a tensor's name in a safetensors file: what bitsandbytes needs to dequantize it."""
STATISTICS = (".nested_absmax", ".nested_quant_map", ".quant_map", ".absmax", NF4_STATE)
"""After a tensor's name in a safetensors file: all that belongs to a quantized tensor."""


@register_quantization_config(METHOD)
class Nf4Config(BitsAndBytesConfig):
    """NF4 with double quantization, and nothing to choose but the dtype of the matrix products."""

    def __init__(self, compute_dtype: str = "bfloat16", **_: Any) -> None:
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=list(UNQUANTIZED),
        )
        self.quant_method = METHOD


@register_quantizer(METHOD)
class Nf4Quantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' quantizer, to which a parameter of experts is one more weight."""

    serialized_names: ClassVar[dict[str, list[str]]] = {
        **Bnb4BitHfQuantizer.serialized_names,
        **{f"experts.{name}": [f"experts.{name}{suffix}" for suffix in ("", *STATISTICS)] for name in EXPERT_WEIGHTS},
    }

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **settings: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map, **settings)
        prepare_experts(model)

    def param_needs_quantization(self, model: Any, param_name: str, **settings: Any) -> bool:
        owner, _, name = param_name.rpartition(".")
        if isinstance(model.get_submodule(owner), Gemma4TextExperts):
            return name in EXPERT_WEIGHTS
        return bool(super().param_needs_quantization(model, param_name, **settings))

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": _Deserialize}


class _Deserialize(Bnb4bitDeserialize):
    def convert(self, input_dict: dict[str, Any], **context: Any) -> dict[str, Any]:
        name = next(iter(sorted(input_dict, key=len)))
        if not name.startswith("experts.") or len(input_dict) == 1:
            return dict(super().convert(input_dict, **context))
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        packed = tensors.pop(name)
        return {name: Params4bit.from_prequantized(packed, tensors, device=packed.device)}


def prepare_experts(model: torch.nn.Module) -> int:
    """Makes the experts' weights of a model on the meta device such that they are quantized when read; how many."""
    modules = [module for module in model.modules() if isinstance(module, Gemma4TextExperts)]
    for module in modules:
        module.source_cls = type(module)  # what transformers asks of every module that it quantizes
        for name in EXPERT_WEIGHTS:
            empty = getattr(module, name)
            setattr(module, name, Params4bit(empty.data, requires_grad=False, quant_type="nf4"))
    return len(modules)


def quantization_config(kind: Literal["nf4", "none"], dtype: torch.dtype) -> Nf4Config | None:
    """For `from_pretrained`; None leaves every weight as it is stored."""
    return None if kind == "none" else Nf4Config(str(dtype).removeprefix("torch."))


def quantized_weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Every parameter that is held at NF4, by its name."""
    return {name: parameter for name, parameter in model.named_parameters() if isinstance(parameter, Params4bit)}


def compute_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Has every weight dequantized to that dtype, whatever the dtype it was quantized from."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(parameter, Params4bit):
                parameter.quant_state.dtype = dtype
        if isinstance(module, Linear4bit):
            # bitsandbytes would repack weights for AVX-512 at the first evaluation. The repacked form rounds otherwise
            # on some processors than on others, and needs widths of multiples of 64.
            module.support_avx512bf16_for_cpu = False
