"""What a run may cost, and the limits under which it can never cost more: arithmetic."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from g4kit.errors import UserError
from g4kit.pricing import MINIMUM_S, Prices
from g4trainer.timing import CLOSING_S, Time

GRACE_S = 10
"""Between SIGTERM at the timeout and SIGKILL an instance lives on, and is billed."""


class BudgetError(UserError):
    """A cap on the cost that leaves no time to work in, or that nothing can hold."""


@dataclass(frozen=True)
class Cost:
    """USD of one run."""

    expected: float
    low: float
    high: float
    worst: float
    """Every attempt of one execution runs until its timeout."""

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 2) for name, value in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class Limits:
    """What one execution may use. The trainer holds to both."""

    timeout_s: int
    """Of one attempt."""
    attempts: int
    """That may work; the trainer ends later ones at once."""
    worst_usd: float
    """What the execution costs at most."""


def cost_of(prices: Prices, time: Time, *, timeout_s: int, max_attempts: int) -> Cost:
    """What a run is expected to cost, between which bounds, and at worst."""
    worst = max_attempts * attempt_at_worst_s(timeout_s) * prices.second
    low, expected, high = (max(seconds, MINIMUM_S) * prices.second for seconds in (time.low, time.total, time.high))
    return Cost(expected, low, high, worst)


def attempt_at_worst_s(timeout_s: float) -> float:
    """Seconds billed of an attempt that is ended at its timeout."""
    return max(timeout_s + GRACE_S, MINIMUM_S)


def least_useful_s(time: Time | None) -> int:
    """The shortest timeout under which an attempt gets anywhere: loading, a step and the end. time: None if unknown."""
    return MINIMUM_S if time is None else max(MINIMUM_S, int(time.phases["load"] + CLOSING_S) + 1)


def within_budget(
    usd_a_second: float,
    left_usd: float,
    *,
    timeout_s: int,
    max_attempts: int,
    fewer_attempts: bool,
    least_s: int = MINIMUM_S,
) -> Limits:
    """The limits, at most those given, under which an execution can never cost more than `left_usd`.

    fewer_attempts: whether the target lets a launch choose the number of attempts. Where it does not, those beyond the
    limit are started, end at once and are billed a minute each, which is counted here.
    least_s: a shorter timeout gets nowhere. Of the limits that fit, those with most time to work in are taken.
    Raises BudgetError where none fit; what it says is a clause for the caller's sentence.
    """
    affordable_s = left_usd / usd_a_second
    best: tuple[int, Limits] | None = None
    for attempts in range(1, max_attempts + 1):
        idle_s = 0 if fewer_attempts else (max_attempts - attempts) * MINIMUM_S
        limit_s = min(timeout_s, int((affordable_s - idle_s) / attempts) - GRACE_S)
        worst_s = attempts * attempt_at_worst_s(limit_s) + idle_s
        if limit_s < min(least_s, timeout_s) or worst_s > affordable_s:
            continue
        useful_s = attempts * max(1, limit_s - least_s)
        if best is None or useful_s > best[0]:
            best = useful_s, Limits(limit_s, attempts, worst_s * usd_a_second)
    if best is None:
        least = least_usd(usd_a_second, timeout_s, max_attempts, fewer_attempts=fewer_attempts, least_s=least_s)
        raise BudgetError(f"an attempt that gets anywhere may cost ${least:.2f}")
    return best[1]


def least_usd(
    usd_a_second: float, timeout_s: int, max_attempts: int, *, fewer_attempts: bool, least_s: int = MINIMUM_S
) -> float:
    """The smallest amount, in whole cents, that `within_budget` accepts."""
    idle_s = 0 if fewer_attempts else (max_attempts - 1) * MINIMUM_S
    seconds = attempt_at_worst_s(min(least_s, timeout_s)) + idle_s + 1  # a second is lost to rounding down
    return math.ceil(100 * seconds * usd_a_second) / 100


def describe(limits: Mapping[str, Any]) -> str:
    """`at most 3 attempts of 3600 s, $9.93 at worst`. limits: as JSON holds them."""
    attempts = f"{limits['attempts']} attempt{'s' * (limits['attempts'] != 1)}"
    return f"at most {attempts} of {limits['timeout_s']} s, ${limits['worst_usd']:.2f} at worst"
