"""What is written is there whole or not at all, and a run id never leads out of the bucket."""

import datetime
import errno
import hashlib
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from g4trainer.rundir import (
    RUN_ID,
    RunDir,
    RunIdError,
    check_run_id,
    create_bytes,
    create_json,
    manifest,
    new_run_id,
    overwrite_json,
    read_json,
    to_json,
    write_bytes,
    write_json,
)


def test_run_ids_sort_by_time_and_pass_their_own_check() -> None:
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    one, two = new_run_id("a-b", moment), new_run_id("a-b", moment + datetime.timedelta(seconds=1))
    assert one.startswith("a-b-20260102-030405-")
    assert one < two
    assert check_run_id(one) == one
    assert new_run_id("a-b", moment) != new_run_id("a-b", moment)


@pytest.mark.parametrize(
    "run_id", ["", "x", "../x", "a/b", "/etc", "A-1", "a_b", "-a", "a-", ".", "..", "a\n", "é1", "a" * 64]
)
def test_ids_that_no_run_can_have_are_refused(run_id: str) -> None:
    with pytest.raises(RunIdError, match=r"run id: got .*; write letters a to z, digits and dashes"):
        check_run_id(run_id)


@given(st.text(max_size=70))
@budget(max_examples=300, deadline=None, derandomize=True)
def test_an_id_that_passes_names_a_folder_right_below_runs(run_id: str) -> None:
    try:
        check_run_id(run_id)
    except RunIdError:
        return
    assert (Path("/runs") / run_id).parent == Path("/runs")
    assert RUN_ID.fullmatch(run_id)


def test_the_root_is_two_folders_above_unless_the_environment_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "runs" / "a-1")
    monkeypatch.delenv("G4KIT_ROOT", raising=False)
    assert run.root == tmp_path
    monkeypatch.setenv("G4KIT_ROOT", "/mnt/gcs")
    assert run.root == Path("/mnt/gcs")
    assert run.run_id == "a-1"


def test_a_file_is_replaced_whole_and_readable_by_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "status.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": "ü"})
    assert read_json(path) == {"a": "ü"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [file.name for file in path.parent.iterdir()] == ["status.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    write_json(path, {"old": True})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_json(path, {"new": True})
    assert read_json(path) == {"old": True}
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path, stop, sizes = tmp_path / "file", threading.Event(), set()
    write_bytes(path, b"a" * 100_000)

    def read() -> None:
        while not stop.is_set():
            sizes.add((len(content := path.read_bytes()), len(set(content))))

    reader = threading.Thread(target=read)
    reader.start()
    for letter in b"abcdefgh" * 5:
        write_bytes(path, bytes([letter]) * 100_000)
    stop.set()
    reader.join()
    assert sizes == {(100_000, 1)}


def test_a_file_is_overwritten_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "attempts.json"
    with pytest.raises(FileNotFoundError):
        overwrite_json(path, {"a": 1})
    assert list(tmp_path.iterdir()) == []
    write_json(path, {"a": 1})
    for document in ({"a": [1, 2, 3]}, {"a": "ü"}, {}):
        overwrite_json(path, document)
        assert read_json(path) == document


def test_a_file_that_is_taken_away_while_it_is_overwritten_stays_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "attempts.json"
    write_json(path, {"a": 1})
    really, length = os.fstat, path.stat().st_size

    def take_away(file: int) -> os.stat_result:
        path.unlink(missing_ok=True)
        return really(file)

    monkeypatch.setattr(os, "fstat", take_away)
    overwrite_json(path, {"a": 1, "longer": "x" * length})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_create_only_refuses_a_second_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOTSUP, "Operation not supported")

        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "recipe.json"
    create_json(path, {"first": 1})
    with pytest.raises(FileExistsError):
        create_json(path, {"second": 2})
    assert read_json(path) == {"first": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.json"]


def test_of_many_creators_one_wins(tmp_path: Path) -> None:
    path, won = tmp_path / "claim", []

    def create(number: int) -> None:
        try:
            create_bytes(path, str(number).encode())
        except FileExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_text()] == [str(number) for number in won]


def test_json_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        to_json({"loss": float("nan")})
    (tmp_path / "x.json").write_bytes(b'{"a": ')
    with pytest.raises(ValueError, match=r"x\.json: damaged"):
        read_json(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing.json")


def test_a_manifest_lists_every_file_but_temporary_ones(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("deep/b", b"2"), ("c", b"3")):
        write_bytes(tmp_path / name, content)
    (tmp_path / ".e.partial").write_bytes(b"")
    assert list(manifest(tmp_path)) == ["a", "c", "deep/b"]
    assert manifest(tmp_path, leave_out=frozenset({"a", "c"})) == {
        "deep/b": {"size": 1, "sha256": hashlib.sha256(b"2").hexdigest()}
    }
