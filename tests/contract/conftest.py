"""Every implementation of the Cloud protocol, each given the same tests.

An implementation is added here as a function that makes an empty cloud whose jobs run `task.py` with the request's
arguments, and whose processes get 1 s between SIGTERM and SIGKILL, so that the tests are quick.
"""

import contextlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from contract.task import TASK
from contract.waiting import wait
from fakes.google_cloud import FakeGoogleCloud
from g4kit.cloud.base import Bucket, Cloud, Execution, JobRequest
from g4kit.cloud.google import GoogleCloud
from g4kit.cloud.google_bucket import GoogleBucket
from g4kit.cloud.local import LocalCloud
from g4kit.cloud.vertex import VertexCloud


@contextlib.contextmanager
def local(folder: Path) -> Iterator[Cloud]:
    yield LocalCloud(folder / "bucket", command=TASK, grace_s=1.0)


class Terraformed(GoogleCloud):
    """With as many retries as a test asks for: Terraform sets them in the job, and no execution can."""

    def __init__(self, fake: FakeGoogleCloud) -> None:
        super().__init__(fake.access())
        start = self.jobs.run

        def run(request: JobRequest) -> Execution:
            for job in fake.run.jobs.values():
                job.max_retries = request.max_attempts - 1
            return start(request)

        self.jobs.run = run  # type: ignore[method-assign]


@contextlib.contextmanager
def google(folder: Path) -> Iterator[Cloud]:
    """Log lines show late and out of order."""
    fake = FakeGoogleCloud(folder / "google", command=TASK, grace_s=1.0)
    fake.logging.delay_s = 0.2
    yield Terraformed(fake)
    fake.close()


@contextlib.contextmanager
def vertex(folder: Path) -> Iterator[Cloud]:
    """Listings in pages of two, and log lines late as above."""
    fake = FakeGoogleCloud(folder / "google", command=TASK, grace_s=1.0)
    fake.logging.delay_s = 0.2
    fake.run.jobs["g4kit-tools"].image = f"{fake.deployment.image}@sha256:{'0' * 64}"
    yield VertexCloud(fake.access())
    fake.close()


CLOUDS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Cloud]]] = {
    "local": local,
    "cloudrun": google,
    "vertex": vertex,
}
ACCELERATORS = {"local": "nvidia-l4", "cloudrun": "nvidia-l4", "vertex": "nvidia-h100-80gb"}
"""One that each target has."""
ALL_AT_ONCE = {"vertex"}
"""Targets whose tasks go on at the same time. On the others here, one runs after the other."""


@contextlib.contextmanager
def local_bucket(folder: Path) -> Iterator[Bucket]:
    with local(folder) as made:
        yield made.bucket


@contextlib.contextmanager
def google_bucket(folder: Path) -> Iterator[Bucket]:
    """Listings in pages of two, so that every test meets them."""
    fake = FakeGoogleCloud(folder, page_size=2)
    yield GoogleBucket(fake.access())
    fake.close()


BUCKETS = {"local": local_bucket, "google": google_bucket}


@pytest.fixture(params=BUCKETS)
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bucket]:
    """An empty bucket."""
    with BUCKETS[request.param](tmp_path / "cloud") as made:
        yield made


@pytest.fixture(params=CLOUDS)
def cloud(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cloud]:
    """An empty cloud; whatever a test leaves running is ended."""
    with CLOUDS[request.param](tmp_path) as made:
        yield made
        for execution in made.jobs.find():
            made.jobs.cancel(execution.name)
        for execution in made.jobs.find():
            wait(made, execution.name)


@pytest.fixture
def start(cloud: Cloud) -> Callable[..., Execution]:
    """Starts a job that does what its arguments say, see task.py."""

    def start(
        *args: str,
        run_id: str = "run-1",
        launch_id: str | None = None,
        timeout_s: int = 60,
        max_attempts: int = 1,
        env: dict[str, str] | None = None,
        task_count: int = 1,
    ) -> Execution:
        launch_id = launch_id or secrets.token_hex(4)
        accelerator = ACCELERATORS[cloud.target]
        return cloud.jobs.run(
            JobRequest(run_id, launch_id, args, timeout_s, max_attempts, accelerator, env or {}, task_count)
        )

    return start
