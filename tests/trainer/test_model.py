"""The base model at NF4, and LoRA on every linear layer and inside every clamp."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers.models.gemma4.modeling_gemma4 import Gemma4ClippableLinear

from g4trainer import gemma, tiny
from g4trainer.exits import ModelError
from g4trainer.model import TEXT_ONLY, adapted_modules, adapter_problems, check_architecture, expected_targets, targets
from trainer.conftest import Folders
from trainer.making import (
    adapted_model,
    base_model,
    collator,
    examples,
    fill_adapters,
    logits,
    relative_error,
    settings,
)

LIKES: tuple[tiny.Like, ...] = ("E2B", "E4B", "26B-A4B", "31B")


@pytest.fixture(params=LIKES)
def folder(request: pytest.FixtureRequest, tiny_folder: Folders) -> Path:
    return tiny_folder(request.param)


def test_every_linear_layer_but_head_router_and_patch_embedder_is_held_at_nf4(folder: Path) -> None:
    model = base_model(folder)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    quantized = {n for n, m in linears.items() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert linears.keys() - quantized == {
        n for n in linears if n.endswith(("lm_head", "router.proj", "patch_embedder.input_proj"))
    }
    assert "lm_head" in linears
    assert {linears[n].weight.quant_type for n in quantized} == {"nf4"}
    assert all(linears[n].weight.quant_state.nested for n in quantized), "double quantization"
    assert {linears[n].compute_dtype for n in quantized} == {torch.float32}, "fp32 on the CPU, bf16 on CUDA"
    assert not any(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight.data_ptr() == model.model.language_model.embed_tokens.weight.data_ptr()


def test_all_linear_adapts_what_the_configuration_promises(folder: Path) -> None:
    facts = gemma.read_facts(folder)
    model = adapted_model(folder)
    assert adapted_modules(model).keys() == {linear.name for linear in facts.linears}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == facts.lora_parameters(8)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    groups = {linear.group for linear in facts.linears}
    assert groups == {"language", "vision", "projection"} | ({"router"} if "26B" in folder.name else set())


def test_every_clamp_stays_around_its_adapter(folder: Path) -> None:
    model = adapted_model(folder)
    wrappers = [m for m in model.modules() if isinstance(m, Gemma4ClippableLinear)]
    assert len(wrappers) == 14  # seven in each of two vision layers
    assert all(isinstance(wrapper.linear, LoraLayer) for wrapper in wrappers)
    assert not any(
        isinstance(m.get_base_layer(), Gemma4ClippableLinear) for m in model.modules() if isinstance(m, LoraLayer)
    )


def test_a_fresh_adapter_changes_no_output(folder: Path) -> None:
    batch = collator()(examples())
    plain = logits(base_model(folder), batch)
    adapted = logits(adapted_model(folder), batch)
    assert torch.equal(plain, adapted)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_merged_equals_adapter(folder: Path, quantization: str) -> None:
    """Unquantized, merging is exact up to rounding. At NF4 the sum is quantized anew, so that what is compared is a
    model with the dequantized weights."""
    model = adapted_model(folder, quantization=quantization)
    fill_adapters(model)
    batch = collator()(examples())
    with_adapter = logits(model, batch)
    with model.disable_adapter():
        without = logits(model, batch)
    assert (with_adapter - without).abs().max() > 0.1, "the adapter must matter, or merging it shows nothing"
    if quantization == "nf4":
        _dequantize(model)
    merged = logits(model.merge_and_unload(), batch)
    assert relative_error(merged, with_adapter) < 3e-5


def _dequantize(model: Any) -> None:
    """Puts each 4-bit layer's own dequantized weights into a plain linear layer below its adapter."""
    config = model.peft_config["default"]
    for name, module in list(model.get_base_model().named_modules()):
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), bitsandbytes.nn.Linear4bit):
            quantized = module.get_base_layer()
            weight = bitsandbytes.functional.dequantize_4bit(quantized.weight.data, quantized.weight.quant_state)
            plain = torch.nn.Linear(quantized.in_features, quantized.out_features, bias=False)
            plain.weight.data = weight.float()
            lora = peft.tuners.lora.Linear(plain, "default", config, r=config.r, lora_alpha=config.lora_alpha)
            lora.lora_A, lora.lora_B = module.lora_A, module.lora_B
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_base_model().get_submodule(owner), attribute, lora)


@pytest.mark.parametrize("with_lora", [False, True], ids=["base", "lora"])
def test_clamps_hold_at_4_bit(tiny_folder: Folders, with_lora: bool) -> None:
    """Activations are driven past the bounds, and the adapter's share is made large, so that both clamps must act."""
    model = adapted_model(tiny_folder("E2B")) if with_lora else base_model(tiny_folder("E2B"))
    if with_lora:
        fill_adapters(model, std=5.0)
    wrappers = [m for m in model.modules() if isinstance(m, Gemma4ClippableLinear)]
    assert len(wrappers) == 14
    bound = tiny.CLIP_BOUND
    for wrapper in wrappers:
        inner = wrapper.linear
        assert isinstance(inner.get_base_layer() if with_lora else inner, bitsandbytes.nn.Linear4bit)
        huge = torch.randn(4, inner.in_features, generator=torch.Generator().manual_seed(2)) * 100
        with torch.inference_mode():
            made = wrapper(huge)
            by_hand = inner(huge.clamp(-bound, bound)).clamp(-bound, bound)
            unclamped_input = inner(huge).clamp(-bound, bound)
            unclamped_output = inner(huge.clamp(-bound, bound))
        assert torch.equal(made, by_hand)
        assert made.abs().max() == bound
        assert not torch.equal(made, unclamped_input), "the clamp of the input must matter here"
        assert unclamped_output.abs().max() > bound, "the clamp of the output must matter here"


def test_a_wrapper_adapted_as_a_whole_is_found(tiny_folder: Folders) -> None:
    model = adapted_model(tiny_folder("E2B"))
    wrapper = next(m for m in model.modules() if isinstance(m, Gemma4ClippableLinear))
    wrapper.linear.base_layer = Gemma4ClippableLinear(model.config.vision_config, 64, 64).requires_grad_(False)
    found = adapter_problems(model, expected_targets(base_model(tiny_folder("E2B"))))
    assert len(found) == 1
    assert "clamps no longer bound what LoRA adds" in found[0]


def test_adapter_problems_name_each_fault(tiny_folder: Folders) -> None:
    model = adapted_model(tiny_folder("31B"))
    expected = set(adapted_modules(model))
    some = "model.language_model.layers.0.mlp.up_proj"
    parameters = dict(model.named_parameters())
    a_weight = f"base_model.model.{some}.lora_A.default.weight"
    parameters[a_weight].data = parameters[a_weight].data.bfloat16()
    norm = next(name for name in parameters if name.endswith("input_layernorm.weight"))
    parameters[norm].requires_grad_(True)
    assert adapter_problems(model, expected - {some} | {"model.missing"}) == [
        "model.missing is not adapted",
        f"{some} is adapted and should not be",
        f"{norm} trains, and is no part of an adapter",
        f"{a_weight} trains in torch.bfloat16, which rounds small updates away",
    ]


def test_text_only_targets_are_the_language_model_s_linear_layers(folder: Path) -> None:
    facts = gemma.read_facts(folder)
    model = adapted_model(folder, target_modules=TEXT_ONLY)
    language = {linear.name for linear in facts.linears if linear.name.startswith("model.language_model.")}
    assert len(language) > 20
    assert adapted_modules(model).keys() == language


def test_vision_layers_can_be_named_by_their_inner_linear(tiny_folder: Folders) -> None:
    names = adapted_modules(adapted_model(tiny_folder("E2B"), target_modules=["q_proj.linear", "v_proj.linear"]))
    prefix = "model.vision_tower.encoder.layers"
    assert names.keys() == {f"{prefix}.{layer}.self_attn.{x}_proj.linear" for layer in (0, 1) for x in ("q", "v")}


REFUSED = {
    "clipped": (["q_proj", "v_proj"], "it names 4 Gemma4ClippableLinear modules of the vision tower"),
    "clipped regex": (".*q_proj", "it names 2 Gemma4ClippableLinear modules of the vision tower"),
    "unknown": (["q_proj.linear", "query"], "'query' names no module; linear ones end with down_proj, embedding_"),
    "not a suffix": ("q_proj", "'q_proj' names no module; linear ones end with"),
    "no expression": ("*_proj", "it is no regular expression: nothing to repeat at position 0"),
    "container": (["mlp"], "it names model.language_model.layers.0.mlp, which is no linear layer of its own"),
    "head": (["lm_head"], "it names lm_head, which is no linear layer of its own"),
    "embedding": (["embed_tokens"], "it names model.language_model.embed_tokens, which is no linear layer of its own"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("like", ["E2B", "31B"])
def test_targets_that_peft_cannot_adapt_are_refused_with_what_to_write(
    tiny_folder: Folders, like: tiny.Like, case: str
) -> None:
    asked, problem = REFUSED[case]
    model = base_model(tiny_folder(like))
    with pytest.raises(ModelError) as caught:
        targets(model, asked)
    assert str(caught.value).startswith(f"lora.target_modules: got {asked!r}: {problem}")
    assert 'write "all-linear", or for the language model alone ' in caught.value.remedy
    advised = caught.value.remedy.split("'")[1]
    assert targets(model, advised), "what the remedy says must work"


def test_the_remedy_keeps_the_names_that_were_asked_for(tiny_folder: Folders) -> None:
    model = base_model(tiny_folder("31B"))
    with pytest.raises(ModelError) as caught:
        targets(model, ["q_proj", "v_proj"])
    advised = caught.value.remedy.split("'")[1]
    assert advised == r".*\.language_model\..*\.(q_proj|v_proj)"
    queries = {f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in range(4)}
    values = {f"model.language_model.layers.{layer}.self_attn.v_proj" for layer in (0, 2)}  # none on full attention
    assert targets(model, advised) == queries | values


def test_the_audio_tower_of_a_published_model_is_left_out(tmp_path: Path, tiny_folder: Folders) -> None:
    folder = _copied(tiny_folder("E2B"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.audio_tower.layers.0.norm.weight"] = torch.ones(8)
    tensors["model.embed_audio.embedding_projection.weight"] = torch.ones(64, 8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["audio_config"] = {"model_type": "gemma4_audio", "hidden_size": 8, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    model = base_model(folder)
    assert not [name for name, _ in model.named_modules() if "audio" in name]
    batch = collator()(examples())
    assert torch.equal(logits(model, batch), logits(base_model(tiny_folder("E2B")), batch))


BOUND = "model.vision_tower.encoder.layers.1.mlp.up_proj.input_max"
DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing tensor": (lambda tensors: tensors.pop(BOUND), f"1 missing, {BOUND} among them"),
    "other shape": (
        lambda tensors: tensors.update({"model.language_model.norm.weight": torch.ones(7)}),
        "model.language_model.norm.weight",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_incomplete_checkpoint_is_refused(tmp_path: Path, tiny_folder: Folders, damage: str) -> None:
    """A tensor that is missing would be made up at random: a fine-tune that is subtly wrong still trains."""
    change, said = DAMAGES[damage]
    folder = _copied(tiny_folder("E2B"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="the weights") as caught:
        base_model(folder)
    assert said in str(caught.value)
    assert "stage the model again" in caught.value.remedy


def test_cut_off_weights_are_refused(tmp_path: Path, tiny_folder: Folders) -> None:
    folder = _copied(tiny_folder("E2B"), tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="the weights cannot be loaded"):
        base_model(folder)


CONFIGS = {
    "another architecture": ('{"model_type": "llama"}', "config.json says model_type 'llama'"),
    "the encoder-free 12B": ('{"model_type": "gemma4_unified"}', "config.json says model_type 'gemma4_unified'"),
    "text only": ('{"model_type": "gemma4", "vision_config": null}', "a multimodal Gemma 4"),
    "a list": ("[]", "config.json says model_type None"),
    "no JSON": ("{", "config.json: damaged"),
    "missing": (None, "no config.json, so it is no staged model"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_folder_that_is_no_gemma_4_is_refused(tmp_path: Path, case: str) -> None:
    content, said = CONFIGS[case]
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        check_architecture(tmp_path)
    assert said in str(caught.value)


def test_the_guards_of_bf16_attention_and_of_lora_config(tiny_folder: Folders) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    model = adapted_model(tiny_folder("E2B"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    config = model.peft_config["default"]
    assert (config.base_model_name_or_path, config.r, config.lora_alpha) == ("tiny-gemma4", 8, 8)
    assert config.lora_alpha == settings().lora_alpha


def _copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model"))
