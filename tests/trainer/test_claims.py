"""Who may write a run: decisions of one claim over others that a test writes."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from g4trainer.claims import BEATS_TO_DEATH, Claim, attempts, metadata_age_s
from g4trainer.exits import RunTaken
from g4trainer.rundir import RunDir, read_json

INTERVAL_S = 0.05
AGE_S = 0.1
ENDED = {"outcome": "stopped", "ended": "2026-01-01T00:00:00.000+00:00", "seconds": {"train": 7.0}}
DEATH_S = BEATS_TO_DEATH * INTERVAL_S + AGE_S


class Other:
    """Another machine's claim."""

    def __init__(self, run: RunDir, name: str, *, held: bool) -> None:
        self.path = run.claims / f"{name}.json"
        self.document: dict[str, Any] = {
            "attempt": int(name[:4]),
            "host": "elsewhere",
            "pid": 1,
            "beats": 0,
            "held": held,
            "supersedes": [],
            "seconds": {"train": 5.0},
        }
        run.claims.mkdir(parents=True, exist_ok=True)
        self.beat()

    def beat(self, **changes: Any) -> None:
        self.document |= {"beats": self.document["beats"] + 1, **changes}
        temporary = self.path.with_name("temporary")
        temporary.write_text(json.dumps(self.document))
        temporary.replace(self.path)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """On a mounted bucket."""
    monkeypatch.setenv("G4KIT_METADATA_AGE_S", str(AGE_S))
    return RunDir(tmp_path / "runs" / "x")


def test_alone_it_goes_on_after_two_rounds(run: RunDir) -> None:
    started = time.monotonic()
    with Claim(run, interval_s=INTERVAL_S) as claim:
        assert not claim.held.is_set()
        claim.wait()
        assert time.monotonic() - started >= 2 * (AGE_S + INTERVAL_S)
        assert read_json(next(run.claims.glob("0001-????????.json")))["held"] is True
        claim.outcome = "succeeded"
    assert attempts(run)[0]["outcome"] == "succeeded"


def test_a_live_lower_claim_goes_before(run: RunDir) -> None:
    other = Other(run, "0001-aaaaaaaa", held=False)
    with pytest.raises(RunTaken, match="attempt 1 on elsewhere"), Claim(run, interval_s=INTERVAL_S) as claim:
        claim.wait(other.beat)


def test_a_live_higher_claim_gives_way_unless_it_was_held_first(run: RunDir) -> None:
    with Claim(run, interval_s=INTERVAL_S) as claim:
        other = Other(run, "0009-aaaaaaaa", held=False)
        claim.wait(other.beat)
    with Claim(run, interval_s=INTERVAL_S) as claim:
        other = Other(run, "0099-aaaaaaaa", held=True)
        with pytest.raises(RunTaken, match="attempt 99"):
            claim.wait(other.beat)


def test_a_dead_claim_expires_and_is_superseded(run: RunDir) -> None:
    Other(run, "0001-aaaaaaaa", held=True)
    started = time.monotonic()
    with Claim(run, interval_s=INTERVAL_S) as claim:
        claim.wait()
        assert time.monotonic() - started >= DEATH_S
        assert claim.attempt == 2
        mine = read_json(next(run.claims.glob("0002-????????.json")))
        assert mine["supersedes"] == ["0001-aaaaaaaa"], "written before the claim is held"


def test_an_ended_claim_is_not_waited_for(run: RunDir) -> None:
    other = Other(run, "0001-aaaaaaaa", held=True)
    other.path.with_name("0001-aaaaaaaa.ended.json").write_text(json.dumps(ENDED))
    with Claim(run, interval_s=5) as claim:
        assert claim._state(claim._seen["0001-aaaaaaaa"]) == "dead"
    assert [noted.get("outcome") for noted in attempts(run)] == ["stopped", None]
    assert attempts(run)[0]["seconds"] == {"train": 7.0}


def test_who_is_superseded_stops(run: RunDir) -> None:
    with Claim(run, interval_s=INTERVAL_S) as claim:
        claim.wait()
        claim.check()
        Other(run, "0002-aaaaaaaa", held=True).beat(supersedes=[claim.name])
        time.sleep(4 * INTERVAL_S)
        with pytest.raises(RunTaken, match="took over while this attempt stood still"):
            claim.check()
        assert not claim.is_ours()


def test_a_heartbeat_that_cannot_be_written_stops_the_attempt(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from g4trainer import claims

    with Claim(run, interval_s=INTERVAL_S) as claim:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(claims, "write_json", full)
        time.sleep(4 * INTERVAL_S)
        with pytest.raises(OSError, match="No space left"):
            claim.check()


def test_a_damaged_claim_is_left_out(run: RunDir) -> None:
    Other(run, "0001-aaaaaaaa", held=False).path.write_bytes(b"")
    with Claim(run, interval_s=INTERVAL_S) as claim:
        claim.wait()
        assert claim.attempt == 2, "its number is taken all the same"


def test_on_this_machine_a_lock_decides_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("G4KIT_METADATA_AGE_S", raising=False)
    run = RunDir(tmp_path / "runs" / "x")
    assert metadata_age_s(tmp_path) is None
    Other(run, "0001-aaaaaaaa", held=True)  # of a process that was killed: nobody holds its lock
    started = time.monotonic()
    with Claim(run, interval_s=15) as claim:
        claim.wait()
        assert claim.held.is_set()
    assert time.monotonic() - started < 1
