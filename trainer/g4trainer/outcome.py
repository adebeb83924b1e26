"""What the end of an attempt leaves: an exit code, failed.json where no retry can help, and a line in the log."""

import contextlib
import errno
import logging
from pathlib import Path
from typing import Any

import torch

from g4trainer.claims import Claim
from g4trainer.dataset import DataError
from g4trainer.exits import FINAL, ExitCode, Failure, OutOfMemory, TrainerError
from g4trainer.metrics import Status, now
from g4trainer.recipe import RecipeError
from g4trainer.rundir import RunDir, read_json, write_json

NOT_WRITABLE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "raise the quota",
    errno.EACCES: "allow writing there",
    errno.EPERM: "allow writing there",
    errno.EROFS: "mount it writable",
}
"""What to do about what a file system answers."""
STAGE_ANEW = "correct the data, stage it under another --name, and launch again with that as data.dataset."
KNOWN = (TrainerError, RecipeError, DataError, torch.OutOfMemoryError)
"""Exceptions whose cause is known."""

log = logging.getLogger(__name__)


def failure_of(error: Exception) -> Failure:
    """The exit code, reason and remedy of an exception; of an unexpected one, that a retry may help."""
    match error:
        case TrainerError():
            return Failure(error.code, str(error), error.remedy)
        case RecipeError():
            return Failure(ExitCode.BAD_INPUT, str(error), "correct the recipe and launch it as a new run.")
        case DataError():
            return Failure(ExitCode.BAD_INPUT, str(error), STAGE_ANEW)
        case torch.OutOfMemoryError():
            return Failure(ExitCode.OUT_OF_MEMORY, str(error), OutOfMemory.remedy)
        case OSError() if error.errno in NOT_WRITABLE:
            return Failure(ExitCode.FAILED, f"{error}", f"{NOT_WRITABLE[error.errno]}, and run it again.")
        case _:
            return Failure(ExitCode.FAILED, f"{type(error).__name__}: {error}", TrainerError.remedy)


def end_attempt(run: RunDir, status: Status, claim: Claim, error: Exception) -> ExitCode:
    """Writes down how an attempt ended that did not finish. Raises RunTaken where the run is another's."""
    failure = failure_of(error)
    claim.outcome = failure.reason
    interrupted = failure.code is ExitCode.INTERRUPTED
    if failure.code in FINAL:
        claim.wait()
        write_failure(run.failed, failure, attempt=claim.attempt)
    tell(run, failure, error)
    with contextlib.suppress(OSError):  # of a disk that is full or lost the log tells
        status.update(state="interrupted" if interrupted else "failed", message=failure.reason)
    return failure.code


def end_request(failed: Path, error: Exception) -> ExitCode:
    """Tells how a request of a finished run ended that has a known cause.

    failed: the request's failed.json, written where no retry can help.
    """
    failure = failure_of(error)
    if failure.code in FINAL:
        write_failure(failed, failure)
    log.error("%s To mend it: %s", failure.reason, failure.remedy)
    return failure.code


def write_failure(path: Path, failure: Failure, **more: Any) -> None:
    """failed.json: why no retry can help."""
    document = {"exit_code": int(failure.code), "reason": failure.reason, "remedy": failure.remedy}
    write_json(path, document | more | {"time": now()})


def tell(run: RunDir, failure: Failure, error: Exception) -> None:
    """Logs an end; of an unexpected one with where it came from."""
    level = logging.INFO if failure.code in (ExitCode.DONE, ExitCode.INTERRUPTED) else logging.ERROR
    known = isinstance(error, KNOWN) or (isinstance(error, OSError) and error.errno in NOT_WRITABLE)
    log.log(level, "%s: %s", run.run_id, failure.reason, exc_info=None if known else error)
    log.log(level, "To mend it: %s", failure.remedy)


def ended_for_good(run: RunDir) -> ExitCode | None:
    """The exit code of a run that is finished or that no retry can help; None where there is something left to do."""
    if run.results.exists():
        log.info("%s: finished already; results are in %s", run.run_id, run.results)
        return ExitCode.DONE
    if not run.failed.exists():
        return None
    try:
        failed: dict[str, Any] = read_json(run.failed)
        code = ExitCode(failed["exit_code"])
        log.error("%s: failed for good: %s To mend it: %s", run.run_id, failed["reason"], failed["remedy"])
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s: %s; it is passed over, and the run goes on", run.failed, error)
        return None
    return code
