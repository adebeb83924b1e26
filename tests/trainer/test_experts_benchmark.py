"""The comparison of NF4 experts with bf16 ones: what is wanted of the true shapes holds for a tiny model too."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_outputs_and_gradients_of_a_tiny_layer_agree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["experts", "layer", "--tiny", "--samples", "1", "--repeats", "1"])
    monkeypatch.syspath_prepend(str(ROOT))
    experts = importlib.import_module("benchmarks.experts")
    assert experts.main() == 0, "a cosine is below what is wanted"
    said = capsys.readouterr().out
    assert "same experts chosen for 100.00%" in said
    rows = [line for line in said.splitlines() if line.startswith("| LoRA gradient:")]
    assert len(rows) == 2 * 5, "both factors of attention, dense MLP, router and two weights of experts"
    assert all(0.98 <= float(row.split("|")[2]) < 1 for row in rows), "not the same weights twice"
