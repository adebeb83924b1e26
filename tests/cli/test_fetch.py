"""fetch: every byte checked, nothing half-written, nothing copied twice."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.bench import Bench
from g4kit.fetching import part_of
from g4trainer.rundir import file_entry

Launch = Callable[..., str]


@pytest.fixture
def run_id(launched: Launch) -> str:
    return launched()


def there(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


ALL = [
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "evaluation/final.json",
    "recipe.json",
    "report.html",
    "results.json",
]


def test_everything_is_copied_as_results_lists_it(g4kit: Bench, run_id: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = g4kit("fetch", run_id, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out}\n"
    assert there(out) == ALL
    for name, entry in json.loads((out / "results.json").read_text())["artifacts"].items():
        assert file_entry(out / name) == entry


def test_parts(g4kit: Bench, run_id: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    document = json.loads(g4kit("fetch", run_id, "--out", out, "--only", "adapter,report", "--json").stdout)
    assert there(out) == [name for name in ALL if not name.startswith("evaluation")]
    assert document["files"] == [*ALL[:2], "report.html"]
    assert document["copied"] == 3
    assert document["size"] == sum((out / name).stat().st_size for name in document["files"])


def test_what_is_there_is_not_copied_again(g4kit: Bench, run_id: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    g4kit("fetch", run_id, "--out", out)
    (out / "report.html").write_text("<HTML></html>")  # same size, other bytes
    (out / "adapter" / "adapter_config.json").unlink()
    result = g4kit("fetch", run_id, "--out", out)
    copied = [line for line in result.stderr.splitlines() if line.startswith("copying")]
    assert copied == ["copying adapter/adapter_config.json", "copying report.html"]
    assert (out / "report.html").read_text() == "<html></html>"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\0"), "damaged: got 7000 bytes with sha256"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "damaged: got 100 bytes"),
        (lambda path: path.unlink(), "missing, and results.json lists it"),
    ],
    ids=["a flipped bit", "cut short", "missing"],
)
def test_a_damaged_artifact_is_never_delivered(
    g4kit: Bench, run_id: str, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(g4kit.root / "runs" / run_id / "adapter" / "adapter_model.safetensors")
    result = g4kit("fetch", run_id, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "adapter_model.safetensors" in result.stderr
    assert message in result.stderr
    assert not {"adapter/adapter_model.safetensors", "results.json"} & set(there(tmp_path / "out"))


def test_a_run_without_results(g4kit: Bench, launched: Launch, tmp_path: Path) -> None:
    run_id = launched([{"steps": 1, "exit": 3}])
    result = g4kit("fetch", run_id, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"run {run_id}: has no results yet (failed · step 1/10 · loss 1.0000 · it cannot work)" in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_part(g4kit: Bench, run_id: str, tmp_path: Path) -> None:
    result = g4kit("fetch", run_id, "--out", tmp_path / "out", "--only", "adaptor")
    assert result.exit_code == 2
    assert "--only: got adaptor; write one or more of adapter, evaluation, report." in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("artifacts", "message"),
    [
        ({}, "lists no artifacts"),
        ({"../../evil": {"size": 1, "sha256": "0"}}, "got '../../evil'"),
        ({"/etc/evil": {"size": 1, "sha256": "0"}}, "got '/etc/evil'"),
        ({"report.html": {"size": 1}}, "artifacts: report.html: got {'size': 1}"),
    ],
)
def test_results_that_lead_astray(
    g4kit: Bench, run_id: str, tmp_path: Path, artifacts: dict[str, object], message: str
) -> None:
    path = g4kit.root / "runs" / run_id / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"artifacts": artifacts}))
    result = g4kit("fetch", run_id, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_of_the_folder(g4kit: Bench, run_id: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    result = g4kit("fetch", run_id, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "a file is where a folder should be" in result.stderr


def test_parts_are_named_for_what_a_user_sees() -> None:
    names = {"adapter/adapter_config.json": "adapter", "report.html": "report", "evaluation/a/b.json": "evaluation"}
    assert {name: part_of(name) for name in names} == names
