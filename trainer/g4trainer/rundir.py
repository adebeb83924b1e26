"""The run directory: what is where, and how it is written so that nothing half-written ever looks whole.

A mounted bucket is no file system: no appends, no rename of folders, no locks. Every file here is therefore written
whole under a temporary name in the same folder and renamed into place once it is closed. Only the standard library.
"""

import contextlib
import datetime
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,61}[a-z0-9]")
TEMPORARY_SUFFIX = ".partial"
FILE_MODE = 0o644
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP}
"""What a file system answers that has no hard links, gcsfuse among them."""


class RunIdError(ValueError):
    """A run id that no run can have."""


def new_run_id(recipe_name: str, now: datetime.datetime | None = None, *, token: str | None = None) -> str:
    """`<recipe name>-<UTC yyyymmdd-hhmmss>-<4 hex>`: ids of one recipe sort by time. The token is random by default."""
    now = now or datetime.datetime.now(datetime.UTC)
    return f"{recipe_name}-{now.astimezone(datetime.UTC):%Y%m%d-%H%M%S}-{token or secrets.token_hex(2)}"


def check_run_id(run_id: str) -> str:
    """Returns the id, or raises RunIdError: an id becomes a folder's name, so `../x` must never pass."""
    if not RUN_ID.fullmatch(run_id):
        raise RunIdError(
            f"run id: got {run_id!r}; write letters a to z, digits and dashes, "
            f"for example digits-tiny-20260101-120000-0a1b."
        )
    return run_id


@dataclass(frozen=True)
class RunDir:
    """Paths of one run directory. Nothing is read or written until a method is called."""

    path: Path

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def root(self) -> Path:
        """The bucket's root: `$G4KIT_ROOT`, else two folders above the run directory."""
        return Path(os.environ.get("G4KIT_ROOT") or self.path.resolve().parent.parent)

    # Written by the command line, create-only.
    @property
    def recipe(self) -> Path:
        return self.path / "recipe.json"

    @property
    def launches(self) -> Path:
        return self.path / "launches"

    @property
    def cost(self) -> Path:
        return self.path / "cost.json"

    # Written by the trainer.
    @property
    def claims(self) -> Path:
        return self.path / "claims"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def lora_config(self) -> Path:
        return self.path / "lora_config.json"

    @property
    def training_args(self) -> Path:
        return self.path / "training_args.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def failed(self) -> Path:
        return self.path / "failed.json"

    @property
    def results(self) -> Path:
        return self.path / "results.json"


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces the file with `data`, all or nothing. Raises OSError; then the old file is still there, whole."""
    with _temporary(path, data) as temporary:
        temporary.replace(path)


def create_bytes(path: Path, data: bytes) -> None:
    """Writes a file that must not be there yet, all or nothing. Raises FileExistsError if it is."""
    with _temporary(path, data) as temporary:
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            # Without hard links the name is taken first; a crash right here leaves an empty file, which is no JSON.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, FILE_MODE))
            temporary.replace(path)


def write_json(path: Path, document: Any) -> None:
    """Replaces the file with a JSON document, all or nothing."""
    write_bytes(path, to_json(document))


def create_json(path: Path, document: Any) -> None:
    """Writes a JSON document that must not be there yet. Raises FileExistsError if it is."""
    create_bytes(path, to_json(document))


def overwrite_json(path: Path, document: Any) -> None:
    """Writes a JSON document over a shorter one, in place. Raises FileNotFoundError where there is none.

    A file that somebody took away stays away, at whatever moment they did. A rename, as of write_json, would bring it
    back.
    """
    with path.open("r+b", buffering=0) as file:
        length = os.fstat(file.fileno()).st_size
        file.write(to_json(document).ljust(length))  # one write, and no truncation: never empty, never half


def read_json(path: Path) -> Any:
    """The parsed document. Raises FileNotFoundError, and ValueError (with the path) where it is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}") from error


def to_json(document: Any) -> bytes:
    """JSON that a person can read, keys in their order, NaN refused."""
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def file_entry(path: Path) -> dict[str, Any]:
    """`{"size": bytes, "sha256": hex}` of a file, read once in blocks of 1 MiB."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def manifest(folder: Path, *, leave_out: frozenset[str] = frozenset()) -> dict[str, dict[str, Any]]:
    """`file_entry` of every file below a folder, by its path in the folder, sorted."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(TEMPORARY_SUFFIX)
    )
    return {name: file_entry(folder / name) for name in names if name not in leave_out}


def remove_remains(run: RunDir) -> None:
    """Deletes temporary files that killed attempts left, but in claims/, where others may be writing."""
    for path in run.path.rglob(f".*{TEMPORARY_SUFFIX}"):
        if path.parent != run.claims:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[Path]:
    """A closed file with `data` beside `path`, removed at the end if it is still there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(OSError):  # a full or lost disk: what was raised above says more
            temporary.unlink(missing_ok=True)
