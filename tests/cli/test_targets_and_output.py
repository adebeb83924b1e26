"""Which bucket a command talks to, completion at the prompt, and how figures are written."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.bench import Bench
from g4kit.cloud.local import TRAINER, trainer_command
from g4kit.errors import UserError
from g4kit.output import duration, size, table
from g4kit.targets import open_cloud


def test_without_settings_the_bucket_is_a_folder_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cloud = open_cloud(None, {})
    assert (cloud.target, cloud.bucket.url) == ("local", str(tmp_path / ".g4kit"))
    assert list(tmp_path.iterdir()) == []  # looking makes nothing


def test_the_bucket_can_be_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert open_cloud("local", {"G4KIT_ROOT": str(tmp_path / "x")}).bucket.url == str(tmp_path / "x")
    assert open_cloud(None, {"G4KIT_ROOT": "~/x"}).bucket.url == str(Path.home() / "x")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == f"target: local ({tmp_path / 'x'})"
    with pytest.raises(UserError, match="target: got 'moon'"):
        open_cloud("moon", {})


def test_the_trainer_can_be_set() -> None:
    assert trainer_command({}) == TRAINER == (sys.executable, "-m", "g4trainer")
    assert trainer_command({"G4KIT_TRAINER": "docker run 'my image'"}) == ("docker", "run", "my image")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("g4kit la", ["launch"]),
        ("g4kit stage ", ["data", "model"]),
        ("g4kit launch --dr", ["--dry-run"]),
        ("g4kit fetch mine", ["mine-1", "mine-2"]),
        ("g4kit fetch mine-2", ["mine-2"]),
        ("g4kit launch --id ot", ["other"]),
    ],
)
def test_completion_at_the_prompt(g4kit: Bench, words: str, expected: list[str]) -> None:
    for run_id in ("mine-1", "mine-2", "other"):
        g4kit.cloud.bucket.write(f"runs/{run_id}/recipe.json", b"{}")
    environ = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1), "_G4KIT_COMPLETE": "bash_complete"}
    told = subprocess.run(
        [sys.executable, "-c", "from g4kit.main import main; main()"],
        env=os.environ | g4kit.environ() | environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert [line.partition(",")[2] for line in told.stdout.splitlines()] == expected
    assert told.stderr == ""


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (duration, 0, "0 s"),
        (duration, 59.6, "1 min 0 s"),
        (duration, 80, "1 min 20 s"),
        (duration, 12_000, "3 h 20 min"),
        (duration, -5, "0 s"),
        (size, 999, "999 B"),
        (size, 1000, "1.0 kB"),
        (size, 62_578_670_545, "62.6 GB"),
        (size, 5_000_000_000_000_000, "5000.0 TB"),
    ],
)
def test_figures(write: Callable[[float], str], value: float, text: str) -> None:
    assert write(value) == text


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert table(("RUN", "STATE"), [("a", "x y"), ("long-one", "")]) == "RUN       STATE\na         x y\nlong-one"
