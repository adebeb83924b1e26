"""The base model at NF4 with LoRA on it, and the proof that LoRA is where it should be."""

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor, Gemma4Config
from transformers.distributed import DistributedConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.models.gemma4.modeling_gemma4 import Gemma4ClippableLinear, Gemma4TextExperts

from g4trainer import experts, lora_targets
from g4trainer import recipe as recipes
from g4trainer.exits import ModelError
from g4trainer.forward import never_wait
from g4trainer.host_embedding import embeddings_on_host, keep_on_host
from g4trainer.quantization import (
    EXPERT_WEIGHTS,
    METHOD,
    UNQUANTIZED,
    compute_in,
    prepare_experts,
    quantization_config,
)
from g4trainer.read_ahead import reading_ahead
from g4trainer.recipe import ALL_LINEAR
from g4trainer.rundir import read_json

TEXT_ONLY = r".*\.language_model\..*(_proj|_projection|_gate|router\.proj)"
"""`lora.target_modules` for every linear layer of the language model and none of the vision tower."""
ADAPTER = "default"
SHARDED_TOO = {"model.vision_tower.encoder.layers.*": "free_full_weight"}
"""Gathered one by one, besides those of transformers' own plan: the layers of the language model."""
STAGE_AGAIN = "stage the model again, and launch again."


def load_processor(folder: Path) -> Any:
    """The Gemma4Processor of a staged model. Raises ModelError where the folder holds another or an incomplete one."""
    check_architecture(folder)
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(f"{folder}: the processor cannot be loaded: {error}", remedy=STAGE_AGAIN) from error
    if type(processor).__name__ != "Gemma4Processor":
        raise ModelError(f"{folder}: the processor is a {type(processor).__name__}, not Gemma 4's", remedy=STAGE_AGAIN)
    tokenizer = processor.tokenizer
    if tokenizer.unk_token_id in tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ModelError(f"{folder}: the tokenizer has no vocabulary; its tokenizer.json is missing", STAGE_AGAIN)
    if not processor.chat_template:
        raise ModelError(f"{folder}: the processor has no chat template; instruction-tuned models have one")
    return processor


def load_base(folder: Path, settings: recipes.Model, *, device: torch.device, shards: int = 1) -> Any:
    """The frozen base model: linear layers and experts at NF4, computing in bf16 (fp32 on the CPU).

    folder: of a model as published, or of a copy that is at NF4 already (g4trainer.quantize), which is read as it is.
    shards: processes that share the model (FSDP2); each reads and holds its part of every weight, and gathers the
    layer at work. Adapters that are attached later are whole on each.
    The audio tower is left out: no task here hears. Raises ModelError where the folder is no complete Gemma 4, for a
    tensor that is missing, or of another shape, would otherwise be made up at random.
    """
    check_architecture(folder)
    dtype = compute_dtype(device)
    # With a mask at head_dim 256 its backward pass has given NaN on compute capability 9.0.
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        config = AutoConfig.from_pretrained(folder)
        config.audio_config = None
        quantized = getattr(config, "quantization_config", None) is not None
        if quantized:
            config.quantization_config = {"quant_method": METHOD, "compute_dtype": str(dtype).removeprefix("torch.")}
        with warnings.catch_warnings(), reading_ahead(folder):
            warnings.filterwarnings("ignore", message=".*were not used when initializing.*")
            model, report = AutoModelForMultimodalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                **_placement(device, shards),
                attn_implementation="sdpa",  # attention.py may choose others, once it knows how long a sample is
                experts_implementation=experts.register(),
                quantization_config=None if quantized else quantization_config(settings.quantization, dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise ModelError(f"{folder}: the weights cannot be loaded: {error}", remedy=STAGE_AGAIN) from error
    problems = _loading_problems(report)
    if problems:
        raise ModelError(f"{folder}: the weights are not those of its config.json: {problems}", remedy=STAGE_AGAIN)
    model.requires_grad_(False)
    model.config.use_cache = False
    if shards > 1:  # generation calls the vision tower by itself, before the model whose call would gather the rest
        register_fsdp_forward_method(model, "generate")
    compute_in(model, dtype)
    never_wait(model)
    if shards == 1 and embeddings_on_host(settings, device):
        keep_on_host(model)
    return model


def _placement(device: torch.device, shards: int) -> dict[str, Any]:
    """Where `from_pretrained` puts the weights."""
    if shards == 1:
        return {"device_map": {"": device}}
    return {"distributed_config": DistributedConfig(fsdp_size=shards, fsdp_plan=SHARDED_TOO)}


def is_sharded(model: Any) -> bool:
    """Whether processes share the weights, so that all must call the model the same number of times."""
    return bool(getattr(model, "_is_fsdp_managed_module", False))


def load_structure(document: Mapping[str, Any], settings: recipes.Model) -> Any:
    """The base model of a parsed `config.json` on the meta device: every module, quantized as a run would, no weight.

    Takes neither a GPU nor the weights. Use it and what is attached to it under `torch.device("meta")`.
    """
    parts = {name: document[name] for name in ("text_config", "vision_config", "tie_word_embeddings")}
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(Gemma4Config(**parts, audio_config=None), dtype=torch.bfloat16)
    quantization = quantization_config(settings.quantization, torch.bfloat16)
    if quantization is not None:
        replace_with_bnb_linear(model, list(UNQUANTIZED), quantization)
        prepare_experts(model)
        model.is_loaded_in_4bit = True  # what PEFT asks before it adapts 4-bit layers
    model.requires_grad_(False)
    return model


def attach_lora(model: Any, settings: recipes.Lora, *, base_model: str) -> PeftModel:
    """Puts fp32 adapters on the base model and verifies where they are.

    base_model: the name that adapter_config.json gives, never a path of this machine.
    Raises ModelError where the targets cannot be adapted, or are not all.
    """
    expected = wanted(model, settings)
    config = LoraConfig(**recipes.lora_config(settings, base_model=base_model))
    config._register_custom_module({Gemma4TextExperts: experts.ExpertsLora})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`base_model_name_or_path` was renamed.*")
        warnings.filterwarnings("ignore", message=".*`is_gradient_checkpointing` is deprecated.*")  # PEFT asks it
        adapted = get_peft_model(model, config)
    adapted.peft_config[ADAPTER].base_model_name_or_path = base_model
    problems = adapter_problems(adapted, expected)
    if problems:
        raise ModelError("LoRA is not where it should be: " + "; ".join(problems))
    return adapted


def wanted(model: torch.nn.Module, settings: recipes.Lora) -> set[str]:
    """Names of what a recipe's LoRA adapts: linear modules, and weights of experts.

    Raises ModelError, with what to write, where one of them cannot be adapted or a name matches nothing.
    """
    modules, weights = targets(model, settings.target_modules), expert_weights(model)
    problems = lora_targets.problems(settings, modules=expected_targets(model), expert_weights=weights)
    if problems:
        raise ModelError(" ".join(problems), remedy="correct the recipe, and launch again.")
    chosen = modules - lora_targets.matching(settings.exclude_modules, modules)
    chosen |= lora_targets.matching(settings.target_parameters, weights)
    if not chosen:
        raise ModelError(
            f"lora.exclude_modules: got {settings.exclude_modules!r}, which leaves nothing to adapt.",
            remedy="leave the line out, and launch again.",
        )
    return chosen


def expert_weights(model: torch.nn.Module) -> set[str]:
    """Names of all 3-D weights of experts."""
    owners = [name for name, module in model.named_modules() if isinstance(module, Gemma4TextExperts)]
    return {f"{owner}.{weight}" for owner in owners for weight in EXPERT_WEIGHTS}


def targets(model: torch.nn.Module, target_modules: str | Sequence[str]) -> set[str]:
    """Names of the modules that `lora.target_modules` asks for, as PEFT reads it.

    Raises ModelError, with what to write, where one of them cannot be adapted or a name matches nothing.
    """
    linear = expected_targets(model)
    if target_modules == ALL_LINEAR:
        return linear
    try:
        matches = _matches(model, target_modules)
    except re.error as error:
        raise _target_error(f"it is no regular expression: {error}", target_modules, linear) from error
    nothing = [pattern for pattern, names in matches.items() if not names]
    matched = set[str]().union(*matches.values())
    others = sorted(matched - linear)
    wrapped = [name for name in others if isinstance(model.get_submodule(name), Gemma4ClippableLinear)]
    if nothing:
        known = ", ".join(sorted({name.removesuffix(".linear").rpartition(".")[2] for name in linear}))
        problem = f"{nothing[0]!r} names no module; linear ones end with {known}"
    elif wrapped:
        problem = (
            f"it names {len(wrapped)} Gemma4ClippableLinear modules of the vision tower ({wrapped[0]} among them), "
            f"which PEFT cannot adapt"
        )
    elif others:
        problem = f"it names {others[0]}, which is no linear layer of its own"
    else:
        return matched
    raise _target_error(problem, target_modules, linear)


def expected_targets(model: torch.nn.Module) -> set[str]:
    """Names of all linear modules but the output head: what "all-linear" must adapt."""
    head = model.get_output_embeddings()
    return {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    }


def adapted_modules(model: PeftModel) -> dict[str, LoraLayer]:
    """Adapters by the name that what they adapt has in the base model: a linear module, or a weight of experts."""
    layers = {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    return {_adapted_name(name, layer): layer for name, layer in layers.items()}


def _adapted_name(name: str, layer: LoraLayer) -> str:
    if not isinstance(layer, ParamWrapper):
        return name
    return f"{name.replace('.base_layer', '')}.{layer.parameter_name}"  # wrappers of one module's weights are nested


def adapter_problems(model: PeftModel, expected: set[str]) -> list[str]:
    """What is wrong with the adapters; empty when nothing is.

    expected: names that must be adapted, no more and no fewer.
    """
    adapted = adapted_modules(model)
    problems = [f"{name} is not adapted" for name in sorted(expected - adapted.keys())]
    problems += [f"{name} is adapted and should not be" for name in sorted(adapted.keys() - expected)]
    for name, module in adapted.items():
        if isinstance(module.get_base_layer(), Gemma4ClippableLinear):
            problems.append(f"{name} is wrapped as a whole, so its clamps no longer bound what LoRA adds")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            problems.append(f"{name} trains in {parameter.dtype}, which rounds small updates away")
        if parameter.requires_grad and "lora_" not in name:
            problems.append(f"{name} trains, and is no part of an adapter")
    return problems


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
        raise ModelError(str(error), remedy=STAGE_AGAIN) from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != "gemma4" or not config.get("vision_config"):
        raise ModelError(f"{folder}: config.json says model_type {found!r}; a multimodal Gemma 4 says 'gemma4'")
    return dict(config)


def _matches(model: torch.nn.Module, target_modules: str | Sequence[str]) -> dict[str, set[str]]:
    """Names of modules by the pattern that matches them: a string is a regular expression, a list holds suffixes."""
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(target_modules, str):
        pattern = re.compile(target_modules)
        return {target_modules: {name for name in names if pattern.fullmatch(name)}}
    return {
        suffix: {name for name in names if name == suffix or name.endswith(f".{suffix}")} for suffix in target_modules
    }


def _target_error(problem: str, target_modules: str | Sequence[str], linear: Collection[str]) -> ModelError:
    asked = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    language = {name.rpartition(".")[2] for name in linear if ".language_model." in name}
    kept = [ending for ending in asked if ending in language]
    advised = rf".*\.language_model\..*\.({'|'.join(kept)})" if kept else TEXT_ONLY
    return ModelError(
        f"lora.target_modules: got {target_modules!r}: {problem}.",
        remedy=f"write \"all-linear\", or for the language model alone '{advised}', and launch again.",
    )


def _loading_problems(report: dict[str, Any]) -> str:
    """What a checkpoint lacks, in one line; empty when it is complete."""
    missing = sorted(report["missing_keys"])
    mismatched = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in report["mismatched_keys"])
    lists = {"missing": missing, "of another shape": mismatched}
    return "; ".join(f"{len(names)} {what}, {names[0]} among them" for what, names in lists.items() if names)


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors on the CPU, by PEFT's names, contiguous, in a fixed order."""
    # Not the whole model's: where processes share it, PEFT would gather every weight of the base model.
    adapters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    state = get_peft_model_state_dict(model, state_dict=adapters, save_embedding_layers=False)
    return {name: state[name].detach().to("cpu").contiguous() for name in sorted(state)}


def load_adapter_weights(model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    """Puts an adapter's tensors into the model. Raises ModelError where names or shapes differ."""
    own = adapter_tensors(model)
    wrong = sorted(own.keys() ^ tensors.keys()) or [n for n in own if own[n].shape != tensors[n].shape]
    if wrong:
        raise ModelError(f"the adapter's tensors do not fit the model, {wrong[0]} among them")
    if not is_sharded(model):
        set_peft_model_state_dict(model, dict(tensors))
        return
    # Loading a state dict drops what FSDP2 has gathered, and rank 0 may load alone: the others would not gather again.
    parameters = {name.replace(f".{ADAPTER}.", "."): parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
