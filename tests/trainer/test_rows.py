"""Rows are counted without pyarrow, as pyarrow counts them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from g4trainer.rows import count_rows, missing_splits, parquet_rows


def counted(folder: Path) -> dict[str, int]:
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}

    def read(name: str, start: int, count: int) -> bytes:
        return (folder / name).read_bytes()[start : start + count]

    return count_rows(sizes, read)


def table(rows: int) -> pyarrow.Table:
    images = [{"bytes": b"x" * 50, "path": f"{row}.png"} for row in range(rows)]
    columns: dict[str, Any] = {"image": images, "label": [row % 7 for row in range(rows)], "ok": [True] * rows}
    made = pyarrow.table(columns | {"scores": [[1.0, 2.0]] * rows})
    return made.replace_schema_metadata({"huggingface": "{}" * 3000})


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize(
    "options", [{}, {"version": "1.0"}, {"row_group_size": 7, "write_page_index": True}, {"compression": "zstd"}]
)
def test_rows_of_a_parquet_file(tmp_path: Path, rows: int, options: dict[str, Any]) -> None:
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(table(rows), path, **options)
    assert counted(tmp_path) == {"train": rows}
    assert rows == pyarrow.parquet.read_metadata(path).num_rows


def test_shards_add_up_and_splits_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, rows in (("train-00000-of-00002", 5), ("train-00001-of-00002", 6), ("test-00000-of-00001", 2)):
        pyarrow.parquet.write_table(table(rows), tmp_path / "data" / f"{name}.parquet")
    assert counted(tmp_path) == {"train": 11, "test": 2}


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["train.parquet", "data/test-00000-of-00001.parquet"], []),
        (["data/train.jsonl", "test.jsonl", "photos/a.jpg"], []),
        (["train/cat/a.jpg"], ["test"]),
        (["cat/a.jpg", "trains.jsonl", "notes/test/a.jpg"], ["train", "test"]),
    ],
)
def test_splits_without_a_file(names: list[str], missing: list[str]) -> None:
    assert missing_splits(names) == missing


def test_images_in_folders_and_lines_of_chats(tmp_path: Path) -> None:
    for name in ("train/cat/1.jpg", "train/cat/2.PNG", "train/dog/1.jpeg", "train/notes.txt", "test/dog/9.webp"):
        (tmp_path / "folders" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folders" / name).write_bytes(b"")
    assert counted(tmp_path / "folders") == {"train": 3, "test": 1}
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "train.jsonl").write_text('{"a": 1}\n\n{"b": "' + "x" * 3_000_000 + '"}\n{"c": 3}')
    assert counted(tmp_path / "chat") == {"train": 3}


@pytest.mark.parametrize(
    "spoil",
    [lambda data: b"", lambda data: data[:-1], lambda data: data[: len(data) // 2], lambda data: b"x" * 100],
)
def test_what_is_no_parquet_file_is_not_counted(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    pyarrow.parquet.write_table(table(10), tmp_path / "train.parquet")
    whole = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(spoil(whole))
    pyarrow.parquet.write_table(table(4), tmp_path / "test.parquet")
    assert counted(tmp_path) == {"test": 4}


LIST_OF_BYTES, STRUCT, NUM_ROWS = b"\x19\xf3", b"\x1c", b"\x36"
"""Heads of fields in Thrift's compact protocol; the last one of field 3, read first, with its number."""


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "footer",
    [
        pytest.param(LIST_OF_BYTES + b"\xff" * 8 + b"\x7f" + bytes(20), id="a list longer than the file"),
        pytest.param(STRUCT * 100_000, id="structs in structs"),
        pytest.param(b"\x19" * 100_000, id="lists in lists"),
        pytest.param(NUM_ROWS + b"\xff" * 1_000_000 + b"\x01", id="a number of a million bytes"),
        pytest.param(NUM_ROWS + b"\x01\x00", id="rows below zero"),
        pytest.param(b"\x18\x7fshort", id="text beyond the end"),
    ],
)
def test_a_footer_of_nonsense_is_refused(footer: bytes) -> None:
    file = b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    with pytest.raises((ValueError, IndexError)):
        parquet_rows(len(file), lambda start, count: file[start : start + count])


def test_a_damaged_byte_of_a_footer_does_no_harm(tmp_path: Path) -> None:
    """The rows are counted as before where the byte does not matter, else wrongly or not at all; it never crashes."""
    pyarrow.parquet.write_table(table(10), tmp_path / "train.parquet")
    path = tmp_path / "train.parquet"
    whole, seen = path.read_bytes(), set()
    start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for at in range(start, start + 300):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        seen.add(counted(tmp_path).get("train"))
    assert {10, None} <= seen
    assert all(rows is None or rows >= 0 for rows in seen)
