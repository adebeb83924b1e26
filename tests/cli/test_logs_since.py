"""g4kit logs --since."""

import datetime
from collections.abc import Callable

import pytest

from cli.bench import Bench
from g4kit.cloud.base import now
from g4kit.commands.logs import parse_since

NOON = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30s", "2026-01-01T11:59:30+00:00"),
        ("10m", "2026-01-01T11:50:00+00:00"),
        ("2h", "2026-01-01T10:00:00+00:00"),
        ("1d", "2025-12-31T12:00:00+00:00"),
        ("2025-06-01T00:00:00Z", "2025-06-01T00:00:00+00:00"),
        ("2025-06-01T02:00:00+02:00", "2025-06-01T02:00:00+02:00"),
        ("2025-06-01", "2025-06-01T00:00:00+00:00"),
    ],
)
def test_ages_and_times(text: str, expected: str) -> None:
    assert parse_since(text, NOON).isoformat() == expected


@pytest.mark.parametrize("text", ["yesterday", "10", "-5m", "5w", "999999999d", "2026-13-01"])
def test_what_is_neither_is_refused(g4kit: Bench, launched: Callable[..., str], text: str) -> None:
    result = g4kit("logs", launched(), "--since", text)
    assert result.exit_code == 2
    assert f"--since: got {text!r}; write an age such as 10m" in result.stderr
    assert result.stdout == ""


def test_only_lines_from_then_on(g4kit: Bench, launched: Callable[..., str]) -> None:
    run_id = launched()
    every = g4kit("logs", run_id).stdout
    assert "step 1 of" in every
    assert g4kit("logs", run_id, "--since", "1h").stdout == every
    assert g4kit("logs", run_id, "--since", "1h", "-f").stdout == every
    later = (now() + datetime.timedelta(hours=1)).isoformat()
    assert g4kit("logs", run_id, "--since", later).stdout == ""
