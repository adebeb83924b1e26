"""The base model at NF4 with LoRA on it, and the proof that LoRA is where it should be."""

import warnings
from pathlib import Path
from typing import Any, Literal

import bitsandbytes
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor, BitsAndBytesConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4ClippableLinear

from g4trainer import recipe as recipes
from g4trainer.exits import ModelError
from g4trainer.rundir import read_json

UNQUANTIZED = ("lm_head",)
"""Linear modules that stay in bf16: the head is tied to the embedding, and a 4-bit copy of it would be a broken layer.

Embeddings, norms, the vision tower's position table and the 3-D expert weights are no linear modules: bitsandbytes
leaves them in bf16. Every other linear layer, vision tower and projection included, is held at NF4.
"""
ALL_LINEAR = "all-linear"
ADAPTER = "default"


def load_processor(folder: Path) -> Any:
    """The Gemma4Processor of a staged model. Raises ModelError where the folder holds another or an incomplete one."""
    check_architecture(folder)
    try:
        return AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(f"{folder}: the processor cannot be loaded: {error}") from error


def load_base(folder: Path, settings: recipes.Model, *, device: torch.device) -> Any:
    """The frozen base model: linear layers at NF4 with double quantization, computing in bf16 (fp32 on the CPU).

    The audio tower is left out: no task here hears. Raises ModelError where the folder is no complete Gemma 4.
    """
    check_architecture(folder)
    dtype = compute_dtype(device)
    # With a mask at head_dim 256 its backward pass has given NaN on compute capability 9.0.
    torch.backends.cuda.enable_cudnn_sdp(False)
    config = AutoConfig.from_pretrained(folder)
    config.audio_config = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*were not used when initializing.*")
            model = AutoModelForMultimodalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                device_map={"": device},
                attn_implementation=settings.attn_implementation,
                quantization_config=_quantization(settings.quantization, dtype),
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise ModelError(f"{folder}: the weights cannot be loaded: {error}") from error
    model.requires_grad_(False)
    model.config.use_cache = False
    if device.type == "cpu":
        _keep_weights_unpacked(model)
    return model


def attach_lora(model: Any, settings: recipes.Lora, *, base_model: str) -> PeftModel:
    """Puts fp32 adapters on the base model and verifies where they are.

    base_model: the name that adapter_config.json gives, never a path of this machine.
    Raises ModelError where the targets cannot be adapted, or are not all.
    """
    expected = expected_targets(model) if settings.target_modules == ALL_LINEAR else None
    try:
        adapted = get_peft_model(model, LoraConfig(**recipes.lora_config(settings, base_model=base_model)))
    except ValueError as error:
        raise ModelError(
            f"lora.target_modules: PEFT cannot adapt {settings.target_modules!r}: {error}",
            remedy=(
                'write "all-linear", or a regular expression that stays off the vision tower\'s clipped linears, '
                'for example ".*language_model.*\\\\.(q_proj|v_proj)", and launch again.'
            ),
        ) from error
    adapted.peft_config[ADAPTER].base_model_name_or_path = base_model
    problems = adapter_problems(adapted, expected)
    if problems:
        raise ModelError("LoRA is not where it should be: " + "; ".join(problems))
    return adapted


def expected_targets(model: torch.nn.Module) -> set[str]:
    """Names of all linear modules but the output head: what "all-linear" must adapt."""
    head = model.get_output_embeddings()
    return {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    }


def adapted_modules(model: PeftModel) -> dict[str, LoraLayer]:
    """Adapted modules by the name they have in the base model."""
    return {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}


def adapter_problems(model: PeftModel, expected: set[str] | None) -> list[str]:
    """What is wrong with the adapters; empty when nothing is.

    expected: names that must be adapted, no more and no fewer; None where the recipe names its own targets.
    """
    adapted = adapted_modules(model)
    problems = []
    if not adapted:
        problems.append("no module is adapted")
    if expected is not None:
        problems += [f"{name} is not adapted" for name in sorted(expected - adapted.keys())]
        problems += [f"{name} is adapted and should not be" for name in sorted(adapted.keys() - expected)]
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), Gemma4ClippableLinear):
            problems.append(f"{name} is wrapped as a whole, so its clamps no longer bound what LoRA adds")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            problems.append(f"{name} trains in {parameter.dtype}, which rounds small updates away")
        if parameter.requires_grad and "lora_" not in name:
            problems.append(f"{name} trains, and is no part of an adapter")
    return problems


def compile_layers(model: PeftModel) -> int:
    """Compiles each decoder and vision layer by itself, so that all share one graph; returns how many.

    Only for CUDA: on a CPU compiling takes longer than it saves on small models.
    """
    kinds = ("Gemma4TextDecoderLayer", "Gemma4VisionEncoderLayer")
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    for layer in layers:
        layer.compile(dynamic=False)
    return len(layers)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on CUDA, fp32 on the CPU; never fp16, which overflows in Gemma 4."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def check_architecture(folder: Path) -> dict[str, Any]:
    """`config.json` of a staged Gemma 4. Raises ModelError where it is missing, damaged or another architecture."""
    try:
        config = read_json(folder / "config.json")
    except FileNotFoundError:
        raise ModelError(
            f"{folder}: no config.json, so it is no staged model",
            remedy="stage it with `g4kit stage model`, and launch again.",
        ) from None
    except ValueError as error:
        raise ModelError(str(error), remedy="stage the model again.") from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != "gemma4" or not config.get("vision_config"):
        raise ModelError(f"{folder}: config.json says model_type {found!r}; a multimodal Gemma 4 says 'gemma4'")
    return dict(config)


def _quantization(kind: Literal["nf4", "none"], dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if kind == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(UNQUANTIZED),
    )


def _keep_weights_unpacked(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from repacking weights for AVX-512 at the first evaluation.

    The repacked form gives other roundings on some processors than on others, and needs widths of multiples of 64.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors on the CPU, by PEFT's names, contiguous, in a fixed order."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: state[name].detach().to("cpu").contiguous() for name in sorted(state)}


def load_adapter_weights(model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    """Puts an adapter's tensors into the model. Raises ModelError where names or shapes differ."""
    own = adapter_tensors(model)
    wrong = sorted(own.keys() ^ tensors.keys()) or [n for n in own if own[n].shape != tensors[n].shape]
    if wrong:
        raise ModelError(f"the adapter's tensors do not fit the model, {wrong[0]} among them")
    set_peft_model_state_dict(model, dict(tensors))
