"""The end of rank 0 for another rank's sake: it comes, whatever goes wrong on the way."""

import subprocess
import sys

import pytest

FAILING = """\
import sys, time
from g4trainer import lifeline
from g4trainer.exits import ExitCode, RankFailed
from g4trainer.ranks import Ranks

def fails(*_):
    raise OSError(28, "no space left on device")

leader = lifeline.Lifeline(Ranks())
if sys.argv[1] == "end":
    leader.watch(fails)
else:
    lifeline.before_leaving.append(fails)
leader._end(RankFailed(1, ExitCode.NON_FINITE, "the loss is nan", "lower the rate", part=None))
time.sleep(60)  # as in a collective operation that nobody else comes to
"""


@pytest.mark.parametrize("what", ["end", "telling"])
def test_an_end_that_fails_is_an_end(what: str) -> None:
    process = subprocess.run([sys.executable, "-c", FAILING, what], capture_output=True, text=True, timeout=30)
    assert process.returncode == 4, process.stderr
    said = (
        "no space left on device" in process.stderr,
        "the loss is nan (rank 1); and the end cannot be written down" in process.stderr,
    )
    assert said == ((True, True) if what == "end" else (False, False))
