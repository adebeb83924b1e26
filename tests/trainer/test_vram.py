"""Bytes from config.json against what torch counts, what was published, and what was measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from g4trainer import calibration, gemma, timing, tiny, vram
from g4trainer.recipe import Recipe, parse_recipe
from trainer.making import adapted_model, base_model

FP32 = 4


def recipe(**sections: dict[str, Any]) -> Recipe:
    document: dict[str, Any] = {"name": "x", "model": {"id": "m"}, "data": {"dataset": "d"}}
    for name, values in sections.items():
        document[name] = document.get(name, {}) | values
    return parse_recipe(document, source="test")


def tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """Every parameter once, with the statistics of those in 4 bits."""
    found: list[torch.Tensor] = []
    for parameter in module.parameters():
        found.append(parameter.data)
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return found


@pytest.mark.parametrize("like", ["E2B", "26B-A4B", "31B"])
def test_the_bytes_of_a_tiny_model_are_those_that_torch_counts(
    tiny_folder: Callable[[tiny.Like], Path], like: tiny.Like
) -> None:
    folder = tiny_folder(like)
    config = json.loads((folder / "config.json").read_text())
    settings = recipe(lora={"r": 8, "lora_alpha": 8})
    counted = vram.Model(settings, config, number_bytes=FP32)
    tensors = tensors_of(base_model(folder))
    assert any(tensor.dtype == torch.uint8 for tensor in tensors)
    assert sum(counted.weights.values()) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    adapters = [p for p in adapted_model(folder).parameters() if p.requires_grad]
    assert counted.lora_parameters == sum(p.numel() for p in adapters)
    assert counted.loaded - sum(counted.weights.values()) == sum(p.numel() * p.element_size() for p in adapters)


@pytest.mark.parametrize(
    "target_modules",
    [
        r".*\.language_model\..*(q_proj|v_proj)",
        ["language_model.layers.0.mlp.down_proj"],
        ["q_proj.linear", "per_layer_input_gate"],
    ],
)
def test_targets_are_counted_as_they_are_adapted(
    tiny_folder: Callable[[tiny.Like], Path], target_modules: str | list[str]
) -> None:
    folder = tiny_folder("E2B")
    config = json.loads((folder / "config.json").read_text())
    counted = vram.Model(recipe(lora={"r": 8, "target_modules": target_modules}), config)
    adapted = adapted_model(folder, target_modules=target_modules)
    assert counted.lora_parameters == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert counted.lora_parameters > 0


def test_the_published_figures_of_the_31b() -> None:
    config = gemma.true_config("31B")
    nf4, bf16 = (vram.Model(recipe(model={"quantization": kind}), config) for kind in ("nf4", "none"))
    assert sum(bf16.weights.values()) == 62_546_173_024
    assert sum(nf4.weights.values()) / vram.GIB == pytest.approx(17.0, abs=0.05)
    assert 18e9 < sum(nf4.weights.values()) < 20e9
    assert nf4.lora_parameters == 534_467_584
    assert nf4.loaded / vram.GIB == pytest.approx(19.0, rel=0.01)  # measured on an H200


def test_the_experts_take_a_quarter_at_nf4() -> None:
    """14.5 GB in all; stock bitsandbytes, which leaves the experts in bf16, would take 48.3."""
    config = gemma.true_config("26B-A4B")
    nf4, bf16 = (vram.Model(recipe(model={"quantization": kind}), config).weights for kind in ("nf4", "none"))
    assert bf16["experts"] == 2 * 22_837_985_280
    assert nf4["experts"] / bf16["experts"] == pytest.approx(0.258, abs=0.001)
    assert sum(nf4.values()) == pytest.approx(14.46e9, rel=0.001)


@pytest.mark.parametrize(
    "row",
    calibration.ROWS,
    ids=lambda row: f"{row.size}-{row.r}-{row.soft_tokens}-{row.step.micro_batch}-{row.step.checkpointing}",
)
def test_the_model_reproduces_its_measurements(row: calibration.Row) -> None:
    gib, seconds = calibration.memory_error(row), calibration.time_error(row)
    assert gib is not None or seconds is not None
    assert gib is None or abs(gib) < calibration.MEMORY_WITHIN
    assert seconds is None or (abs(seconds) > calibration.TIME_WITHIN) is row.missed


def test_some_rows_check_what_others_fitted() -> None:
    for part, error in (("memory", calibration.memory_error), ("time", calibration.time_error)):
        checks = [row for row in calibration.ROWS if part not in row.fitted and error(row) is not None]
        assert len(checks) >= 3, part
    assert sum(row.missed for row in calibration.ROWS) <= 1
    assert len(calibration.markdown().splitlines()) == len(calibration.ROWS) + 2


@pytest.mark.parametrize("size", get_args(gemma.Size))
def test_memory_grows_with_everything_that_takes_it(size: gemma.Size) -> None:
    def peak(micro: int = 4, checkpointing: vram.Checkpointing = "none", r: int = 64, soft: int = 280) -> int:
        built = vram.Model(recipe(lora={"r": r}, model={"max_soft_tokens": soft}), gemma.true_config(size))
        step = vram.Step(micro, checkpointing, "sdpa", accumulates=False)
        return vram.training(built, built.shape(238), step).total

    assert peak(1) < peak(2) < peak(4) < peak(16)
    assert peak(checkpointing="full") < peak(checkpointing="half") < peak()
    assert peak(r=16) < peak(r=64)
    assert peak(soft=70) < peak(soft=280) < peak(soft=1120)


def test_the_parts_are_those_of_the_moment_of_the_peak() -> None:
    built = vram.Model(recipe(), gemma.true_config("31B"))
    in_text = sum(layer.adapters for layer in built.layers if layer.kind == "text")
    last = vram.training(built, built.shape(224), vram.Step(4, "none", "eager", accumulates=False))
    assert last.moment == "backward pass of the text layers"
    assert last.parts["gradients"] < 0.01 * 4 * in_text
    assert last.parts["optimizer"] == 8 * built.lora_parameters
    accumulating = vram.training(built, built.shape(224), vram.Step(4, "none", "eager", accumulates=True))
    assert accumulating.parts["gradients"] == 4 * built.lora_parameters
    assert accumulating.total - last.total == accumulating.parts["gradients"] - last.parts["gradients"]
    first = vram.training(built, built.shape(224), vram.Step(1, "full", "eager", accumulates=False))
    assert first.parts["gradients"] > 0.9 * 4 * in_text
    many_patches = vram.training(built, built.shape(10), vram.Step(8, "full", "sdpa", accumulates=False))
    assert many_patches.moment == "backward pass of the vision tower"
    assert many_patches.parts["activations, text"] == 0
    assert many_patches.parts["gradients"] >= 4 * in_text


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    ("size", "lora", "buffers"),
    [
        ("31B", {"r": 64}, 4 * 64 * 2**20),
        ("31B", {"r": 4}, 2 * 64 * 2**20),  # of 134 MB in all
        ("26B-A4B", {"r": 64, "target_parameters": ["experts.down_proj"]}, 4 * 4 * 64 * 128 * 2816),
    ],
)
def test_gradients_on_their_way_to_other_cards_take_a_few_buffers(
    size: gemma.Size, lora: dict[str, Any], buffers: int, shards: int
) -> None:
    def peak(gpus: int) -> vram.Memory:
        settings = recipe(job={"gpus": gpus, "accelerator": "nvidia-h100-80gb"}, lora=lora)
        built = vram.Model(settings, gemma.true_config(size), shards=shards)
        return vram.training(built, built.shape(224), vram.Step(1, "full", "eager", accumulates=False))

    assert peak(2).total - peak(1).total == buffers


@pytest.mark.parametrize(
    ("size", "kept"),
    [
        ("E2B", {"vision": [44_880], "text": [82_172, 103_676, 117_748, 138_228]}),
        ("26B-A4B", {"vision": [54_640], "text": [176_608, 211_240]}),
        ("31B", {"vision": [54_640], "text": [282_512, 351_904]}),
    ],
)
def test_what_layers_keep_is_what_the_compiler_keeps(size: gemma.Size, kept: dict[str, list[int]]) -> None:
    """Bytes a token or patch, scores apart: what torch 2.13's partitioner saved of a layer's graph at these shapes."""
    found = vram.Model(recipe(lora={"r": 64}), gemma.true_config(size)).layers
    for kind, expected in kept.items():
        counted = [layer.kept for layer in found if layer.kind == kind]
        for value in expected:
            assert any(one == pytest.approx(value, rel=0.01) for one in counted), (kind, value, set(counted))


def test_short_sequences_take_eager_attention() -> None:
    assert vram.attention_for("auto", 504) == "eager"
    assert vram.attention_for("auto", 1300) == "sdpa"
    assert vram.attention_for("eager", 1300) == "eager"
    assert vram.attention_for("sdpa", 504) == "sdpa"


def test_every_accelerator_has_its_rates() -> None:
    from g4trainer.limits import ACCELERATORS

    assert set(timing.CARDS) == set(ACCELERATORS)
