"""How many rows a data set's splits have, from file names, a parquet file's footer, or a JSONL file's lines.

Only the standard library: the command line counts while it stages, where neither pyarrow nor datasets need be there.
The splits are found as g4trainer.dataset finds them.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import PurePosixPath

SPLITS = ("train", "test")
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
"""Common endings of the images that `datasets` takes from a folder; a file of another ending is not counted."""
BLOCK_BYTES = 1 << 20
MAX_JSONL_BYTES = 1 << 30
"""A larger file is not read to count its lines."""
MAGIC = b"PAR1"
NUM_ROWS = 3
"""Field of parquet's FileMetaData, see parquet.thrift of apache/parquet-format."""
STOP, TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(13)
"""Types of Thrift's compact protocol."""
VARINT_BYTES = 10
"""Of the longest number of 64 bits."""
DEPTH = 64
"""Structs and lists within one another; parquet's own go less than ten deep."""

Read = Callable[[str, int, int], bytes]
"""Bytes of a file by its name, a start and a count."""


def count_rows(sizes: Mapping[str, int], read: Read) -> dict[str, int]:
    """Rows by split; a split that is not there, or cannot be counted, is left out.

    sizes: bytes of each file by its path in the data set.
    """
    return {split: rows for split in SPLITS if (rows := _rows_of(split, sizes, read)) is not None}


def missing_splits(names: Iterable[str]) -> list[str]:
    """Splits that no file belongs to, in any of the forms that g4trainer.dataset knows.

    names: the files' paths in the data set.
    """
    paths = [PurePosixPath(name) for name in names]
    return [split for split in SPLITS if not any(_belongs(path, split) for path in paths)]


def _belongs(path: PurePosixPath, split: str) -> bool:
    parquet = path.suffix == ".parquet" and path.name.startswith(split)
    return parquet or path.as_posix() in (f"{split}.jsonl", f"data/{split}.jsonl") or path.parts[0] == split


def _rows_of(split: str, sizes: Mapping[str, int], read: Read) -> int | None:
    parquet = [n for n in sizes if n.endswith(".parquet") and PurePosixPath(n).name.startswith(split)]
    jsonl = [name for name in (f"{split}.jsonl", f"data/{split}.jsonl") if name in sizes]
    images = [n for n in sizes if n.startswith(f"{split}/") and PurePosixPath(n).suffix.lower() in IMAGES]
    try:
        if parquet:
            return sum(parquet_rows(sizes[name], partial(read, name)) for name in parquet)
        if jsonl:
            return None if sizes[jsonl[0]] > MAX_JSONL_BYTES else _lines(jsonl[0], sizes[jsonl[0]], read)
    except (ValueError, IndexError):  # no such file: whoever trains on it says so
        return None
    return len(images) or None


def parquet_rows(size: int, read: Callable[[int, int], bytes]) -> int:
    """Rows of a parquet file, from the metadata at its end. Raises ValueError or IndexError where it is none."""
    tail = read(size - 8, 8) if size > 12 else b""
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != MAGIC or not 0 < length <= size - 12:
        raise ValueError("not a parquet file")
    return _Compact(read(size - 8 - length, length)).field(NUM_ROWS)


class _Compact:
    """Reads one struct of Thrift's compact protocol, for one whole number in it."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._depth = 0

    def field(self, wanted: int) -> int:
        number = 0
        while (head := self._byte()) & 0x0F != STOP:
            number = number + (head >> 4) if head >> 4 else self._integer()
            if number == wanted and head & 0x0F in (I16, I32, I64):
                return self._whole_number()
            self._skip(head & 0x0F)
        raise ValueError(f"no field {wanted}")

    def _skip(self, kind: int) -> None:
        if kind == BYTE:
            self._at += 1
        elif kind in (I16, I32, I64):
            self._varint()
        elif kind == DOUBLE:
            self._at += 8
        elif kind == BINARY:
            length = self._varint()
            self._at += length
        elif kind in (LIST, SET, MAP, STRUCT):
            self._depth += 1
            if self._depth > DEPTH:
                raise ValueError(f"containers nested more than {DEPTH} deep")
            self._skip_container(kind)
            self._depth -= 1
        elif kind not in (TRUE, FALSE):
            raise ValueError(f"no type {kind}")

    def _skip_container(self, kind: int) -> None:
        if kind in (LIST, SET):
            head = self._byte()
            count = self._elements(self._varint() if head >> 4 == 15 else head >> 4)
            for _ in range(count):
                self._skip_element(head & 0x0F)
        elif kind == MAP:
            count = self._elements(self._varint())
            kinds = self._byte() if count else 0
            for _ in range(count):
                self._skip_element(kinds >> 4)
                self._skip_element(kinds & 0x0F)
        else:
            while (head := self._byte()) & 0x0F != STOP:
                if not head >> 4:
                    self._varint()
                self._skip(head & 0x0F)

    def _skip_element(self, kind: int) -> None:
        """In a container a truth value takes a byte; as a field of a struct it is in the field's head."""
        if kind in (TRUE, FALSE):
            self._at += 1
        else:
            self._skip(kind)

    def _elements(self, count: int) -> int:
        """A container's count. Each element takes a byte at least, so a larger count than bytes are left is none."""
        if count > len(self._data) - self._at:
            raise ValueError(f"a container of {count} elements")
        return count

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _varint(self) -> int:
        value = 0
        for index in range(VARINT_BYTES):
            byte = self._byte()
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                return value
        raise ValueError(f"a number of more than {VARINT_BYTES} bytes")

    def _integer(self) -> int:
        """Zigzag: the sign is the lowest bit."""
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _whole_number(self) -> int:
        number = self._integer()
        if number < 0:
            raise ValueError(f"{number} rows")
        return number


def _lines(name: str, size: int, read: Read) -> int:
    """Lines that are not blank."""
    count, rest = 0, b""
    for start in range(0, size, BLOCK_BYTES):
        *lines, rest = (rest + read(name, start, min(BLOCK_BYTES, size - start))).split(b"\n")
        count += sum(bool(line.strip()) for line in lines)
    return count + bool(rest.strip())
