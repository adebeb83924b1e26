"""A cancel that arrives when an execution has ended, on Cloud Run and on Vertex AI: both refuse it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contract.task import TASK
from contract.waiting import wait
from fakes.google_cloud import FakeGoogleCloud
from g4kit.cloud.base import Execution, JobRequest
from g4kit.cloud.google import GoogleCloud
from g4kit.cloud.vertex import VertexCloud
from g4kit.errors import UserError

CLOUDS = ((GoogleCloud, "nvidia-l4"), (VertexCloud, "nvidia-h100-80gb"))


@pytest.fixture(params=CLOUDS, ids=("cloudrun", "vertex"))
def ended(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Any, Execution]]:
    """A cloud; what it had read of an execution that went on; and the execution, which has ended since."""
    kind, accelerator = request.param
    fake = FakeGoogleCloud(tmp_path / "google", command=TASK, grace_s=1.0)
    cloud = kind(fake.access())
    started = cloud.jobs.run(JobRequest("run-1", "0a1b", ("sleep:60",), 60, 1, accelerator))
    as_it_was = cloud.jobs._read(started.name)
    cloud.jobs.cancel(started.name)
    yield cloud, as_it_was, wait(cloud, started.name)
    fake.close()


def test_it_is_no_error(ended: tuple[Any, Any, Execution], monkeypatch: pytest.MonkeyPatch) -> None:
    cloud, as_it_was, execution = ended
    stale, read = [as_it_was], cloud.jobs._read
    monkeypatch.setattr(cloud.jobs, "_read", lambda name: stale.pop() if stale else read(name))
    cloud.jobs.cancel(execution.name)
    assert (cloud.jobs.get(execution.name), stale) == (execution, [])


def test_of_one_that_goes_on_the_refusal_is_told(
    ended: tuple[Any, Any, Execution], monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud, as_it_was, execution = ended
    monkeypatch.setattr(cloud.jobs, "_read", lambda name: as_it_was)
    with pytest.raises(UserError, match="cannot be cancelled"):
        cloud.jobs.cancel(execution.name)
