"""Copies outlive kill -9: the next command goes on where the last one was ended."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from contract.waiting import wait_until
from fakes.google_cloud import FakeGoogleCloud
from g4kit import copying
from g4kit.cloud.base import StorageError, crc32c_of_file
from g4kit.cloud.google_bucket import GoogleBucket
from g4kit.cloud.google_download import parts_of
from g4kit.cloud.google_upload import CHUNK_BYTES
from g4kit.copying import how_far
from g4kit.sources import StageError
from g4kit.staging import MAX_OBJECT_BYTES, stage
from g4kit.transfer import StoppedError, in_parallel, partial_file, session_file
from g4trainer.rundir import file_entry

FILES = {"train-0.parquet": 34 << 20, "train-1.parquet": 9 << 20, "test.parquet": 1000}
"""The first one is received in two parts at once."""
TOTAL = sum(FILES.values())
LARGE = 2
"""Files that are sent in chunks."""
RUN = "digits-tiny-20260101-120000-0a1b"
MANY_KILLS = 50
LARGER = 8
"""For many kills: after each, the kernel still delivers some MB of what the process had sent."""
KILLS = [pytest.param(1, id="1 kill"), pytest.param(MANY_KILLS, id="50 kills", marks=pytest.mark.slow)]


@pytest.fixture
def environ(google: FakeGoogleCloud, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "deployment.json").write_text(json.dumps(google.deployment.model_dump()))
    own = {"G4KIT_DEPLOYMENT": str(tmp_path / "deployment.json"), "G4KIT_EMULATOR_HOST": google.server.url}
    return os.environ | own


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path, FILES)


def make_source(tmp_path: Path, files: dict[str, int]) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in files.items():
        with (folder / name).open("wb") as file:
            for start in range(0, size, 1 << 20):
                file.write(random.randbytes(min(1 << 20, size - start)))
    return folder


def files_for(kills: int) -> dict[str, int]:
    return {name: size * (LARGER if kills == MANY_KILLS else 1) for name, size in FILES.items()}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", KILLS)
def test_staging_goes_on_after_kill_9(
    google: FakeGoogleCloud, environ: dict[str, str], tmp_path: Path, kills: int
) -> None:
    files = files_for(kills)
    source, uploads = make_source(tmp_path, files), google.storage.uploads
    uploads.pause_s = 0.01
    command = ["stage", "data", str(source)]
    amid = kill_at_random(command, environ, lambda: uploads.received_bytes, sum(files.values()), kills)
    uploads.pause_s = 0.0
    ended = run(command, environ)
    assert ended.returncode == 0, ended.stderr
    for name in files:
        assert crc32c_of_file(google.mount / "datasets" / "photos" / name) == crc32c_of_file(source / name)
    again = uploads.received_bytes - (sum(files.values()) - files["test.parquet"])
    report(kills, amid, again)
    assert again <= kills * LARGE * CHUNK_BYTES


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", KILLS)
def test_fetching_goes_on_after_kill_9(
    google: FakeGoogleCloud, environ: dict[str, str], tmp_path: Path, kills: int
) -> None:
    files = files_for(kills)
    folder = google.mount / "runs" / RUN
    folder.mkdir(parents=True)
    make_source(tmp_path, files).rename(folder / "adapter")
    artifacts = {f"adapter/{name}": file_entry(folder / "adapter" / name) for name in files}
    (folder / "results.json").write_text(json.dumps({"state": "succeeded", "artifacts": artifacts}))
    (folder / "recipe.json").write_text("{}")
    google.storage.pause_s = 0.01
    command = ["fetch", RUN, "--out", str(tmp_path / "out")]
    amid = kill_at_random(command, environ, lambda: google.storage.sent_bytes, sum(files.values()), kills)
    google.storage.pause_s = 0.0
    ended = run(command, environ)
    assert ended.returncode == 0, ended.stderr
    for name, entry in artifacts.items():
        assert file_entry(tmp_path / "out" / name) == entry
    assert [path.name for path in (tmp_path / "out").rglob(".*")] == []
    again = google.storage.sent_bytes - sum(files.values())
    report(kills, amid, again)
    assert again <= kills * LARGE * CHUNK_BYTES + kills * (1 << 20), "and recipe.json and results.json, each time"


def report(kills: int, amid: int, again: int) -> None:
    """amid: kills of a command that was copying. again: bytes that were sent again."""
    chunks = again / (amid * LARGE * CHUNK_BYTES)
    print(f"{kills} kills, {amid} amid the copies: {again} bytes sent again, {chunks:.2f} chunks a file and kill")


def test_an_upload_whose_object_was_deleted_since_is_made_again(google: FakeGoogleCloud, tmp_path: Path) -> None:
    """The session says that it is done: an earlier process was killed right after."""
    bucket = GoogleBucket(google.access())
    file = tmp_path / "file"
    file.write_bytes(random.randbytes(CHUNK_BYTES + 1))
    target = f"{bucket.url}/a None"
    bucket.upload_file(file, "a")
    [session] = google.storage.uploads.sessions
    with session_file(file, target) as kept:
        kept.write(f"{google.server.url}/upload/storage/v1/b/g4kit-test/o?uploadType=resumable&upload_id={session}")
    bucket.delete("a")
    bucket.upload_file(file, "a")
    assert bucket.stat("a").crc32c == crc32c_of_file(file)


def test_a_session_that_is_gone_is_begun_anew(google: FakeGoogleCloud, tmp_path: Path) -> None:
    bucket = GoogleBucket(google.access())
    file = tmp_path / "file"
    file.write_bytes(random.randbytes(CHUNK_BYTES + 1))
    with session_file(file, f"{bucket.url}/a None") as kept:
        kept.write(f"{google.server.url}/upload/storage/v1/b/g4kit-test/o?uploadType=resumable&upload_id=gone")
    bucket.upload_file(file, "a")
    assert bucket.stat("a").crc32c == crc32c_of_file(file)


def test_a_session_is_for_its_owner_and_for_the_same_bytes(tmp_path: Path) -> None:
    file, cache = tmp_path / "file", {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    file.write_bytes(b"1")
    with session_file(file, "gs://b/a", cache) as first:
        first.write("http://secret")
        with session_file(file, "gs://b/a", cache) as second:  # while the first is in use
            assert second.read() is None
            second.remove()
    [kept] = (tmp_path / "cache").rglob("*.json")
    assert kept.stat().st_mode & 0o777 == 0o600
    with session_file(file, "gs://b/a", cache) as again:
        assert again.read() == "http://secret"
    os.utime(kept, (0, 0))
    file.write_bytes(b"12")
    with session_file(file, "gs://b/a", cache) as other:
        assert other.read() is None
    assert not kept.exists(), "a session lasts a week"


def test_a_link_is_never_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="symbolic link"), partial_file(tmp_path / "link", 1):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_the_first_error_ends_what_has_not_begun() -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise StorageError("three")
        time.sleep(0.01)
        return number

    with pytest.raises(StorageError, match="three"):
        in_parallel(work, range(1000), workers=2)
    assert len(begun) < 100
    assert in_parallel(work, [5, 4, 6], workers=2) == [5, 4, 6]


def run(command: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "g4kit", *command], env=environ, capture_output=True, text=True, check=False
    )


def kill_at_random(
    command: list[str], environ: dict[str, str], moved: Callable[[], int], total: int, kills: int
) -> int:
    """Starts the command so often, each time killed after a random share of the bytes; returns how often amid them."""
    amid = 0
    for number in range(kills):
        begun = moved()
        left = max(0, total - begun)
        wanted = random.random() * 1.5 * left / (kills - number + 1)
        process = subprocess.Popen(
            [sys.executable, "-m", "g4kit", *command],
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while moved() - begun <= wanted and process.poll() is None:
            time.sleep(0.002)
        amid += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until(moved, quiet(moved))
    assert amid >= (kills + 1) // 2, "else the sizes say little"
    return amid


def quiet(moved: Callable[[], int]) -> Callable[[int], bool]:
    """Whether nothing has moved since it was asked before: what the kernel had is delivered."""
    before = [-1]

    def is_quiet(now: int) -> bool:
        same, before[0] = now == before[0], now
        return same

    return is_quiet


MANY = [pytest.param(200, id="200 files"), pytest.param(10_000, id="10,000 files", marks=pytest.mark.slow)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", MANY)
def test_many_files_in_one_stage(google: FakeGoogleCloud, environ: dict[str, str], tmp_path: Path, count: int) -> None:
    """Staged, and again with one file missing; memory does not grow with their number."""
    folder = tmp_path / "many"
    for number in range(count):
        file = folder / ("test" if number % 100 == 0 else "train") / f"{number % 100:02}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"%d" % number)
    told, seconds, peak_mb = measured(["stage", "data", str(folder)], environ)
    assert told.count("\n") < 100, "no line for each of many files"
    there = google.mount / "datasets" / "many"
    assert len(json.loads((there / "STAGED.json").read_text())["files"]) == count
    print(f"{count} files: {seconds:.1f} s, {count / seconds:.0f} a second, peak {peak_mb:.0f} MB")
    assert peak_mb < 200
    (there / "train" / "07" / "107.jpg").unlink()
    before = sum(line.startswith("POST /upload") for line in google.server.requests)
    measured(["stage", "data", str(folder)], environ)
    assert (there / "train" / "07" / "107.jpg").read_bytes() == b"107"
    assert sum(line.startswith("POST /upload") for line in google.server.requests) - before == 2, "it and the marker"


MEASURED = """\
import atexit, re, sys
from pathlib import Path
from g4kit.main import main
peak = lambda: re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
atexit.register(lambda: sys.stderr.write(f"peak {peak()} kB"))
main()
"""
"""The command line, which says at its end the most memory that it had. What the parent had would count in its usage."""


def measured(command: list[str], environ: dict[str, str]) -> tuple[str, float, float]:
    """What a command said, its seconds, and its highest memory in MB."""
    begun = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED, *command], env=environ, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    said, _, peak = ended.stderr.rpartition("peak ")
    return said, time.monotonic() - begun, int(peak.split()[0]) / 1000


def test_ctrl_c_ends_a_stage_soon_and_keeps_what_was_copied(
    google: FakeGoogleCloud, environ: dict[str, str], source: Path
) -> None:
    google.storage.uploads.pause_s = 0.02  # 3 s for the largest
    process = subprocess.Popen(
        [sys.executable, "-m", "g4kit", "stage", "data", str(source)], env=environ, stderr=subprocess.PIPE, text=True
    )
    while google.storage.uploads.received_bytes < CHUNK_BYTES:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=8)
    assert process.returncode == 130
    assert "left; what was copied is kept: the same command goes on" in said
    assert "Traceback" not in said
    google.storage.uploads.pause_s = 0.0
    assert run(["stage", "data", str(source)], environ).returncode == 0
    assert google.storage.uploads.received_bytes < TOTAL + LARGE * CHUNK_BYTES


def test_parts_cover_an_object_once() -> None:
    for size in (0, 1, 16 << 20, 32 << 20, (48 << 20) + 7, 62_546_173_024):
        parts = parts_of(size)
        assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])]
        assert parts[-1].end == size
        assert len(parts) == max(1, min(4, size // (16 << 20)))


def test_a_file_beyond_what_an_object_holds_is_refused(google: FakeGoogleCloud, tmp_path: Path) -> None:
    (tmp_path / "huge").mkdir()
    with (tmp_path / "huge" / "train.parquet").open("wb") as file:
        file.truncate(MAX_OBJECT_BYTES + 1)  # a hole, which takes no space
    with pytest.raises(StageError, match=r"train.parquet: got 5\.5 TB, and an object holds 5\.5 TB at most"):
        stage(GoogleBucket(google.access()), "data", str(tmp_path / "huge"), None, trainer=(), say=lambda _: None)
    assert google.server.requests == []


def test_plain_progress_says_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert how_far(1_200_000_000, 62_600_000_000, 12.0) == "1.2 GB of 62.6 GB, 100.0 MB/s, 10 min 14 s left"
    assert how_far(0, 10, 0.0) == "0 B of 10 B, 0 B/s"
    assert how_far(20, 10, 1.0) == "10 B of 10 B, 20 B/s", "sent twice"
    monkeypatch.setattr(copying, "PLAIN_INTERVAL_S", 0.0)
    with copying.open_copying("copying", 2, 30) as shown:
        shown.file("a")
        shown.advance(10)
        shown.stop()
        with pytest.raises(StoppedError):
            shown.advance(10)
    said = capsys.readouterr()
    assert (said.out, said.err.splitlines()[0]) == ("", "copying a")
    assert said.err.splitlines()[1].startswith("copying: 10 B of 30 B, ")
