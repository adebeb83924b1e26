"""Prices, bounds and budgets: arithmetic over a dated table."""

from pathlib import Path

import pytest

from g4kit import pricing
from g4trainer.limits import ACCELERATORS
from g4trainer.timing import Time

TIME = Time({"train": 3600.0}, 0.2, slices=2, low=1800.0, high=7200.0, calibrated=False)
COST_PAGE = Path(__file__).parents[2] / "docs" / "cost.md"


def rtx() -> pricing.Prices:
    prices = pricing.prices_of("nvidia-rtx-pro-6000")
    assert prices is not None
    return prices


def test_the_smallest_rtx_pro_6000_job_costs_3_19_an_hour() -> None:
    assert rtx().hour == pytest.approx(3.19, abs=0.005)
    redundant = pricing.prices_of("nvidia-rtx-pro-6000", zonal_redundancy=True)
    assert redundant is not None
    assert redundant.hour - rtx().hour == pytest.approx(3600 * (0.00056913 - 0.00036522))
    larger = pricing.prices_of("nvidia-rtx-pro-6000", cpu=30, memory_gib=120)
    assert larger is not None
    assert larger.second - rtx().second == pytest.approx(10 * 0.000018 + 40 * 0.000002)


def test_every_gpu_of_cloud_run_has_a_price_and_those_of_vertex_have_none() -> None:
    priced = {name for name in ACCELERATORS if pricing.prices_of(name)}
    assert priced == {name for name, gpu in ACCELERATORS.items() if "cloudrun" in gpu.platforms}
    assert priced


def test_the_bill_has_bounds() -> None:
    cost = pricing.cost_of(rtx(), TIME, timeout_s=3600, max_attempts=10)
    assert cost.expected == pytest.approx(rtx().hour)
    assert cost.low == pytest.approx(rtx().hour / 2)
    assert cost.high == pytest.approx(rtx().hour * 2)
    assert cost.worst == pytest.approx(10 * rtx().hour)


def test_a_minute_is_billed_at_least() -> None:
    short = Time({"train": 5.0}, 0.2, slices=1, low=4.0, high=6.0, calibrated=False)
    assert pricing.cost_of(rtx(), short, timeout_s=600, max_attempts=1).expected == pytest.approx(60 * rtx().second)
    assert pricing.billed([5, 100], rtx().to_json()) == pytest.approx(160 * rtx().second, rel=1e-4)


@pytest.mark.parametrize(
    ("budget", "fewer_attempts", "expected"),
    [
        (100, True, (3600, 10)),
        (10, True, (3600, 3)),
        (3.2, True, (3600, 1)),
        (1.0, True, (1129, 1)),
        (10, False, (1129, 10)),
        (100, False, (3600, 10)),
    ],
)
def test_a_budget_becomes_a_timeout_and_attempts(
    budget: float, fewer_attempts: bool, expected: tuple[int, int]
) -> None:
    found = pricing.within_budget(rtx(), budget, timeout_s=3600, max_attempts=10, fewer_attempts=fewer_attempts)
    assert found == expected
    timeout_s, attempts = found
    assert timeout_s * attempts * rtx().second <= budget


def test_a_budget_below_a_minute_is_refused() -> None:
    for fewer_attempts, least in ((True, r"0\.05"), (False, r"0\.53")):
        with pytest.raises(pricing.BudgetError, match=rf"--max-cost: got 0\.01; write at least {least}"):
            pricing.within_budget(rtx(), 0.01, timeout_s=3600, max_attempts=10, fewer_attempts=fewer_attempts)


def test_the_cost_guide_is_up_to_date() -> None:
    assert COST_PAGE.read_text() == pricing.markdown(), "run: python -m g4kit.pricing > docs/cost.md"
