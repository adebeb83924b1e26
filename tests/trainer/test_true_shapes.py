"""The four published sizes on the meta device: neither GPU nor weights, the counts of the published models."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForMultimodalLM, Gemma4Config

from g4trainer import gemma
from g4trainer import recipe as recipes
from g4trainer.exits import ModelError
from g4trainer.model import TEXT_ONLY, adapted_modules, attach_lora, load_structure, targets
from g4trainer.preflight import group_of, preflight, subject_of_size

SIZES: tuple[gemma.Size, ...] = get_args(gemma.Size)
PUBLISHED: dict[gemma.Size, tuple[int, int, int, int]] = {
    # parameters, of them in experts, linear modules, trained at r = 64
    "E2B": (5_104_297_504, 0, 390, 123_666_432),
    "E4B": (7_941_100_832, 0, 457, 173_916_160),
    "26B-A4B": (25_805_933_872, 22_837_985_280, 426, 124_580_864),
    "31B": (31_273_086_512, 0, 601, 534_467_584),
}
MATRIX: dict[gemma.Size, dict[str, tuple[int, int, int]]] = {
    # found and adapted, of them at 4 bit, clipped
    "E2B": {
        "vision patch embedder": (1, 0, 0),
        "vision attention": (16 * 4, 16 * 4, 16 * 4),
        "vision MLP": (16 * 3, 16 * 3, 16 * 3),
        "language attention": (35 * 4 - 20 * 2, 35 * 4 - 20 * 2, 0),  # 20 layers share keys and values
        "language MLP": (35 * 3, 35 * 3, 0),
        "language per-layer input": (35 * 2 + 1, 35 * 2 + 1, 0),
        "vision projection": (1, 1, 0),
    },
    "E4B": {
        "vision patch embedder": (1, 0, 0),
        "vision attention": (16 * 4, 16 * 4, 16 * 4),
        "vision MLP": (16 * 3, 16 * 3, 16 * 3),
        "language attention": (42 * 4 - 18 * 2, 42 * 4 - 18 * 2, 0),
        "language MLP": (42 * 3, 42 * 3, 0),
        "language per-layer input": (42 * 2 + 1, 42 * 2 + 1, 0),
        "vision projection": (1, 1, 0),
    },
    "26B-A4B": {
        "vision patch embedder": (1, 0, 0),
        "vision attention": (27 * 4, 27 * 4, 0),
        "vision MLP": (27 * 3, 27 * 3, 0),
        "language attention": (30 * 4 - 5, 30 * 4 - 5, 0),  # 5 layers of full attention have no v_proj
        "language MLP": (30 * 3, 30 * 3, 0),
        "language router": (30, 0, 0),
        "language experts": (30 * 2, 30 * 2, 0),
        "vision projection": (1, 1, 0),
    },
    "31B": {
        "vision patch embedder": (1, 0, 0),
        "vision attention": (27 * 4, 27 * 4, 0),
        "vision MLP": (27 * 3, 27 * 3, 0),
        "language attention": (60 * 4 - 10, 60 * 4 - 10, 0),
        "language MLP": (60 * 3, 60 * 3, 0),
        "vision projection": (1, 1, 0),
    },
}


def published_model(size: gemma.Size) -> Any:
    """As transformers builds it, the audio tower included."""
    config = gemma.true_config(size)
    parts = {name: config[name] for name in ("text_config", "vision_config", "audio_config")}
    with torch.device("meta"):
        return AutoModelForMultimodalLM.from_config(Gemma4Config(**parts), dtype=torch.bfloat16)


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_the_published_ones_and_those_that_the_facts_say(size: gemma.Size) -> None:
    model, facts = published_model(size), gemma.facts_of(gemma.true_config(size))
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    audio = sum(p.numel() for name, p in model.named_parameters() if "audio" in name)
    assert (total, experts) == PUBLISHED[size][:2]
    assert (facts.published_parameters, facts.expert_parameters, facts.audio_parameters) == (total, experts, audio)
    assert {linear.name: (linear.outputs, linear.inputs) for linear in facts.linears} == {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and "audio" not in name
    }
    assert {one.name: (one.experts, one.outputs, one.inputs) for one in facts.expert_weights} == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters() if ".experts." in name
    }


def test_31b_has_the_bytes_of_its_published_weights() -> None:
    assert 2 * gemma.facts_of(gemma.true_config("31B")).published_parameters == 62_546_173_024


@pytest.mark.parametrize("size", SIZES)
def test_a_run_holds_no_audio_tower(size: gemma.Size) -> None:
    config = gemma.true_config(size)
    facts = gemma.facts_of(config)
    model = load_structure(config, recipes.Model(id="m", quantization="none"))
    held = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert not any("audio" in name for name in held)
    assert sum(held.values()) == facts.parameters == facts.published_parameters - facts.audio_parameters
    hears = config["audio_config"] is not None
    assert hears == (size in ("E2B", "E4B"))
    assert (facts.audio_parameters > 300_000_000) == hears, "0.6 GB in bf16"


@pytest.mark.parametrize("size", SIZES)
def test_lora_target_matrix(size: gemma.Size) -> None:
    report = preflight(subject_of_size(size))
    assert report.passed
    matrix = {group.name: (group.found, group.quantized, group.clipped) for group in report.matrix}
    assert matrix == MATRIX[size]
    assert all(group.adapted == (0 if "experts" in group.name else group.found) for group in report.matrix)
    assert all(group.with_gradient is None for group in report.matrix)
    _, _, linears, trained = PUBLISHED[size]
    said = {check.name: check.detail for check in report.checks}
    assert said["LoRA targets"] == f"{linears} modules adapted, {trained:,} parameters to train"


@pytest.mark.parametrize("size", SIZES)
def test_names_that_peft_cannot_attach_are_refused_on_every_size(size: gemma.Size) -> None:
    model = load_structure(gemma.true_config(size), recipes.Model(id="m"))
    layers = gemma.facts_of(gemma.true_config(size)).vision_layers
    with pytest.raises(ModelError, match=f"names {2 * layers} Gemma4ClippableLinear modules of the vision tower"):
        targets(model, ["q_proj", "v_proj"])


@pytest.mark.parametrize("size", SIZES)
def test_text_only_targets_are_every_linear_layer_of_the_language_model(size: gemma.Size) -> None:
    facts = gemma.facts_of(gemma.true_config(size))
    with torch.device("meta"):
        structure = load_structure(gemma.true_config(size), recipes.Model(id="m"))
        model = attach_lora(structure, recipes.Lora(target_modules=TEXT_ONLY), base_model="m")
    wanted = {linear.name for linear in facts.linears if ".language_model." in linear.name}
    assert adapted_modules(model).keys() == wanted
    assert len(wanted) == sum(linear.group != "vision" for linear in facts.linears) - 1  # and the projection


def test_modules_count_in_the_row_that_a_reader_expects() -> None:
    rows = {group_of(linear.name) for linear in gemma.facts_of(gemma.true_config("E2B")).linears}
    assert rows == set(MATRIX["E2B"])


def test_facts_say_the_same_of_a_published_and_of_a_saved_configuration(tmp_path: Path) -> None:
    """transformers 5.23 writes the shapes of full attention as per_layer_config, where published files say global_*."""
    for size in SIZES:
        config = gemma.true_config(size)
        parts = {name: config[name] for name in ("text_config", "vision_config", "audio_config")}
        Gemma4Config(**parts).save_pretrained(tmp_path / size)
        saved = json.loads((tmp_path / size / "config.json").read_text())
        assert "per_layer_config" in saved["text_config"]
        assert gemma.read_facts(tmp_path / size) == gemma.facts_of(config)


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', '{"model_type": "gemma4"}', "{"])
def test_facts_of_another_model_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        gemma.read_facts(tmp_path)
