"""A staged data set becomes three lists of examples that never mix: train, validation, test.

Three formats: parquet (`train*.parquet`, `test*.parquet`), folders of images (`train/<label>/*.jpg`), and chat JSONL
(`train.jsonl`: `{"messages": [...], "images": ["a.jpg"]}`, paths beside the file). Each split is read once, in order,
as a stream: nothing is converted or copied to disk, which in a container is memory too. Images stay encoded until a
batch needs them.
"""

import hashlib
import io
import random
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.lib
from PIL import Image, ImageOps, UnidentifiedImageError

from g4trainer.recipe import Data

TEST_SEED_OFFSET = 1  # the subset of the test split is drawn apart from that of the training split
READERS = 16  # image files read at once: over a mounted bucket the time goes into waiting
UNREADABLE = (OSError, ValueError, StopIteration, pyarrow.lib.ArrowException, datasets.exceptions.DatasetsError)
"""What `datasets` raises for a file that is empty, cut off or of another format."""
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError, struct.error, zlib.error)
"""What Pillow's readers raise for a damaged file, and its conversions for a mode without one to RGB."""


class DataError(ValueError):
    """Data that cannot be trained on; a retry cannot help."""


@dataclass(frozen=True)
class Example:
    """One question about one or several images, and its answer. Images come first, always."""

    id: str
    """Split and row of the staged data set, for example `train/17`."""
    images: tuple[bytes, ...]
    """Encoded files, as staged."""
    prompt: str
    answer: str

    def open_images(self) -> list[Image.Image]:
        """The images as RGB, turned upright. Raises DataError, with the example's id, where one cannot be read."""
        return [open_image(data, self.id) for data in self.images]


@dataclass(frozen=True)
class Splits:
    """The parts of a data set. `labels` is empty for `task = "chat"`."""

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    labels: tuple[str, ...]
    shared_images: int
    """Images of the test part that are also, byte for byte, in the training or validation part."""


@dataclass(frozen=True)
class _Row:
    """An example whose image files may not have been read yet."""

    id: str
    images: tuple[bytes | Path, ...]
    prompt: str
    answer: str


def load_splits(folder: Path, data: Data, *, seed: int) -> Splits:
    """Reads a staged data set and splits validation off its training part, by seed.

    Samples that show the same image, byte for byte, stay on one side of that split.
    Raises DataError: missing split or column, empty split, fewer than two classes, labels out of range or unnamed.
    """
    if data.task == "chat":
        labels: tuple[str, ...] = ()
        pool_rows, test_rows = (_chat_rows(folder, split, data) for split in ("train", "test"))
    else:
        labels, pool_rows, test_rows = _labelled_rows(folder, data)
    pool = _read_images(_subset(pool_rows, data.train_size, seed))
    test = _read_images(_subset(test_rows, data.test_size, seed + TEST_SEED_OFFSET))
    train, validation = _split_off(pool, data.validation_size, seed)
    if labels and len({example.answer for example in train}) < 2:
        raise DataError(
            f"data.train_size: the {len(train)} training samples are all {train[0].answer!r}; write a larger number."
        )
    seen = {digest for example in (*train, *validation) for digest in _digests(example)}
    shared = sum(digest in seen for example in test for digest in _digests(example))
    return Splits(train, validation, test, labels, shared)


def open_image(data: bytes, example_id: str) -> Image.Image:
    """An encoded image as RGB of 8 bits, upright by its EXIF tag, transparency over white.

    16-bit grey is scaled to 8 bits; 32-bit integers and floats from their own smallest to their largest value.
    Raises DataError with the example's id.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _as_rgb(image)
    except (*DAMAGED, Image.DecompressionBombError) as error:
        # Pillow's own words for an unknown format hold an address in memory.
        why = "its format is not known" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"{example_id}: the image cannot be read ({why}); replace the file or leave the sample out."
        ) from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        spread = (values.max() - values.min()) or 1.0
        image = Image.fromarray(((values - values.min()) / spread * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        transparent = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), transparent)
    return image if image.mode == "RGB" else image.convert("RGB")


def _open_split(folder: Path, split: str, data: Data) -> tuple[datasets.IterableDataset, Path]:
    """A split as a stream, and the folder that its paths start from. Raises DataError where it is missing."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parquet = [p for p in files if p.suffix == ".parquet" and p.name.startswith(split)]
    jsonl = [p for p in files if p.name == f"{split}.jsonl" and p.parent in (folder, folder / "data")]
    images = folder / split
    options: dict[str, Any]
    base = folder
    if parquet:
        options = {"path": "parquet", "data_files": [str(path) for path in parquet]}
    elif jsonl and data.task == "chat":
        options = {"path": "json", "data_files": [str(path) for path in jsonl]}
        base = jsonl[0].parent
    elif images.is_dir():
        options = {"path": "imagefolder", "data_dir": str(images)}
    else:
        raise _missing(folder, split, data, files)
    try:
        table = datasets.load_dataset(split="train", streaming=True, **options)
        if table.column_names is None:  # the first row could not be read to learn them
            next(iter(table))
    except datasets.data_files.EmptyDatasetError:
        raise _empty(folder, split) from None
    except UNREADABLE as error:
        raise _unreadable(folder, split, error) from error
    if not table.column_names:
        raise _empty(folder, split)
    return table, base


def _stream(table: datasets.IterableDataset, folder: Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with their ids. Raises DataError where the files cannot be read, or hold no row."""
    rows, number = iter(table), 0
    while True:
        try:
            row = next(rows, None)
        except UNREADABLE as error:
            raise _unreadable(folder, split, error) from error
        if row is None:
            break
        yield f"{split}/{number}", row
        number += 1
    if number == 0:
        raise _empty(folder, split)


def _missing(folder: Path, split: str, data: Data, files: Sequence[Path]) -> DataError:
    forms = {"chat": f"{split}.jsonl or {split}.parquet", "classify": f"{split}.parquet, or a folder {split}/<label>/"}
    found = ", ".join(path.relative_to(folder).as_posix() for path in files[:5]) or "nothing"
    return DataError(
        f'{folder}: no {split} split for data.task = "{data.task}"; got {found}. '
        f"Stage a data set with {forms[data.task]}."
    )


def _empty(folder: Path, split: str) -> DataError:
    return DataError(f"{folder}: the {split} split is empty; stage at least one sample of it.")


def _unreadable(folder: Path, split: str, error: Exception) -> DataError:
    reason = str(error.__cause__ or error).splitlines() or ["a file is empty"]
    return DataError(f"{folder}: the {split} split cannot be read: {reason[0]}; stage it again.")


def _labelled_rows(folder: Path, data: Data) -> tuple[tuple[str, ...], list[_Row], list[_Row]]:
    """The label names and the rows of the training and test splits."""
    tables = {split: _open_split(folder, split, data)[0] for split in ("train", "test")}
    for split, table in tables.items():
        _column(table, data.label_column, "label_column")
        tables[split] = _undecoded(table, data.image_column)
    labelled = {
        split: [
            (example_id, _label_of(row[data.label_column], table.features[data.label_column], example_id, data), row)
            for example_id, row in _stream(table, folder, split)
        ]
        for split, table in tables.items()
    }
    labels = _label_names(tables["train"].features[data.label_column], [name for _, name, _ in labelled["train"]], data)
    prompt, known = data.prompt.replace("{labels}", ", ".join(labels)), set(labels)
    rows: dict[str, list[_Row]] = {"train": [], "test": []}
    for split, triples in labelled.items():
        for example_id, name, row in triples:
            if name not in known:
                raise DataError(f"{example_id}: the label {name!r} is not among those of the training split.")
            images = _image_files(row[data.image_column], example_id, None)
            rows[split].append(_Row(example_id, images, prompt, name))
    return labels, rows["train"], rows["test"]


def _label_of(value: Any, feature: Any, example_id: str, data: Data) -> str:
    """A label's name without surrounding space, whether it is stored by its index or as text."""
    if isinstance(feature, datasets.ClassLabel):
        if not (isinstance(value, int) and 0 <= value < len(feature.names)):
            raise DataError(f"{example_id}: the label is {value}; it must be from 0 to {len(feature.names) - 1}.")
        return str(feature.names[value]).strip()
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        if not (value or "").strip():
            raise DataError(f"{example_id}: the label is empty; write its name, or leave the sample out.")
        return str(value).strip()
    raise DataError(
        f"data.label_column: {data.label_column!r} holds {feature}; write a column of ClassLabel or strings."
    )


def _label_names(feature: Any, used: Sequence[str], data: Data) -> tuple[str, ...]:
    """Names by class index: the ClassLabel's, or the sorted strings of the training split."""
    by_index = isinstance(feature, datasets.ClassLabel)
    names = tuple(name.strip() for name in feature.names) if by_index else tuple(sorted(set(used)))
    where = f"data.label_column: {data.label_column!r}"
    if not all(names):
        raise DataError(f"{where} has a class without a name; name it.")
    if len(names) < 2:
        raise DataError(f"{where} has the one class {', '.join(names)}; two are needed.")
    repeated = [name for name, count in Counter(name.casefold() for name in names).items() if count > 1]
    if repeated:
        raise DataError(f"{where}: the class name {repeated[0]!r} is there twice; make the names distinct.")
    return names


def _chat_rows(folder: Path, split: str, data: Data) -> list[_Row]:
    """One user turn with images and one answer a row; `images` are paths beside the file, or encoded in a parquet."""
    table, base = _open_split(folder, split, data)
    _column(table, "messages", "task")
    column = data.image_column if data.image_column in table.column_names else "images"
    _column(table, column, "image_column")
    if not _holds_paths(table.features[column]):
        table = _undecoded(table, column)
    rows = []
    for example_id, row in _stream(table, folder, split):
        prompt, answer, placeholders = _one_exchange(row["messages"], example_id)
        files = _image_files(row[column], example_id, base)
        if placeholders not in (0, len(files)):
            raise DataError(
                f"{example_id}: the user turn shows {placeholders} images, the row has {len(files)}; make them agree."
            )
        rows.append(_Row(example_id, files, prompt, answer))
    return rows


def _one_exchange(messages: Any, example_id: str) -> tuple[str, str, int]:
    """The user's text, the answer, and the number of image parts. Raises DataError on any other form."""
    listed = messages if isinstance(messages, list) else []
    roles = [message.get("role") for message in listed]
    if roles not in (["user", "assistant"], ["user", "model"]):
        raise DataError(f'{example_id}: got the turns {roles}; write one "user" turn and one "assistant" turn.')
    user, model = listed
    if isinstance(user["content"], str):
        return _text_of(user, example_id), _text_of(model, example_id), 0
    kinds = [part.get("type") for part in user["content"] or ()]
    strange = sorted({str(kind) for kind in kinds} - {"image", "text"})
    if strange:
        raise DataError(f'{example_id}: got a part of type {strange[0]!r}; write parts of type "image" or "text".')
    if kinds != sorted(kinds):  # "image" before "text"
        raise DataError(f"{example_id}: text comes before an image; write the images first.")
    return _text_of(user, example_id), _text_of(model, example_id), kinds.count("image")


def _text_of(message: dict[str, Any], example_id: str) -> str:
    content = message["content"]
    parts = [content] if isinstance(content, str) else [p.get("text") for p in content or () if p.get("type") == "text"]
    text = "\n".join(part for part in parts if part).strip()
    if not text:
        raise DataError(f"{example_id}: the {message['role']} turn has no text; write one.")
    return text


def _column(table: datasets.IterableDataset, name: str, option: str) -> None:
    if name not in table.column_names:
        raise DataError(f"data.{option}: got {name!r}; write one of the columns {', '.join(table.column_names)}.")


def _holds_paths(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature)
    return isinstance(inner, datasets.Value) and inner.dtype in ("string", "large_string", "null")


def _undecoded(table: datasets.IterableDataset, column: str) -> datasets.IterableDataset:
    """The same with a column of images that are not decoded. Raises DataError where it holds no images."""
    _column(table, column, "image_column")
    feature = table.features[column]
    inner = getattr(feature, "feature", feature)
    if not isinstance(inner, datasets.Image):
        raise DataError(f"data.image_column: {column!r} holds {feature}; write a column of images.")
    raw: Any = datasets.Image(decode=False)
    return table.cast_column(column, raw if inner is feature else datasets.List(raw))


def _image_files(images: Any, example_id: str, base: Path | None) -> tuple[bytes | Path, ...]:
    """Encoded files of one row, or where they lie: `{"bytes", "path"}` structures, or paths below `base`."""
    listed = images if isinstance(images, list) else [images]
    files: list[bytes | Path] = []
    for image in listed:
        record = image if isinstance(image, dict) else {"bytes": None, "path": image}
        if record["bytes"] is not None:
            files.append(record["bytes"])
        elif record["path"]:
            files.append(_below(base, record["path"], example_id) if base else Path(record["path"]))
        else:
            raise DataError(f"{example_id}: there is no image; add one, or leave the sample out.")
    if not files:
        raise DataError(f"{example_id}: there is no image; add one, or leave the sample out.")
    return tuple(files)


def _below(base: Path, path: str, example_id: str) -> Path:
    root = base.resolve()
    full = (root / path).resolve()
    if not full.is_relative_to(root):
        raise DataError(f"{example_id}: the image path {path!r} leads out of the data set; write one inside it.")
    return full


def _read_images(rows: Sequence[_Row]) -> list[Example]:
    """Reads the files of the rows that are needed, several at a time. Raises DataError where one cannot be read."""

    def read(row: _Row) -> Example:
        try:
            files = tuple(file if isinstance(file, bytes) else file.read_bytes() for file in row.images)
        except OSError as error:
            raise DataError(f"{row.id}: the image {error.filename!r} cannot be read: {error.strerror}.") from error
        return Example(row.id, files, row.prompt, row.answer)

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read, rows))


def _subset(rows: list[_Row], size: int | str, seed: int) -> list[_Row]:
    """The first `size` of a shuffle by seed, in their original order, so that a larger subset holds the smaller one."""
    if size == "all" or int(size) >= len(rows):
        return rows
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)  # noqa: S311 no secret
    return [rows[index] for index in sorted(order[: int(size)])]


def _split_off(pool: list[Example], size: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Train and validation. A fraction is rounded, and takes at least one sample.

    Samples of the same images move together, so that validation never measures what was trained on; where they do,
    validation may take a few more than were asked for.
    """
    if size == 0:
        return pool, []
    wanted = size if isinstance(size, int) else max(1, round(size * len(pool)))
    groups: dict[tuple[bytes, ...], list[int]] = {}
    for index, example in enumerate(pool):
        groups.setdefault(_digests(example), []).append(index)
    order = list(groups.values())
    random.Random(seed).shuffle(order)  # noqa: S311 no secret
    held_out: set[int] = set()
    for group in order:
        if len(held_out) >= wanted:
            break
        held_out.update(group)
    if len(held_out) >= len(pool):
        raise DataError(
            f"data.validation_size: got {size}, which leaves none of the {len(pool)} training samples; write less."
        )
    train = [example for index, example in enumerate(pool) if index not in held_out]
    return train, [pool[index] for index in sorted(held_out)]


def _digests(example: Example) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(image).digest() for image in example.images)
