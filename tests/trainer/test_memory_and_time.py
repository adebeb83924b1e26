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


def test_the_caps_try_what_fits_and_what_does_not(benchmark: Any) -> None:
    """Also near the edge: a setting of up to 1.5 times what the card has free must not run."""
    shares = {
        card: [peak(setting, card) / benchmark.free_on(card) for setting in benchmark.SETTINGS]
        for card in benchmark.CAPPED
    }
    assert set(shares) == {"nvidia-l4", "nvidia-rtx-pro-6000"}
    assert all(any(0.5 < share <= 1 for share in tried) for tried in shares.values())
    assert any(1 < share < 1.5 for share in shares["nvidia-l4"])
    assert sum(share > 1 for tried in shares.values() for share in tried) >= 3


def peak(setting: Any, card: str) -> int:
    model = vram.Model(setting.recipe(card), gemma.true_config(setting.size))
    return planner.training_memory(model, model.shape(238), setting.micro_batch, setting.checkpointing).total
