"""The process of an attempt from its claim to its exit code: whatever its work raises is told once, by rank 0.

Of several processes one failure is the end of all. g4trainer.lifeline says whose it is; here it is written down, and
where memory was short, the next attempt is left a plan that needs less.
"""

import contextlib
from collections.abc import Callable

from g4trainer.attempt import Attempt
from g4trainer.claims import Claim, NoClaim
from g4trainer.deadline import Deadline
from g4trainer.exits import (
    ExitCode,
    Interrupted,
    NotOurs,
    OutOfMemory,
    RankFailed,
    RunTaken,
    ShortOfMemory,
)
from g4trainer.lifeline import Lifeline
from g4trainer.metrics import MetricsLog, NoMetrics, Publisher, Status, status_interval_s
from g4trainer.outcome import end_attempt, ended_for_good, failure_of, tell
from g4trainer.rundir import RunDir

Work = Callable[[Attempt], None]


def lead(run: RunDir, deadline: Deadline, lifeline: Lifeline, work: Work) -> ExitCode:
    """The attempt of the process that writes. Never raises: however it ends, that is written where it may be."""
    code = ended_for_good(run)
    if code is None:
        code = _claim_and_work(run, deadline, lifeline, work)
    lifeline.begin_end(None)
    lifeline.dismiss(code)
    return code


def follow(run: RunDir, deadline: Deadline, lifeline: Lifeline, work: Work) -> ExitCode:
    """The attempt of a process beside it: the same work, with nothing written. Its end is that of rank 0."""
    claim, publisher = NoClaim(run, attempt=1), Publisher(status_interval_s())
    status, metrics = Status(run.status, publisher, attempt=1), NoMetrics(run, publisher, attempt=1)
    try:
        work(Attempt(run, deadline, claim, publisher, status, metrics, lifeline.ranks))
    except Interrupted:
        pass  # all stop at the same place
    except Exception as error:  # noqa: BLE001 the edge of the process: rank 0 tells it
        lifeline.report(error)
    return lifeline.verdict()


def _claim_and_work(run: RunDir, deadline: Deadline, lifeline: Lifeline, work: Work) -> ExitCode:
    interval_s = status_interval_s()
    try:
        with (
            Claim(run, interval_s=interval_s) as claim,
            Publisher(interval_s, closing_s=deadline.closing_s, allowed=claim.is_ours) as publisher,
        ):
            status = Status(run.status, publisher, attempt=claim.attempt)
            metrics = MetricsLog(run, publisher, attempt=claim.attempt)
            attempt = Attempt(run, deadline, claim, publisher, status, metrics, lifeline.ranks)
            try:
                status.start()
                lifeline.watch(lambda error: _end_for(attempt, error))
                work(attempt)
                lifeline.begin_end(None)
            except NotOurs:
                raise
            except Exception as error:  # noqa: BLE001 the edge of the process: whatever it was, status.json tells it
                lifeline.begin_end(error)
                return _write_end(attempt, error)
            finally:
                status.stop()
    except NotOurs as error:  # nothing may be written
        tell(run, failure_of(error), error)
        return error.code
    except OSError as error:  # nothing can be written
        tell(run, failure_of(error), error)
        return ExitCode.FAILED
    return ExitCode.DONE


def _write_end(attempt: Attempt, error: Exception) -> ExitCode:
    code = end_attempt(attempt.run, attempt.status, attempt.claim, _with_less(attempt, error))
    if attempt.claim.held.is_set():
        attempt.publisher.open()
    return code


def _end_for(attempt: Attempt, error: RankFailed) -> ExitCode:
    """Ends the attempt because another rank failed; called in a thread, for the main one may be stuck."""
    try:
        with contextlib.suppress(OSError, RunTaken):
            if attempt.checkpoints is not None:
                attempt.checkpoints.wait()
        code = _write_end(attempt, error)
        attempt.status.stop()
        attempt.publisher.__exit__(None, None, None)
        attempt.claim.__exit__(None, None, None)
    except (NotOurs, OSError) as problem:
        tell(attempt.run, failure_of(problem), problem)
        return error.code
    return code


def _with_less(attempt: Attempt, error: Exception) -> Exception:
    """Of several processes one was short of memory: the plan for the next attempt needs less, if one does."""
    if attempt.plan is None or not isinstance(error, ShortOfMemory | RankFailed) or error.part is None:
        return error
    try:
        attempt.plan.shrink(error.part, error)
        attempt.plan.settle()
    except OutOfMemory as final:
        return final
    return error
