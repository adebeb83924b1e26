"""One writer a run, on a bucket without locks.

An attempt writes a claim of its own name, waits until every earlier claim must be visible, and goes on only as the
lowest live one. A claim is live while its heartbeat changes: readers watch it on their own clock and never compare
times of two machines. A claim found dead is named in `supersedes` of the next; who finds itself named there stops.
docs/resume.md says which window remains.
"""

import os
import secrets
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from g4trainer.exits import RunTaken
from g4trainer.metrics import now
from g4trainer.rundir import RunDir, create_json, read_json, write_json

MOUNT_METADATA_AGE_S = 60.0
"""How old a mounted bucket's listing may be by default (gcsfuse's metadata cache)."""
BEATS_TO_DEATH = 4
"""A claim whose heartbeat stands still for so many intervals is dead."""
POLL_S = 0.2


def metadata_age_s(root: Path) -> float:
    """How old a listing of the bucket may be, in seconds: `$G4KIT_METADATA_AGE_S`, else 60 on a FUSE mount, else 0."""
    stated = os.environ.get("G4KIT_METADATA_AGE_S")
    if stated:
        return float(stated)
    return MOUNT_METADATA_AGE_S if _is_fuse(root.resolve()) else 0.0


class Claim:
    """The right to write a run directory, held from `take` to the end of the context."""

    def __init__(self, run: RunDir, *, interval_s: float) -> None:
        self.attempt = _next_attempt(run)
        self.name = f"{self.attempt:04d}-{secrets.token_hex(4)}"
        self._run = run
        self._path = run.claims / f"{self.name}.json"
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._superseded_by: str | None = None
        self._document: dict[str, Any] = {
            "attempt": self.attempt,
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "started": now(),
            "beats": 0,
            "released": False,
            "supersedes": [],
            "ended": None,
            "outcome": None,
            "seconds": {},
        }
        self._heart = threading.Thread(target=self._beat, name="claim", daemon=True)

    def __enter__(self) -> Self:
        """Raises RunTaken where another attempt is live."""
        create_json(self._path, self._document)
        self._heart.start()
        try:
            time.sleep(metadata_age_s(self._run.root))
            self._document["supersedes"] = self._watch_lower_claims()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def note(self, **fields: Any) -> None:
        """Notes how the attempt goes (`seconds` by phase, `outcome`); kept in the claim's file."""
        self._document |= fields

    def check(self) -> None:
        """Raises RunTaken where a later attempt took this one for dead and went on in its place."""
        if self._superseded_by is not None:
            raise RunTaken(f"{self._run.run_id}: attempt {self._superseded_by} took over while this one stood still.")

    def _watch_lower_claims(self) -> list[str]:
        """Names of the lower claims, all of which were found dead. Raises RunTaken as soon as one shows life."""
        lower = {name: document for name, document in self._others() if name < self.name}
        watched = {name: document["beats"] for name, document in lower.items() if not _known_dead(document)}
        deadline = time.monotonic() + BEATS_TO_DEATH * self._interval_s + metadata_age_s(self._run.root)
        while watched and time.monotonic() < deadline:
            for name, document in self._others():
                if name in watched and (_known_live(document) or document["beats"] != watched[name]):
                    raise RunTaken(
                        f"{self._run.run_id}: attempt {document['attempt']} on {document['host']} "
                        f"(process {document['pid']}) is writing this run."
                    )
                if name in watched and _known_dead(document):
                    del watched[name]
            time.sleep(min(POLL_S, self._interval_s))
        return sorted(lower)

    def _others(self) -> list[tuple[str, dict[str, Any]]]:
        claims = []
        for path in sorted(self._run.claims.glob("*.json")):
            if path != self._path:
                try:
                    claims.append((path.stem, read_json(path)))
                except (FileNotFoundError, ValueError):  # replaced this very moment, or an empty one of a killed writer
                    continue
        return claims

    def _beat(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self._document["beats"] += 1
            write_json(self._path, self._document)
            for name, document in self._others():
                if self.name in document["supersedes"]:
                    self._superseded_by = name

    def _release(self) -> None:
        self._stopped.set()
        self._heart.join()
        self._document |= {"released": True, "ended": now()}
        write_json(self._path, self._document)


def attempts(run: RunDir) -> list[dict[str, Any]]:
    """What each attempt of a run noted, oldest first; one that was killed noted no outcome."""
    return [read_json(path) for path in sorted(run.claims.glob("*.json"))]


def _next_attempt(run: RunDir) -> int:
    numbers = [int(path.stem[:4]) for folder in (run.claims, run.metrics) for path in folder.glob("[0-9]*.json*")]
    return max(numbers, default=0) + 1


def _known_dead(document: dict[str, Any]) -> bool:
    """Released, or of a process of this very machine that is gone."""
    if document["released"]:
        return True
    return bool(document["boot"] == _boot_id() and _process_start(document["pid"]) != document["process_start"])


def _known_live(document: dict[str, Any]) -> bool:
    """Of a process of this very machine that runs."""
    return document["boot"] == _boot_id() and not _known_dead(document)


def _boot_id() -> str:
    """Names this boot of this machine; empty where the system does not tell, so that only heartbeats count."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return secrets.token_hex(8)


def _process_start(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _is_fuse(path: Path) -> bool:
    """Whether a path lies on a FUSE file system, as a mounted bucket does."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    covering = [(len(where), kind) for _, where, kind, *_ in mounts if path.is_relative_to(where)]
    return bool(covering) and max(covering)[1].startswith("fuse")
