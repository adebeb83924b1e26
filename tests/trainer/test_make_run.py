"""Runs that are started without the command line: `g4trainer run --recipe`."""

from pathlib import Path

import pytest

from g4trainer.launch import make_run
from g4trainer.recipe import RecipeError, load_frozen, load_recipe
from g4trainer.rundir import check_run_id, read_json

RECIPE = Path(__file__).parents[2] / "recipes" / "digits-tiny.toml"


def test_a_run_directory_holds_the_frozen_recipe(tmp_path: Path) -> None:
    path = make_run(RECIPE, tmp_path)
    frozen = load_frozen(path / "recipe.json")
    assert path.parent == tmp_path / "runs"
    assert check_run_id(path.name) == frozen.run_id
    assert frozen.recipe == load_recipe(RECIPE)
    assert not (path / "launches").exists()


def test_every_start_by_hand_makes_a_run_of_its_own(tmp_path: Path) -> None:
    assert make_run(RECIPE, tmp_path) != make_run(RECIPE, tmp_path)


def test_a_retried_task_finds_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_RUN_EXECUTION", "g4kit-train-abc")
    monkeypatch.setenv("CLOUD_RUN_TASK_INDEX", "0")
    first = make_run(RECIPE, tmp_path)
    assert make_run(RECIPE, tmp_path) == first
    assert read_json(first / "launches" / "0001.started.json")["execution"] == "g4kit-train-abc"
    monkeypatch.setenv("CLOUD_RUN_TASK_INDEX", "1")
    assert make_run(RECIPE, tmp_path) != first
    monkeypatch.setenv("CLOUD_RUN_EXECUTION", "g4kit-train-xyz")
    assert make_run(RECIPE, tmp_path) != first


def test_a_wrong_recipe_leaves_nothing(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('name = "x"\n')
    with pytest.raises(RecipeError, match="model: got nothing"):
        make_run(wrong, tmp_path / "root")
    assert not (tmp_path / "root").exists()
