"""The benchmark of the predictions asks for what it should, and its own predictions say so."""

import importlib
from pathlib import Path
from typing import Any, get_args

import pytest

from g4trainer import gemma, planner, vram

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.memory_and_time")


def test_the_settings_span_sizes_batches_checkpointing_ranks_and_soft_tokens(benchmark: Any) -> None:
    settings = benchmark.SETTINGS
    assert len(settings) == len(set(settings)) >= 12
    assert {one.size for one in settings} == set(get_args(gemma.Size))
    assert {one.checkpointing for one in settings} == {"none", "half", "full"}
    assert {one.r for one in settings} == {16, 64}
    assert {one.soft_tokens for one in settings} == {70, 280, 1120}
    assert (min(one.micro_batch for one in settings), max(one.micro_batch for one in settings)) == (1, 16)


def test_every_setting_is_predicted_to_fit_an_h200(benchmark: Any) -> None:
    for setting in benchmark.SETTINGS:
        assert peak(setting, "nvidia-h200-141gb") <= benchmark.free_on("nvidia-h200-141gb"), setting.name


def test_what_is_tried_under_a_cap_is_what_is_predicted(benchmark: Any) -> None:
    assert len(benchmark.TOO_MUCH) == 3
    for card, setting in benchmark.TOO_MUCH:
        assert peak(setting, card) > benchmark.free_on(card), setting.name
    for card, size in benchmark.FITS:
        model = vram.Model(benchmark.Setting(size, 64, 280, 8, "full").recipe(card), gemma.true_config(size))
        assert planner.best_fit(model, model.shape(238), benchmark.free_on(card)).fits


def peak(setting: Any, card: str) -> int:
    model = vram.Model(setting.recipe(card), gemma.true_config(setting.size))
    return planner.training_memory(model, model.shape(238), setting.micro_batch, setting.checkpointing).total
