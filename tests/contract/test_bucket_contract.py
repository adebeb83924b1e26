"""What every bucket does."""

import base64
import datetime
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from g4kit.cloud.base import (
    Bucket,
    Object,
    ObjectNameError,
    ObjectNotFoundError,
    PreconditionError,
    crc32c_of_file,
)

HELLO_CRC32C = "yZRlqg=="
"""Of b"hello world", as `gcloud storage hash` prints it."""


def test_a_written_object_is_read_back_with_its_facts(bucket: Bucket) -> None:
    before = datetime.datetime.now(datetime.UTC)
    written = bucket.write("runs/a/recipe.json", b"hello world")
    assert bucket.read("runs/a/recipe.json") == b"hello world"
    assert bucket.stat("runs/a/recipe.json") == written
    assert (written.name, written.size, written.crc32c) == ("runs/a/recipe.json", 11, HELLO_CRC32C)
    assert written.generation > 0
    assert abs((written.updated - before).total_seconds()) < 10


@pytest.mark.parametrize("data", [b"", b"\0" * 3_000_000], ids=["empty", "3 MB"])
def test_any_size_is_kept(bucket: Bucket, data: bytes) -> None:
    assert bucket.write("a", data).size == len(data)
    assert bucket.read("a") == data


def test_what_is_not_there(bucket: Bucket, tmp_path: Path) -> None:
    reads: list[Callable[[], object]] = [
        lambda: bucket.read("no/such"),
        lambda: bucket.read_with_generation("no/such"),
        lambda: bucket.stat("no/such"),
        lambda: bucket.delete("no/such"),
        lambda: bucket.download_file("no/such", tmp_path / "out" / "file"),
    ]
    for read in reads:
        with pytest.raises(ObjectNotFoundError, match="no object no/such"):
            read()
    assert list(bucket.objects()) == []
    assert bucket.folders("runs/") == []


def test_a_folder_is_no_object_and_an_object_no_folder(bucket: Bucket, tmp_path: Path) -> None:
    bucket.write("a/b", b"x")
    for name in ("a", "a/b/c"):
        reads: list[Callable[[], object]] = [
            lambda name=name: bucket.read(name),  # type: ignore[misc]
            lambda name=name: bucket.stat(name),  # type: ignore[misc]
            lambda name=name: bucket.delete(name),  # type: ignore[misc]
            lambda name=name: bucket.download_file(name, tmp_path / "out"),  # type: ignore[misc]
        ]
        for read in reads:
            with pytest.raises(ObjectNotFoundError):
                read()
    assert list(bucket.objects("a/b/")) == []
    assert bucket.folders("a/b/") == []
    assert [item.name for item in bucket.objects()] == ["a/b"]


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\\b", "a\0b"])
def test_names_that_lead_astray_are_refused(bucket: Bucket, tmp_path: Path, name: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    uses: list[Callable[[], object]] = [
        lambda: bucket.read(name),
        lambda: bucket.write(name, b"x"),
        lambda: bucket.write(name, b"x", if_generation_match=0),
        lambda: bucket.stat(name),
        lambda: bucket.delete(name),
        lambda: bucket.upload_file(file, name),
        lambda: bucket.download_file(name, tmp_path / "out"),
        lambda: bucket.job_path(name),
    ]
    for use in uses:
        with pytest.raises(ObjectNameError):
            use()


def test_the_generation_changes_with_every_write(bucket: Bucket) -> None:
    generations = [bucket.write("a", b"same").generation for _ in range(50)]
    assert len(set(generations)) == 50
    assert bucket.read_with_generation("a") == (b"same", generations[-1])


def test_create_only(bucket: Bucket) -> None:
    bucket.write("a", b"first", if_generation_match=0)
    with pytest.raises(PreconditionError):
        bucket.write("a", b"second", if_generation_match=0)
    assert bucket.read("a") == b"first"
    bucket.delete("a")
    bucket.write("a", b"third", if_generation_match=0)
    assert bucket.read("a") == b"third"


def test_compare_and_set(bucket: Bucket) -> None:
    first = bucket.write("a", b"1").generation
    second = bucket.write("a", b"2", if_generation_match=first).generation
    with pytest.raises(PreconditionError):
        bucket.write("a", b"3", if_generation_match=first)
    with pytest.raises(PreconditionError):
        bucket.write("not-there", b"3", if_generation_match=first)
    with pytest.raises(PreconditionError):
        bucket.delete("a", if_generation_match=first)
    assert bucket.read_with_generation("a") == (b"2", second)
    bucket.delete("a", if_generation_match=second)
    assert list(bucket.objects()) == []


def test_of_many_writers_that_create_one_wins(bucket: Bucket) -> None:
    won = _race(lambda number: bucket.write("claim", str(number).encode(), if_generation_match=0))
    assert len(won) == 1
    assert bucket.read("claim") == str(won[0]).encode()


def test_of_many_writers_that_compare_none_is_lost(bucket: Bucket) -> None:
    bucket.write("counter", b"0")

    def add_one(_: int) -> Object:
        while True:
            value, generation = bucket.read_with_generation("counter")
            try:
                return bucket.write("counter", str(int(value) + 1).encode(), if_generation_match=generation)
            except PreconditionError:
                continue

    assert len(_race(add_one)) == 8
    assert bucket.read("counter") == b"8"


def test_objects_are_listed_by_prefix_and_sorted(bucket: Bucket) -> None:
    names = ["models/a/config.json", "runs/a-b/x", "runs/a/b/c", "runs/a/x", "runs/ab/x", "z"]
    for name in reversed(names):
        bucket.write(name, name.encode())
    assert [item.name for item in bucket.objects()] == names
    assert [item.name for item in bucket.objects("runs/a/")] == ["runs/a/b/c", "runs/a/x"]
    assert [item.name for item in bucket.objects("runs/a")] == names[1:5]
    assert list(bucket.objects("runs/a/x/")) == []
    assert [(item.size, item.generation) for item in bucket.objects("z")] == [(1, bucket.stat("z").generation)]


def test_folders_are_those_right_below(bucket: Bucket) -> None:
    for name in ("runs/b/x", "runs/a/deep/down/x", "runs/file", "models/m/x"):
        bucket.write(name, b"")
    assert bucket.folders("runs/") == ["a", "b"]
    assert bucket.folders("runs/a/") == ["deep"]
    assert bucket.folders() == ["models", "runs"]
    bucket.delete("runs/a/deep/down/x")
    assert bucket.folders("runs/") == ["b"]


def test_a_file_goes_up_and_comes_down(bucket: Bucket, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    source.write_bytes(os.urandom(2_500_000))
    up: list[int] = []
    down: list[int] = []
    written = bucket.upload_file(source, "models/m/weights", progress=up.append)
    assert (written.size, written.crc32c) == (2_500_000, crc32c_of_file(source))
    assert written == bucket.stat("models/m/weights")
    assert bucket.download_file("models/m/weights", target, progress=down.append).crc32c == written.crc32c
    assert target.read_bytes() == source.read_bytes()
    assert sum(up) == sum(down) == 2_500_000
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_an_upload_keeps_to_its_precondition(bucket: Bucket, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"new")
    bucket.write("a", b"old")
    with pytest.raises(PreconditionError):
        bucket.upload_file(source, "a", if_generation_match=0)
    assert bucket.read("a") == b"old"
    bucket.upload_file(source, "a", if_generation_match=bucket.stat("a").generation)
    assert bucket.read("a") == b"new"
    assert [item.name for item in bucket.objects()] == ["a"]


def test_an_upload_of_nothing_leaves_nothing(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        bucket.upload_file(tmp_path / "not-there", "a")
    with pytest.raises(IsADirectoryError):
        bucket.upload_file(tmp_path, "a")
    assert list(bucket.objects()) == []


def test_crc32c_is_written_as_cloud_storage_writes_it(bucket: Bucket) -> None:
    crc32c = bucket.write("a", b"123456789").crc32c
    assert crc32c is not None
    assert base64.b64decode(crc32c).hex() == "e3069283"  # the check value of CRC-32C (RFC 3720, B.4)


def _race(write: Callable[[int], Object]) -> list[int]:
    """Eight threads at once; the numbers of those whose write was accepted."""
    won: list[int] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait()
        try:
            write(number)
        except PreconditionError:
            return
        won.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won
