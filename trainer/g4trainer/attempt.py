"""One attempt of a run in this process: what it may write, beside whom, by when, and how long its phases took."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from g4trainer.checkpoint_writer import CheckpointWriter
from g4trainer.claims import Claim
from g4trainer.deadline import Deadline
from g4trainer.exits import RunEnded
from g4trainer.metrics import MetricsLog, Publisher, Status
from g4trainer.outcome import ended_for_good
from g4trainer.ranks import Ranks
from g4trainer.run_plan import RunPlan
from g4trainer.rundir import RunDir, remove_remains

log = logging.getLogger(__name__)


@dataclass
class Attempt:
    """What all phases work with. `ending` makes it and sees to its end."""

    run: RunDir
    deadline: Deadline
    claim: Claim
    publisher: Publisher
    status: Status
    metrics: MetricsLog
    ranks: Ranks = field(default_factory=Ranks)
    plan: RunPlan | None = None
    """Where several processes were short of memory, their end makes it smaller. None before the recipe is read."""
    checkpoints: CheckpointWriter | None = None
    """The end waits for what it is writing. None before training."""
    _seconds: dict[str, float] = field(default_factory=dict)
    _current: tuple[str, float] | None = None

    def __post_init__(self) -> None:
        self.claim.report = self.seconds

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what is done in it. Raises Interrupted where it is time to stop."""
        self.deadline.release()
        self.deadline.check()
        self.status.update(state="loading" if name == "load" else "running", phase=name, progress=None)
        log.info("phase %s", name)
        started = time.monotonic()
        self._current = (name, started)
        try:
            yield
        finally:
            self._seconds[name] = time.monotonic() - started
            self._current = None

    def seconds(self) -> dict[str, float]:
        """Seconds by phase so far, and in total since the process began."""
        phases = dict(self._seconds)
        if self._current is not None:
            name, started = self._current
            phases[name] = time.monotonic() - started
        return {name: round(value, 3) for name, value in (*phases.items(), ("total", self.deadline.elapsed_s()))}

    def own_the_run(self) -> None:
        """Returns once nobody else can be writing this run. Raises NotOurs where someone is, or has ended it."""
        if not self.ranks.leads:
            return
        self.claim.wait(self.deadline.check_alone)
        code = ended_for_good(self.run)
        if code is not None:
            raise RunEnded(self.run.run_id, code)
        if not self.publisher.opened:
            remove_remains(self.run)
            self.publisher.open()

    def succeed(self) -> None:
        """Notes that the run is finished."""
        self.claim.outcome = "succeeded"
        self.status.update(state="succeeded", phase="done", eta_s=0)
