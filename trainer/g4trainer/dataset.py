"""A staged data set becomes three lists of examples that never mix: train, validation, test.

Three formats: parquet (`train*.parquet`, `test*.parquet`), folders of images (`train/<label>/*.jpg`), and chat JSONL
(`train.jsonl`: `{"messages": [...], "images": ["a.jpg"]}`). Images stay encoded until a batch needs them.
"""

import hashlib
import io
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL
from PIL import Image, ImageOps

from g4trainer.recipe import Data

TEST_SEED_OFFSET = 1  # the subset of the test split is drawn apart from that of the training split


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


def load_splits(folder: Path, data: Data, *, seed: int) -> Splits:
    """Reads a staged data set and splits validation off its training part, by seed.

    Raises DataError: missing split or column, empty split, fewer than two classes, labels out of range or unnamed.
    """
    staged = _read(folder, data)
    for split in ("train", "test"):
        if split not in staged:
            raise DataError(
                f"{folder}: no {split} split; got {', '.join(staged) or 'no data files'}. Stage a data set with "
                f"train.parquet and test.parquet, folders train/ and test/, or train.jsonl and test.jsonl."
            )
        if len(staged[split]) == 0:
            raise DataError(f"{folder}: the {split} split is empty; stage at least one sample of it.")
    if data.task == "chat":
        labels: tuple[str, ...] = ()
        pool, test = (_chat_examples(folder, staged[split], split, data) for split in ("train", "test"))
    else:
        labels = _label_names(staged, data)
        prompt = data.prompt.replace("{labels}", ", ".join(labels))
        pool, test = (_label_examples(staged[split], split, data, labels, prompt) for split in ("train", "test"))
    pool = _subset(pool, data.train_size, seed)
    train, validation = _split_off(pool, data.validation_size, seed)
    test = _subset(test, data.test_size, seed + TEST_SEED_OFFSET)
    if labels and len({example.answer for example in train}) < 2:
        raise DataError(
            f"data.train_size: the {len(train)} training samples are all {train[0].answer!r}; write a larger number."
        )
    seen = {image for example in (*train, *validation) for image in map(_digest, example.images)}
    shared = sum(digest in seen for example in test for digest in map(_digest, example.images))
    return Splits(train, validation, test, labels, shared)


def open_image(data: bytes, example_id: str) -> Image.Image:
    """An encoded image as RGB of 8 bits, upright by its EXIF tag, transparency over white.

    16-bit grey is scaled to 8 bits; 32-bit integers and floats from their own smallest to their largest value.
    Raises DataError with the example's id.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise DataError(
            f"{example_id}: the image cannot be read ({error}); replace the file or leave the sample out."
        ) from error
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        spread = (values.max() - values.min()) or 1.0
        image = Image.fromarray(((values - values.min()) / spread * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        transparent = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), transparent)
    return image.convert("RGB")


def _read(folder: Path, data: Data) -> dict[str, datasets.Dataset]:
    """The splits of a staged folder as they are, images still encoded."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    splits: dict[str, datasets.Dataset] = {}
    # The converted copy lives as long as the process: the memory map stays open after the folder is gone.
    with tempfile.TemporaryDirectory(prefix="g4trainer-") as cache:
        for split in ("train", "test"):
            parquet = [str(p) for n, p in files.items() if n.endswith(".parquet") and Path(n).name.startswith(split)]
            jsonl = [str(p) for n, p in files.items() if n in (f"{split}.jsonl", f"data/{split}.jsonl")]
            images = folder / split
            options: dict[str, Any] = {"split": "train", "cache_dir": cache, "keep_in_memory": True}
            try:
                if parquet:
                    splits[split] = datasets.load_dataset("parquet", data_files=parquet, **options)
                elif jsonl and data.task == "chat":
                    splits[split] = datasets.load_dataset("json", data_files=jsonl, **options)
                elif images.is_dir():
                    splits[split] = datasets.load_dataset("imagefolder", data_dir=str(images), **options)
            except datasets.exceptions.DatasetGenerationError as error:
                raise DataError(f"{folder}: the {split} split cannot be read: {error.__cause__ or error}.") from error
    return splits


def _column(table: datasets.Dataset, name: str, option: str) -> None:
    if name not in table.column_names:
        raise DataError(f"data.{option}: got {name!r}; write one of the columns {', '.join(table.column_names)}.")


def _label_names(staged: dict[str, datasets.Dataset], data: Data) -> tuple[str, ...]:
    """Names by class index: the ClassLabel's, or the sorted strings of the training split."""
    for table in staged.values():
        _column(table, data.label_column, "label_column")
        _column(table, data.image_column, "image_column")
    feature = staged["train"].features[data.label_column]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
    elif isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        column = staged["train"][data.label_column]
        empty = [row for row, value in enumerate(column) if not (value or "").strip()]
        if empty:
            raise DataError(f"train/{empty[0]}: the label is empty; write its name, or leave the sample out.")
        names = tuple(sorted(set(column)))
    else:
        raise DataError(
            f"data.label_column: {data.label_column!r} holds {feature}; write a column of ClassLabel or strings."
        )
    if len(names) < 2:
        raise DataError(
            f"data.label_column: {data.label_column!r} has the one class {', '.join(names)}; two are needed."
        )
    repeated = [name for name, count in Counter(name.casefold() for name in names).items() if count > 1]
    if repeated:
        raise DataError(f"data.label_column: the class name {repeated[0]!r} is there twice; make the names distinct.")
    return names


def _label_examples(
    table: datasets.Dataset, split: str, data: Data, labels: tuple[str, ...], prompt: str
) -> list[Example]:
    feature = table.features[data.label_column]
    by_index = isinstance(feature, datasets.ClassLabel)
    if by_index and tuple(feature.names) != labels:
        raise DataError(
            f"data.label_column: the class names of train and {split} differ; stage them with the same ones."
        )
    known = set(labels)
    examples = []
    for row, (value, image) in enumerate(zip(table[data.label_column], _encoded(table, data), strict=True)):
        if by_index and not (isinstance(value, int) and 0 <= value < len(labels)):
            raise DataError(f"{split}/{row}: the label is {value}; it must be from 0 to {len(labels) - 1}.")
        answer = labels[value] if by_index else value
        if answer not in known:
            raise DataError(f"{split}/{row}: the label {answer!r} is not among those of the training split.")
        examples.append(Example(f"{split}/{row}", _image_bytes(image, f"{split}/{row}", None), prompt, answer))
    return examples


def _chat_examples(folder: Path, table: datasets.Dataset, split: str, data: Data) -> list[Example]:
    """One user turn with images and one answer a row; `images` are paths beside it, or encoded in a parquet."""
    _column(table, "messages", "task")
    encoded = _encoded(table, data) if data.image_column in table.column_names else None
    examples = []
    for row in range(len(table)):
        example_id = f"{split}/{row}"
        record = table[row]
        images = encoded[row] if encoded is not None else record.get("images")
        prompt, answer, placeholders = _one_exchange(record["messages"], example_id)
        files = _image_bytes(images, example_id, folder)
        if placeholders not in (0, len(files)):
            raise DataError(
                f"{example_id}: the user turn shows {placeholders} images, the row has {len(files)}; make them agree."
            )
        examples.append(Example(example_id, files, prompt, answer))
    return examples


def _one_exchange(messages: Any, example_id: str) -> tuple[str, str, int]:
    """The user's text, the answer, and the number of image parts. Raises DataError on any other form."""
    roles = [message.get("role") for message in messages or ()]
    if roles not in (["user", "assistant"], ["user", "model"]):
        raise DataError(f'{example_id}: got the turns {roles}; write one "user" turn and one "assistant" turn.')
    parts = messages[0]["content"]
    if isinstance(parts, str):
        return parts, _text_of(messages[1], example_id), 0
    kinds = [part.get("type") for part in parts]
    if kinds != sorted(kinds, key=lambda kind: kind != "image"):
        raise DataError(f"{example_id}: text comes before an image; write the images first.")
    return _text_of(messages[0], example_id), _text_of(messages[1], example_id), kinds.count("image")


def _text_of(message: Any, example_id: str) -> str:
    content = message["content"]
    text = content if isinstance(content, str) else "\n".join(p["text"] for p in content if p.get("type") == "text")
    if not text.strip():
        raise DataError(f"{example_id}: the {message['role']} turn has no text; write one.")
    return text


def _encoded(table: datasets.Dataset, data: Data) -> Any:
    """The image column without decoding it."""
    feature = table.features[data.image_column]
    inner = getattr(feature, "feature", feature)
    if not isinstance(inner, datasets.Image):
        raise DataError(f"data.image_column: {data.image_column!r} holds {feature}; write a column of images.")
    raw: Any = datasets.Image(decode=False)
    if inner is not feature:
        raw = datasets.List(raw)
    return table.cast_column(data.image_column, raw)[data.image_column]


def _image_bytes(images: Any, example_id: str, folder: Path | None) -> tuple[bytes, ...]:
    """Encoded files of one row: `{"bytes", "path"}` structures, or paths below the staged folder."""
    listed = images if isinstance(images, list) else [images] if images is not None else []
    if not listed:
        raise DataError(f"{example_id}: there is no image; add one, or leave the sample out.")
    files = []
    for image in listed:
        path = image if isinstance(image, str) else image.get("path")
        content = None if isinstance(image, str) else image.get("bytes")
        if content is None:
            content = _read_file(path, example_id, folder)
        files.append(content)
    return tuple(files)


def _read_file(path: str | None, example_id: str, folder: Path | None) -> bytes:
    if not path:
        raise DataError(f"{example_id}: there is no image; add one, or leave the sample out.")
    full = Path(path)
    if folder is not None:
        full = (folder / path).resolve()
        if not full.is_relative_to(folder.resolve()):
            raise DataError(f"{example_id}: the image path {path!r} leads out of the data set; write one inside it.")
    try:
        return full.read_bytes()
    except OSError as error:
        raise DataError(f"{example_id}: the image {path!r} cannot be read: {error.strerror}.") from error


def _subset(examples: list[Example], size: int | str, seed: int) -> list[Example]:
    """The first `size` of a shuffle by seed, in their original order, so that a larger subset holds the smaller one."""
    if size == "all" or int(size) >= len(examples):
        return examples
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)  # noqa: S311 no secret
    return [examples[index] for index in sorted(order[: int(size)])]


def _split_off(pool: list[Example], size: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Train and validation. A fraction is rounded, and takes at least one sample."""
    if size == 0:
        return pool, []
    count = size if isinstance(size, int) else max(1, round(size * len(pool)))
    if count >= len(pool):
        raise DataError(
            f"data.validation_size: got {size}, which leaves none of the {len(pool)} training samples; write less."
        )
    order = list(range(len(pool)))
    random.Random(seed).shuffle(order)  # noqa: S311 no secret
    held_out = set(order[:count])
    train = [example for index, example in enumerate(pool) if index not in held_out]
    return train, [pool[index] for index in sorted(held_out)]


def _digest(image: bytes) -> bytes:
    return hashlib.sha256(image).digest()
