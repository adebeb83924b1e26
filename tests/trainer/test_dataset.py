"""Staged data in every format, images of every mode, parts that never mix, and each fault in one message."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from PIL import Image

from g4trainer.dataset import DataError, Splits, load_splits, open_image
from g4trainer.recipe import Data
from trainer.making import encoded, picture

NAMES = ["cat", "dog", "eel"]


def photo(seed: int) -> bytes:
    return encoded(picture(4, 3, seed=seed))


def rows(count: int, *, first: int = 0) -> dict[str, list[Any]]:
    """`count` different images, their labels in turn."""
    images = [{"bytes": photo(first + n), "path": None} for n in range(count)]
    return {"image": images, "label": [n % len(NAMES) for n in range(count)]}


def parquet(folder: Path, name: str, table: dict[str, list[Any]], label: Any = None) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": label or datasets.ClassLabel(names=NAMES)})
    path = folder / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(path))


def staged(folder: Path, train: int = 12, test: int = 6) -> Path:
    parquet(folder, "train", rows(train))
    parquet(folder, "test", rows(test, first=1000))
    return folder


def load(folder: Path, *, seed: int = 42, **options: Any) -> Splits:
    return load_splits(folder, Data.model_validate({"dataset": "d", **options}), seed=seed)


def ids(examples: Any) -> list[str]:
    return [example.id for example in examples]


# Formats


def test_parquet_with_class_labels(tmp_path: Path) -> None:
    splits = load(staged(tmp_path), prompt="One of: {labels}?")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (11, 1, 6)
    assert splits.labels == ("cat", "dog", "eel")
    first = splits.train[0]
    assert (first.id, first.prompt, first.answer) == ("train/0", "One of: cat, dog, eel?", "cat")
    assert first.images == (photo(0),)
    assert splits.shared_images == 0


def test_parquet_in_shards_under_data_as_the_hub_has_it(tmp_path: Path) -> None:
    parquet(tmp_path / "data", "train-00000-of-00002", rows(3))
    parquet(tmp_path / "data", "train-00001-of-00002", rows(3, first=50))
    parquet(tmp_path / "data", "test-00000-of-00001", rows(3, first=100))
    splits = load(tmp_path, validation_size=0)
    assert [example.images[0] for example in splits.train] == [photo(n) for n in (0, 1, 2, 50, 51, 52)]


def test_labels_as_text_are_sorted_and_stripped(tmp_path: Path) -> None:
    for name, first in (("train", 0), ("test", 90)):
        table = {**rows(4, first=first), "label": ["猫", " dog ", "dog", "猫"]}
        parquet(tmp_path, name, table, datasets.Value("string"))
    splits = load(tmp_path, validation_size=0)
    assert splits.labels == ("dog", "猫")
    assert [example.answer for example in splits.train] == ["猫", "dog", "dog", "猫"]


def test_folders_of_images_even_where_test_lacks_a_class(tmp_path: Path) -> None:
    for number, place in enumerate(("train/cat", "train/dog", "train/eel", "test/eel", "test/dog")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "1.png").write_bytes(photo(number))
    splits = load(tmp_path, validation_size=0)
    assert [(example.id, example.answer) for example in splits.test] == [("test/0", "dog"), ("test/1", "eel")]
    assert [example.images for example in splits.test] == [(photo(4),), (photo(3),)]


def chat(*images: str, user: Any = "What?", answer: Any = "This.") -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}],
        "images": list(images),
    }


def staged_chat(folder: Path, *train: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.png").write_bytes(photo(1))
    (folder / "b.png").write_bytes(photo(2))
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, train)))
    (folder / "test.jsonl").write_text(json.dumps(chat("b.png")))
    return folder


@pytest.mark.parametrize("below", ["", "data"])
def test_chat_as_json_lines_with_text_or_parts(tmp_path: Path, below: str) -> None:
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]
    folder = staged_chat(tmp_path / below, chat("a.png"), chat("a.png", "b.png", user=parts, answer=[parts[2]]))
    splits = load(folder if below == "" else tmp_path, task="chat", validation_size=0)
    assert splits.labels == ()
    assert [(e.prompt, e.answer, e.images) for e in splits.train] == [
        ("What?", "This.", (photo(1),)),
        ("Which?", "Which?", (photo(1), photo(2))),
    ]


def test_chat_as_parquet_with_images_inside(tmp_path: Path) -> None:
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"messages": [message], "images": datasets.List(datasets.Image())})
    for name, seed in (("train", 1), ("test", 2)):
        table = {"messages": [chat()["messages"]], "images": [[{"bytes": photo(seed), "path": None}]]}
        datasets.Dataset.from_dict(table, features=features).to_parquet(str(tmp_path / f"{name}.parquet"))
    splits = load(tmp_path, task="chat", validation_size=0)
    assert [(e.prompt, e.answer, e.images) for e in (*splits.train, *splits.test)] == [
        ("What?", "This.", (photo(1),)),
        ("What?", "This.", (photo(2),)),
    ]


# Parts


def test_the_parts_are_the_same_for_a_seed_and_others_for_another(tmp_path: Path) -> None:
    staged(tmp_path, train=30)
    options = {"validation_size": 6, "train_size": 20, "test_size": 3}
    one, again, other = (load(tmp_path, seed=seed, **options) for seed in (1, 1, 2))
    assert one == again
    assert (len(one.train), len(one.validation), len(one.test)) == (14, 6, 3)
    assert not set(ids(one.train)) & set(ids(one.validation))
    assert ids(one.validation) != ids(other.validation)
    assert ids(one.train) == sorted(ids(one.train), key=lambda name: int(name.split("/")[1]))


def test_a_larger_subset_holds_the_smaller_one(tmp_path: Path) -> None:
    staged(tmp_path, train=30)
    small, large = (ids(load(tmp_path, validation_size=0, train_size=size).train) for size in (9, 20))
    assert (len(small), len(large)) == (9, 20)
    assert set(small) < set(large)


def test_samples_of_one_image_stay_on_one_side(tmp_path: Path) -> None:
    table = rows(12)
    table["image"] = [table["image"][n // 3] for n in range(12)]  # four images, three samples each
    parquet(tmp_path, "train", table)
    parquet(tmp_path, "test", rows(3, first=99))
    for seed in range(8):
        splits = load(tmp_path, seed=seed, validation_size=2)
        assert len(splits.validation) == 3
        shown = [{e.images for e in part} for part in (splits.train, splits.validation)]
        assert not shown[0] & shown[1]


def test_test_images_that_are_also_trained_on_are_counted(tmp_path: Path) -> None:
    parquet(tmp_path, "train", rows(12))
    parquet(tmp_path, "test", {key: value[:3] for key, value in rows(12, first=9).items()})
    assert load(tmp_path, validation_size=0).shared_images == 3


@given(st.integers(2, 40), st.floats(0, 0.45), st.integers(0, 5))  # more than a third are left: of two classes
@budget(max_examples=20, deadline=None, derandomize=True)
def test_train_and_validation_are_the_pool(
    tmp_path_factory: pytest.TempPathFactory, count: int, share: float, seed: int
) -> None:
    folder = staged(tmp_path_factory.mktemp("pool"), train=count + 4)
    splits = load(folder, seed=seed, validation_size=share, train_size=count + 4)
    wanted = max(1, round(share * (count + 4))) if share else 0
    assert len(splits.validation) == wanted
    assert sorted([*ids(splits.train), *ids(splits.validation)]) == sorted(f"train/{n}" for n in range(count + 4))


# Images


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"])
def test_images_of_every_mode_become_rgb(mode: str) -> None:
    image = picture(5, 4).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    kind = "TIFF" if mode in ("CMYK", "YCbCr", "I", "F", "I;16") else "PNG"
    made = open_image(encoded(image, kind), "train/0")
    assert (made.mode, made.size) == ("RGB", (5, 4))
    if mode in ("L", "I;16"):
        assert np.array_equal(np.asarray(made), np.asarray(picture(5, 4).convert("L").convert("RGB")))


def test_transparency_is_laid_over_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    made = open_image(encoded(image), "train/0")
    assert [made.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (255, 0, 0)]


def test_photos_are_turned_upright_by_their_exif_tag() -> None:
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 255, 255))
    tags = Image.Exif()
    tags[0x0112] = 6  # turn by 90 degrees to the right
    made = open_image(encoded(image, "PNG", exif=tags), "train/0")
    assert made.size == (1, 2)
    assert [made.getpixel((0, y)) for y in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


@given(st.binary(max_size=200) | st.integers(0, 400).map(lambda n: encoded(picture(9, 9))[:n]))
@budget(max_examples=200, deadline=None, derandomize=True)
def test_damaged_images_are_refused_with_the_sample_s_id(data: bytes) -> None:
    whole = len(encoded(picture(9, 9)))
    assert len(data) < whole or data == encoded(picture(9, 9))[: len(data)]
    try:
        open_image(data, "train/7")
    except DataError as error:
        assert str(error).startswith("train/7: the image cannot be read (")  # noqa: PT017 either is right
    else:
        Image.open(io.BytesIO(data)).load()  # Pillow itself finds it whole


# Faults


def broken(folder: Path, change: Callable[[Path], Any]) -> None:
    staged(folder)
    change(folder)


def _label_of_no_class(folder: Path) -> None:
    table = {**rows(3), "label": [0, 1, -1]}
    parquet(folder, "train", table)


FAULTS: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "no label column": (
        lambda _: None,
        {"label_column": "breed"},
        "got 'breed'; write one of the columns image, label",
    ),
    "no image column": (
        lambda _: None,
        {"image_column": "photo"},
        "got 'photo'; write one of the columns image, label",
    ),
    "no images there": (lambda _: None, {"image_column": "label"}, "'label' holds ClassLabel"),
    "labels of numbers": (
        lambda folder: parquet(folder, "train", {**rows(3), "label": [0.5, 1.5, 2.5]}, datasets.Value("float32")),
        {},
        "'label' holds Value('float32'); write a column of ClassLabel or strings",
    ),
    "label of no class": (_label_of_no_class, {}, "train/2: the label is -1; it must be from 0 to 2."),
    "empty label": (
        lambda folder: parquet(folder, "train", {**rows(3), "label": ["a", " ", "b"]}, datasets.Value("string")),
        {},
        "train/1: the label is empty",
    ),
    "one class": (
        lambda folder: parquet(folder, "train", {**rows(3), "label": ["a"] * 3}, datasets.Value("string")),
        {},
        "has the one class a; two are needed",
    ),
    "a class twice": (
        lambda folder: parquet(folder, "train", rows(3), datasets.ClassLabel(names=["Cat", "cat ", "dog"])),
        {},
        "the class name 'cat' is there twice",
    ),
    "a test label that was never trained": (
        lambda folder: parquet(folder, "test", rows(3), datasets.ClassLabel(names=["cat", "dog", "yak"])),
        {},
        "test/2: the label 'yak' is not among those of the training split",
    ),
    "no test split": (lambda folder: (folder / "test.parquet").unlink(), {}, "no test split"),
    "empty test split": (lambda folder: parquet(folder, "test", rows(0)), {}, "the test split is empty"),
    "no parquet": (
        lambda folder: (folder / "train.parquet").write_bytes(b"PAR1?"),
        {},
        "the train split cannot be read",
    ),
    "cut off": (
        lambda folder: (folder / "train.parquet").write_bytes((folder / "train.parquet").read_bytes()[:-99]),
        {},
        "the train split cannot be read",
    ),
    "no image": (
        lambda folder: parquet(folder, "train", {**rows(3), "image": [None, *rows(2)["image"]]}),
        {},
        "train/0: there is no image",
    ),
    "validation takes all": (lambda _: None, {"validation_size": 12}, "leaves none of the 12 training samples"),
    "training on one class": (
        lambda _: None,
        {"train_size": 1, "validation_size": 0},
        "the 1 training samples are all",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_labelled_data_are_named(tmp_path: Path, fault: str) -> None:
    change, options, said = FAULTS[fault]
    broken(tmp_path, change)
    with pytest.raises(DataError) as caught:
        load(tmp_path, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


CHAT_FAULTS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no such file": ([chat("c.png")], "c.png' cannot be read: No such file or directory"),
    "out of the data set": ([chat("../c.png")], "train/0: the image path '../c.png' leads out of the data set"),
    "no image": ([chat()], "train/0: there is no image"),
    "text first": (
        [chat("a.png", user=[{"type": "text", "text": "?"}, {"type": "image"}])],
        "train/0: text comes before an image; write the images first",
    ),
    "placeholders": (
        [chat("a.png", user=[{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}])],
        "train/0: the user turn shows 2 images, the row has 1",
    ),
    "a video": ([chat("a.png", user=[{"type": "video"}])], "train/0: got a part of type 'video'"),
    "no answer": ([chat("a.png", answer=" ")], "train/0: the assistant turn has no text"),
    "no question": ([chat("a.png", user=[{"type": "image"}])], "train/0: the user turn has no text"),
    "several turns": (
        [{"messages": chat()["messages"] * 2, "images": ["a.png"]}],
        "got the turns ['user', 'assistant', 'user', 'assistant']; write one \"user\" turn",
    ),
    "no messages": ([{"images": ["a.png"]}], "got 'messages'; write one of the columns images"),
}


@pytest.mark.parametrize("fault", CHAT_FAULTS)
def test_faults_of_chat_data_are_named(tmp_path: Path, fault: str) -> None:
    train, said = CHAT_FAULTS[fault]
    with pytest.raises(DataError) as caught:
        load(staged_chat(tmp_path, *train), task="chat", validation_size=0)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n", '{"messages": [}', "\x00\x01"])
def test_json_lines_that_are_none_are_refused(tmp_path: Path, content: str) -> None:
    staged_chat(tmp_path, chat("a.png"))
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"the train split (cannot be read|is empty)"):
        load(tmp_path, task="chat")


@pytest.mark.parametrize("task", ["classify", "chat"])
def test_an_empty_folder_is_refused(tmp_path: Path, task: str) -> None:
    with pytest.raises(DataError, match=f'no train split for data.task = "{task}"; got nothing'):
        load(tmp_path, task=task)
    (tmp_path / "train").mkdir()
    if task == "classify":
        with pytest.raises(DataError, match="the train split is empty"):
            load(tmp_path, task=task)
