"""A fake Google Cloud for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.google_cloud import FakeGoogleCloud


@pytest.fixture
def google(tmp_path: Path) -> Iterator[FakeGoogleCloud]:
    made = FakeGoogleCloud(tmp_path / "google")
    yield made
    made.close()
