"""A fake Google Cloud for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.google_cloud import FakeGoogleCloud


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions of uploads are kept in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def google(tmp_path: Path) -> Iterator[FakeGoogleCloud]:
    made = FakeGoogleCloud(tmp_path / "google")
    yield made
    made.close()
