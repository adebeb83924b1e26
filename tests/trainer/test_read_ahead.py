"""Weights are read ahead: all of them, once, and no longer than the loading takes."""

import threading
import time
from pathlib import Path

import pytest

from g4trainer import read_ahead
from g4trainer.read_ahead import available_bytes, reading_ahead


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 3000)
    monkeypatch.setattr(read_ahead, "BLOCK_BYTES", 1024)
    for name, size in (("a.safetensors", 10_000), ("b.safetensors", 2_999), ("c.safetensors", 0), ("d.json", 500_000)):
        (tmp_path / name).write_bytes(bytes(size))
    return tmp_path


def bytes_read() -> int:
    """By this process through read calls, faults of mapped pages apart; see proc_pid_io(5)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_every_byte_of_the_weights_is_read_once(folder: Path) -> None:
    before = bytes_read()
    with reading_ahead(folder):
        deadline = time.monotonic() + 20
        while bytes_read() - before < 12_999 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert 12_999 <= bytes_read() - before < 200_000  # a little more: what this test itself reads of /proc
    assert not readers()


def test_it_ends_with_the_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terabyte that takes no space on the disk, and minutes to read."""
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 2**40)
    monkeypatch.setattr(read_ahead, "available_bytes", lambda: 2**50)
    with (folder / "endless.safetensors").open("wb") as file:
        file.truncate(2**40)
    with reading_ahead(folder):
        assert readers()
        begun = time.monotonic()
    assert time.monotonic() - begun < 10
    assert not readers()


def test_what_memory_has_no_room_for_is_left_to_the_loader(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(read_ahead, "available_bytes", lambda: 13_000)
    with caplog.at_level("INFO"), reading_ahead(folder):
        assert not readers()
    assert "not read ahead" in caplog.text


def test_a_file_that_cannot_be_read_is_the_loaders_to_tell(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "a.safetensors"
    path.unlink()
    path.mkdir()
    (path / "inside").write_bytes(b"")
    with reading_ahead(folder):
        time.sleep(0.3)
    assert "reading ahead: [Errno 21]" in caplog.text


def test_the_system_tells_what_is_available() -> None:
    found = available_bytes()
    assert found is not None
    assert 2**20 < found < 2**50
