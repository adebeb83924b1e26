"""The folder that an export is written to: whose it is while files are missing, and what says that it is whole.

    EXPORTING.json   the run that is exported; written first
    EXPORTED.json    what was exported, every file with its size and SHA-256; written when all of them are there

Only the standard library: the trainer merges into such a folder, the command line copies exports to one.
"""

import datetime
from pathlib import Path
from typing import Any

from g4trainer.rundir import read_json, write_json

EXPORTING, EXPORTED = "EXPORTING.json", "EXPORTED.json"


class FolderTakenError(Exception):
    """A folder that is no place for this export. Reads on from its name: `holds an export of another run`."""


def begin(out: Path, run_id: str, *, kind: str, weights: str | None = None) -> dict[str, Any] | None:
    """Makes a folder this export's own; returns EXPORTED.json where it holds the same export, whole.

    kind: `format` of EXPORTED.json. weights: those merged into; None does not ask for them.
    What an export of this run that was ended has left stays there. Raises FolderTakenError, OSError.
    """
    if (out / EXPORTED).is_file():
        done = _read(out / EXPORTED)
        if (done["run_id"], done.get("format")) != (run_id, kind) or weights not in (None, done["base"].get("weights")):
            raise FolderTakenError(f"holds another export, of {done['run_id']}")
        (out / EXPORTING).unlink(missing_ok=True)  # of an export that was ended between the two
        return done
    if out.exists() and not out.is_dir():
        raise FolderTakenError("is a file")
    mark = out / EXPORTING
    there = next(out.iterdir(), None) if out.is_dir() else None
    if there and not (mark.is_file() and _read(mark)["run_id"] == run_id):
        raise FolderTakenError(f"is not empty ({there.name})")
    write_json(mark, {"run_id": run_id, "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")})
    return None


def finish(out: Path, document: dict[str, Any]) -> None:
    """Says that the folder is whole."""
    write_json(out / EXPORTED, document)
    (out / EXPORTING).unlink()


def _read(path: Path) -> dict[str, Any]:
    try:
        document = read_json(path)
    except ValueError as error:
        raise FolderTakenError(f"holds a damaged {path.name}") from error
    if not isinstance(document, dict) or "run_id" not in document:
        raise FolderTakenError(f"holds a {path.name} that is no export's")
    return document
