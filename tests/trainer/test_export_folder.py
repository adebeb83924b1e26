"""Whose an export's folder is, wherever an export to it was ended."""

from pathlib import Path
from typing import Any

import pytest

from g4trainer.export_folder import EXPORTED, EXPORTING, FolderTakenError, begin, finish

DOCUMENT: dict[str, Any] = {"run_id": "a-1", "format": "merged", "base": {"weights": "nf4"}, "files": {}}


def test_an_export_goes_on_where_it_was_ended_and_is_made_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert begin(out, "a-1", kind="merged") is None
    (out / "model.safetensors").write_bytes(b"half")
    assert begin(out, "a-1", kind="merged") is None
    with pytest.raises(FolderTakenError, match="is not empty"):
        begin(out, "b-2", kind="merged")
    mark = (out / EXPORTING).read_bytes()
    finish(out, DOCUMENT)
    (out / EXPORTING).write_bytes(mark)  # ended before it was removed
    assert begin(out, "a-1", kind="merged", weights="nf4") == DOCUMENT
    assert not (out / EXPORTING).exists()


@pytest.mark.parametrize("asked", [{"run_id": "b-2"}, {"kind": "adapter"}, {"weights": "bf16"}])
def test_another_export_is_left_alone(tmp_path: Path, asked: dict[str, str]) -> None:
    begin(tmp_path, "a-1", kind="merged")
    finish(tmp_path, DOCUMENT)
    same = {"run_id": "a-1", "kind": "merged", "weights": "nf4"}
    with pytest.raises(FolderTakenError, match="holds another export, of a-1"):
        begin(tmp_path, **(same | asked))
    assert [path.name for path in tmp_path.iterdir()] == [EXPORTED]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
@pytest.mark.parametrize("name", [EXPORTED, EXPORTING])
def test_a_damaged_marker_is_nobodys(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FolderTakenError, match=name):
        begin(tmp_path, "a-1", kind="merged")
