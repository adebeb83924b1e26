"""stage: what is copied, when nothing is, and what is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import made_up_model
from cli.bench import Bench
from g4kit.cloud.base import crc32c_of_file
from g4kit.staging import staged_problems


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder as it lies on a user's disk."""
    folder = made_up_model.write(tmp_path / "my-model", weights=50_000)
    (folder / "sub").mkdir()
    (folder / "sub" / "extra.txt").write_text("x")
    (folder / ".gitattributes").write_text("hidden")
    return folder


def marker(bench: Bench, folder: str) -> dict[str, object]:
    return dict(json.loads((bench.root / folder / "STAGED.json").read_text()))


def test_a_folder_is_staged_with_its_marker(bare: Bench, model: Path) -> None:
    result = bare("stage", "model", model)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "models/my-model\n"
    assert "staged: 6 files" in result.stderr
    assert "left out: 1 files, for example .gitattributes" in result.stderr
    names = [
        *("chat_template.jinja", "config.json", "model.safetensors", "processor_config.json", "sub/extra.txt"),
        "tokenizer.json",
    ]
    expected = {name: {"size": (model / name).stat().st_size, "crc32c": crc32c_of_file(model / name)} for name in names}
    listing = marker(bare, "models/my-model")
    assert listing["files"] == expected
    assert listing["source"] == str(model)
    assert bare.files() == sorted(["models/my-model/STAGED.json", *(f"models/my-model/{name}" for name in names)])
    assert (bare.root / "models/my-model/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("kind", "name", "folder"), [("model", "tiny-gemma4", "models"), ("data", "digits", "datasets")]
)
def test_the_builtin_ones_are_made_by_the_trainer(bare: Bench, kind: str, name: str, folder: str) -> None:
    result = bare("stage", kind, f"builtin:{name}")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{folder}/{name}\n"
    assert marker(bare, f"{folder}/{name}")["source"] == f"builtin:{name}"
    assert staged_problems(bare.cloud.bucket, f"{folder}/{name}") == []
    again = bare("stage", kind, f"builtin:{name}", "--json", env={"STANDIN_TINY_FAILS": "1"})
    assert json.loads(again.stdout)["already"] is True
    assert "already staged" in again.stderr


def test_a_builtin_one_of_another_version_is_made_anew(bare: Bench) -> None:
    bare("stage", "data", "builtin:digits")
    path = bare.root / "datasets/digits/STAGED.json"
    path.write_text(json.dumps(marker(bare, "datasets/digits") | {"revision": "0.0.1"}))
    result = bare("stage", "data", "builtin:digits")
    assert "making builtin:digits" in result.stderr
    assert marker(bare, "datasets/digits")["revision"] != "0.0.1"


def test_a_trainer_that_fails_is_quoted(bare: Bench) -> None:
    result = bare("stage", "data", "builtin:digits", env={"STANDIN_TINY_FAILS": "1"})
    assert result.exit_code == 1
    assert "making it ended with exit code 1:\ncannot make it" in result.stderr
    assert bare.files() == []


def test_staging_again_copies_nothing(bare: Bench, model: Path) -> None:
    bare("stage", "model", model)
    before = {path: path.stat().st_mtime_ns for path in bare.root.rglob("*")}
    again = bare("stage", "model", model)
    assert again.exit_code == 0
    assert "already staged: 6 files" in again.stderr
    os.utime(model / "config.json")  # touched, with the same bytes
    assert "already staged" in bare("stage", "model", model).stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("damage", "copied"),
    [
        (lambda root: (root / "model.safetensors").unlink(), ["model.safetensors"]),
        (lambda root: (root / "model.safetensors").write_bytes(b"short"), ["model.safetensors"]),
        (lambda root: (root / "STAGED.json").unlink(), []),
    ],
    ids=["a file is missing", "a file is cut short", "the marker is missing"],
)
def test_a_half_staged_folder_is_mended(
    bare: Bench, model: Path, damage: Callable[[Path], object], copied: list[str]
) -> None:
    bare("stage", "model", model)
    damage(bare.root / "models/my-model")
    assert staged_problems(bare.cloud.bucket, "models/my-model") != []
    result = bare("stage", "model", model)
    assert result.exit_code == 0, result.stderr
    assert [line.removeprefix("copying ") for line in result.stderr.splitlines() if "copying" in line] == copied
    assert staged_problems(bare.cloud.bucket, "models/my-model") == []


def test_other_files_under_the_same_name_are_refused(bare: Bench, model: Path) -> None:
    bare("stage", "model", model)
    made_up_model.write(model, weights=10)
    result = bare("stage", "model", model)
    assert result.exit_code == 2
    assert "error: models/my-model: got other files than were staged" in result.stderr
    assert "write another --name" in result.stderr
    assert bare("stage", "model", model, "--name", "other").exit_code == 0


def test_another_source_under_the_same_name_is_refused(bare: Bench, model: Path) -> None:
    bare("stage", "model", "builtin:tiny-gemma4")
    result = bare("stage", "model", model, "--name", "tiny-gemma4")
    assert result.exit_code == 2
    assert "staged from builtin:tiny-gemma4" in result.stderr


def test_foreign_files_in_an_unfinished_folder_are_refused(bare: Bench, model: Path) -> None:
    bare.cloud.bucket.write("models/my-model/old-shard.safetensors", b"x")
    result = bare("stage", "model", model)
    assert result.exit_code == 2
    assert f"holds files that {model} lacks: old-shard.safetensors" in result.stderr
    assert bare.files() == ["models/my-model/old-shard.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "builtin:digits"], "which is no model; write g4kit stage data builtin:digits"),
        (["model", "builtin:gemma"], "write builtin:tiny-gemma4, or a folder"),
        (["model", "no/such/folder"], "got no/such/folder (nothing there); write a folder"),
        (["data", "FILE"], "(a file); write a folder"),
        (["model", "EMPTY"], "got an empty folder"),
        (["data", "EMPTY"], "got an empty folder"),
        (["model", "PICKLED"], "pytorch_model.bin: got pickled files"),
        (["model", "LINKED"], "got a symbolic link; write a folder of plain files"),
        (
            ["data", "MODEL"],
            "got a data set that no run can use:\n  train: missing; write train.parquet, train.jsonl for chat",
        ),
        (["data", "MODEL", "--name", "../../x"], "name: got '../../x'; write letters"),
        (["data", "MODEL", "--name", ""], "name: got ''"),
        (["data", "builtin:digits", "--name", "a/b"], "name: got 'a/b'"),
    ],
)
def test_bad_sources(bare: Bench, model: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {name: tmp_path / name for name in ("FILE", "EMPTY", "PICKLED", "LINKED")} | {"MODEL": model}
    places["FILE"].write_text("x")
    for name in ("EMPTY", "PICKLED", "LINKED"):
        places[name].mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (places["PICKLED"] / name).write_text("{}")
    (places["LINKED"] / "config.json").write_text("{}")
    (places["LINKED"] / "model.safetensors").symlink_to(model / "model.safetensors")
    result = bare("stage", *[places.get(argument, argument) for argument in arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1
    assert bare.files() == []
