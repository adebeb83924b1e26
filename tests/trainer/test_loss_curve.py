"""The fast path learns as transformers' own Trainer does: the benchmark of the loss curves over few steps."""

import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 24
ALIKE_STEPS = 8
"""Later, steps of this size have made differences of rounding grow a thousandfold."""


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.loss_curve")


@pytest.mark.slow
@pytest.mark.parametrize("fp32", [True, False])
def test_the_fast_path_s_losses_are_within_noise_of_the_plain_one_s(
    benchmark: Any, tmp_path: Path, *, fp32: bool
) -> None:
    bench = benchmark.Bench(tmp_path, steps=STEPS, backend="aot_eager", fp32=fp32)
    plain, other, fast = bench.plain(42), bench.plain(43), bench.fast(42)
    assert fast[0] == pytest.approx(plain[0], rel=1e-5 if fp32 else 1e-2)
    assert plain[-1] < plain[0] / 2, "it learns"
    apart, noise = (benchmark.difference(plain, one)[1] for one in (fast, other))
    assert apart < noise
    if fp32:
        assert fast[:ALIKE_STEPS] == pytest.approx(plain[:ALIKE_STEPS], rel=1e-4)
