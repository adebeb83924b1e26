"""Preflight on a tiny model with real data, and on models and data that were spoilt on purpose."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from g4trainer import tiny
from g4trainer.__main__ import main
from g4trainer.preflight import Report, preflight, subject_of_folder, subject_of_recipe
from g4trainer.preflight_text import to_text
from g4trainer.recipe import Recipe
from trainer.conftest import Folders

RECIPE = """
name = "tiny"
[model]
id = "tiny-gemma4"
max_soft_tokens = 70
[data]
dataset = "digits"
prompt = "Which digit is it?"
"""


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    tiny.write_digits(folder)
    return folder


@pytest.fixture
def root(tmp_path: Path, digits: Path, tiny_folder: Folders) -> Path:
    """A bucket of its own, which a test may spoil."""
    shutil.copytree(tiny_folder("E2B"), tmp_path / "root/models/tiny-gemma4")
    shutil.copytree(digits, tmp_path / "root/datasets/digits")
    (tmp_path / "tiny.toml").write_text(RECIPE)
    return tmp_path / "root"


def recipe(**data: Any) -> Recipe:
    document = {"name": "tiny", "model": {"id": "tiny-gemma4", "max_soft_tokens": 70}}
    return Recipe.model_validate({**document, "data": {"dataset": "digits", "prompt": "Which digit is it?", **data}})


def states(report: Report) -> dict[str, str]:
    return {check.name: check.state for check in report.checks}


def test_a_data_set_that_is_not_there_is_told_with_those_that_are(root: Path) -> None:
    report = preflight(subject_of_recipe(recipe(dataset="digit"), root))
    (root / "datasets/digits/STAGED.json").write_text("{}")
    told = preflight(subject_of_recipe(recipe(dataset="digit"), root))
    assert "data set" not in states(report), "nothing is staged here: the run may be to be elsewhere"
    assert (states(told)["data set"], states(told)["token alignment"]) == ("warning", "skipped")
    [check] = [check for check in told.checks if check.name == "data set"]
    assert check.detail == "digit is not staged here, where these are: digits"
    assert told.passed


def test_a_tiny_model_and_real_digits_pass_every_check(root: Path) -> None:
    report = preflight(subject_of_recipe(recipe(), root), samples=3)
    assert states(report) == dict.fromkeys(
        ("model", "template and processor", "token alignment", "overlap", "LoRA targets", "one step"), "passed"
    )
    assert {g.name: (g.found, g.quantized, g.adapted, g.clipped, g.with_gradient) for g in report.matrix} == {
        "vision patch embedder": (1, 0, 1, 0, 1),
        "vision attention": (8, 8, 8, 8, 8),
        "vision MLP": (6, 6, 6, 6, 6),
        "language attention": (14, 14, 14, 0, 14),
        "language MLP": (12, 12, 12, 0, 12),
        "language per-layer input": (9, 9, 9, 0, 9),
        "vision projection": (1, 1, 1, 0, 1),
    }
    assert report.without_gradient == []
    assert [(s.id, s.soft_tokens, s.supervised) for s in report.samples] == [
        ("train/0", 64, "zero<turn|>"),
        ("train/696", 64, "two<turn|>"),
        ("train/1398", 64, "four<turn|>"),
    ]


def test_the_text_shows_tables_and_every_check(root: Path) -> None:
    text = to_text(preflight(subject_of_recipe(recipe(supervise="turn"), root), samples=1))
    assert "vision attention              8      8        8        8  8 of 8\n" in text
    assert "train/0      86           64           7  <|turn>model\\nzero<turn|>\n" in text
    assert text.count("passed   ") == 6
    assert text.endswith("All checks that could be made passed.\n")


def test_a_configuration_alone_gives_the_structure(tmp_path: Path, tiny_folder: Folders) -> None:
    shutil.copy(tiny_folder("31B") / "config.json", tmp_path / "config.json")
    report = preflight(subject_of_folder(tmp_path))
    assert states(report) == {
        "model": "passed",
        "template and processor": "skipped",
        "token alignment": "skipped",
        "LoRA targets": "passed",
        "one step": "skipped",
    }
    assert sum(group.adapted for group in report.matrix) == 42


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        path = root / "models/tiny-gemma4/config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return spoil


def _template(text: str) -> Callable[[Path], int]:
    return lambda root: (root / "models/tiny-gemma4/chat_template.jinja").write_text(text)


def _overlap(root: Path) -> None:
    shutil.copy(root / "datasets/digits/train.parquet", root / "datasets/digits/test.parquet")


def _infinite(root: Path) -> None:
    path = root / "models/tiny-gemma4/model.safetensors"
    tensors = load_file(path)
    tensors["model.language_model.norm.weight"][0] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})


def _deaf(root: Path) -> None:
    """Clamps at zero around the last layer of the vision tower: nothing of its MLP reaches the loss."""
    path = root / "models/tiny-gemma4/model.safetensors"
    tensors = load_file(path)
    for name in ("input_min", "input_max", "output_min", "output_max"):
        for key in [key for key in tensors if key.endswith(f"layers.1.mlp.down_proj.{name}")]:
            tensors[key].fill_(0.0)
    save_file(tensors, path, metadata={"format": "pt"})


SPOILT: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "image token": (
        _config(lambda config: config.update(image_token_id=99)),
        "template and processor",
        "<|image|> is 8 in the tokenizer and 99 in config.json",
    ),
    "patch size": (
        _config(lambda config: config["vision_config"].update(patch_size=16)),
        "template and processor",
        "patch_size is 4 in the processor and 16 in config.json",
    ),
    "no template": (_template(""), "template and processor", "the processor has no chat template"),
    "broken template": (_template("{% if %}"), "template and processor", "the model's chat template cannot be used"),
    "text first": (
        _template("{{ bos_token }}<|turn>user\n{{ messages[0].content[-1].text }}<|image|><turn|>\n<|turn>model\n"),
        "token alignment",
        "it must show each image once, before the text",
    ),
    "two <bos>": (
        _template("<bos><bos><|turn>user\n<|image|>{{ messages[0].content[-1].text }}<turn|>\n<|turn>model\n"),
        "token alignment",
        "train/0: 2 begin-of-sequence tokens, not one at the start",
    ),
    "weights": (
        lambda root: (root / "models/tiny-gemma4/model.safetensors").write_bytes(b"cut"),
        "LoRA targets",
        "the weights cannot be loaded",
    ),
    "not finite": (_infinite, "one step", "or a gradient is not finite"),
    "no gradient": (
        _deaf,
        "one step",
        "3 adapters got no gradient, model.vision_tower.encoder.layers.1.mlp.gate_proj.linear, ",
    ),
    "no test split": (
        lambda root: (root / "datasets/digits/test.parquet").unlink(),
        "token alignment",
        "no test split",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_is_spoilt_fails_its_check_with_a_remedy(root: Path, case: str) -> None:
    spoil, name, said = SPOILT[case]
    spoil(root)
    report = preflight(subject_of_recipe(recipe(), root), samples=1)
    failed = [check for check in report.checks if check.state == "failed"]
    assert [check.name for check in failed] == [name]
    assert said in failed[0].detail
    assert failed[0].remedy
    assert f"To mend it: {failed[0].remedy}" in to_text(report)


def test_test_images_that_are_trained_on_are_a_warning(root: Path) -> None:
    _overlap(root)
    report = preflight(subject_of_recipe(recipe(test_size=5), root), samples=1)
    assert states(report)["overlap"] == "warning"
    assert report.passed


def test_targets_that_cannot_be_adapted_fail(root: Path) -> None:
    document = {**recipe().model_dump(), "lora": {"target_modules": ["q_proj", "v_proj"]}}
    report = preflight(subject_of_recipe(Recipe.model_validate(document), root), samples=1)
    failed = next(check for check in report.checks if check.state == "failed")
    assert failed.name == "LoRA targets"
    assert "Gemma4ClippableLinear modules of the vision tower" in failed.detail
    assert str(failed.remedy).startswith('write "all-linear"')


# The verb


def test_the_verb_prints_json_and_exits_with_1_where_a_check_fails(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("G4KIT_ROOT", str(root))
    arguments = ["preflight", "--recipe", str(root.parent / "tiny.toml"), "--samples", "1", "--json"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is True
    assert document["samples"][0]["supervised"] == "zero<turn|>"
    assert main([*arguments, "--set", 'lora.target_modules=["q_proj"]']) == 1
    failed = [one for one in json.loads(capsys.readouterr().out)["checks"] if one["state"] == "failed"]
    assert failed[0]["name"] == "LoRA targets"
    _template("")(root)
    assert main(arguments) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "preflight: write a PATH or --recipe RECIPE"),
        (["31B", "--recipe", "x.toml"], "preflight: write a PATH or --recipe RECIPE"),
        (["31B", "--samples", "0"], "--samples of at least 1"),
        (["31B", "--set", "lora.r=8"], "--set replaces values of a recipe"),
        (["--recipe", "nowhere.toml", "--set", "lora.r"], "nowhere.toml"),
        (["nowhere"], "nowhere: no config.json, so it is no staged model"),
        (["--recipe", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_the_verb_says_what_to_write(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["preflight", *arguments]) == 2
    assert said in capsys.readouterr().err
