"""Base models and data sets in the bucket: copied there, and listed in STAGED.json, which is written last."""

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g4kit import __version__
from g4kit.cloud.base import Bucket, Object, ObjectNotFoundError, crc32c_of_file
from g4kit.errors import FailedError, UserError
from g4kit.transfer import in_parallel

MARKER = "STAGED.json"
FOLDERS = {"model": "models", "data": "datasets"}
BUILTIN = {"builtin:tiny-gemma4": "model", "builtin:digits": "data"}
"""Source -> kind. The trainer makes them: `python -m g4trainer tiny KIND FOLDER`."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Staged:
    folder: str
    """In the bucket, for example `models/tiny-gemma4`."""
    files: int
    size: int
    """Bytes."""
    already: bool
    """It was there, complete, and nothing was copied."""


class StageError(UserError):
    """A source that cannot be staged, or a folder of the bucket that is in the way."""


def stage(bucket: Bucket, kind: str, source: str, name: str | None, *, trainer: tuple[str, ...], say: Say) -> Staged:
    """Copies a base model or a data set into the bucket.

    kind: `model` or `data`. source: `builtin:...` or a folder. Raises StageError, StorageError.
    """
    if source in BUILTIN:
        if BUILTIN[source] != kind:
            raise StageError(f"source: got {source}, which is no {kind}; write g4kit stage {BUILTIN[source]} {source}.")
        return _stage_builtin(
            bucket, kind, source, _checked_name(source.partition(":")[2] if name is None else name), trainer, say
        )
    if source.startswith("builtin:"):
        known = " or ".join(builtin for builtin, its_kind in BUILTIN.items() if its_kind == kind)
        raise StageError(f"source: got {source}; write {known}, or a folder.")
    return _stage_folder(bucket, kind, Path(source), name, say)


def staged_problems(bucket: Bucket, folder: str) -> list[str]:
    """What keeps a folder of the bucket from being staged: no marker, or files that are missing or of another size."""
    listing = _read_marker(bucket, folder)
    if listing is None:
        return [f"{MARKER}: missing"]
    found = {item.name: item.size for item in bucket.objects(f"{folder}/")}
    problems = []
    for path, entry in listing["files"].items():
        size = found.get(f"{folder}/{path}")
        if size is None:
            problems.append(f"{path}: missing")
        elif size != entry["size"]:
            problems.append(f"{path}: has {size} bytes of {entry['size']}")
    return problems


def _stage_builtin(bucket: Bucket, kind: str, source: str, name: str, trainer: tuple[str, ...], say: Say) -> Staged:
    folder = f"{FOLDERS[kind]}/{name}"
    listing = _read_marker(bucket, folder)
    if listing is not None:
        _refuse_another_source(folder, listing, source)
        if listing["revision"] == __version__ and not staged_problems(bucket, folder):
            return _summary(folder, listing, already=True)
    say(f"making {source}")
    with tempfile.TemporaryDirectory(prefix="g4kit-") as temporary:
        made = Path(temporary) / name
        ended = subprocess.run([*trainer, "tiny", kind, str(made)], check=False, capture_output=True, text=True)
        if ended.returncode:
            said = ended.stderr.strip() or ended.stdout.strip()
            raise FailedError(f"{source}: making it ended with exit code {ended.returncode}:\n{said}")
        return _copy(bucket, made, _files(made, say), folder, source, __version__, say)


def _stage_folder(bucket: Bucket, kind: str, source: Path, name: str | None, say: Say) -> Staged:
    if not source.is_dir():
        what = "a file" if source.exists() else "nothing there"
        raise StageError(f"source: got {source} ({what}); write a folder, or one of {', '.join(BUILTIN)}.")
    files = _files(source, say)
    _check_content(kind, source, files)
    folder = f"{FOLDERS[kind]}/{_checked_name(source.resolve().name if name is None else name)}"
    origin, revision = str(source.resolve()), _fingerprint(source, files)
    listing = _read_marker(bucket, folder)
    if listing is None:
        return _copy(bucket, source, files, folder, origin, revision, say)
    _refuse_another_source(folder, listing, origin)
    problems = staged_problems(bucket, folder)
    if listing["revision"] != revision and _entries(source, files) != listing["files"]:
        raise StageError(
            f"{folder}: got other files than were staged from {origin} before, and runs may rely on those; "
            f"write another --name, or delete {bucket.url}/{folder}."
        )
    if not problems:
        return _summary(folder, listing, already=True)
    say(f"{folder} is incomplete: {problems[0]}")
    return _copy(bucket, source, files, folder, origin, revision, say)


def _copy(bucket: Bucket, source: Path, files: list[str], folder: str, origin: str, revision: str, say: Say) -> Staged:
    """Uploads what is not there yet, byte for byte, and writes the marker last."""
    there = {item.name.removeprefix(f"{folder}/"): item for item in bucket.objects(f"{folder}/")}
    foreign = sorted(there.keys() - {*files, MARKER})
    if foreign:
        raise StageError(
            f"{folder}: holds files that {origin} lacks: {', '.join(foreign[:5])}; "
            f"write another --name, or delete {bucket.url}/{folder}."
        )
    if MARKER in there:  # until every file is right, the folder is not staged
        bucket.delete(f"{folder}/{MARKER}")

    def copy(name: str) -> dict[str, Any]:
        entry = _entry(source / name)
        if not _same(bucket, there.get(name), entry):
            say(f"copying {name}")
            written = bucket.upload_file(source / name, f"{folder}/{name}")
            if written.crc32c != entry["crc32c"]:
                raise FailedError(f"{source / name}: changed while it was copied; stage it again.")
        return entry

    entries = dict(zip(files, in_parallel(copy, files), strict=True))
    listing = {"files": entries, "source": origin, "revision": revision}
    bucket.write(f"{folder}/{MARKER}", (json.dumps(listing, indent=2) + "\n").encode())
    return _summary(folder, listing, already=False)


def _same(bucket: Bucket, there: Object | None, entry: Mapping[str, Any]) -> bool:
    return there is not None and there.size == entry["size"] and bucket.stat(there.name).crc32c == entry["crc32c"]


def _summary(folder: str, listing: Mapping[str, Any], *, already: bool) -> Staged:
    sizes = [entry["size"] for entry in listing["files"].values()]
    return Staged(folder, len(sizes), sum(sizes), already)


def _files(source: Path, say: Say) -> list[str]:
    """Paths of the files below a folder, sorted; hidden ones are left out, links refused."""
    paths = sorted(path for path in source.rglob("*") if path.is_symlink() or path.is_file())
    names = [path.relative_to(source) for path in paths]
    hidden = [name for name in names if any(part.startswith(".") for part in name.parts)]
    if hidden:
        say(f"left out: {len(hidden)} hidden files, for example {hidden[0]}")
    kept = [name for name in names if name not in set(hidden)]
    for name in kept:
        if (source / name).is_symlink():
            raise StageError(
                f"{source / name}: got a symbolic link; write a folder of plain files, for example one made with "
                "`hf download ID --local-dir FOLDER`, or by `cp -rL`."
            )
    return [name.as_posix() for name in kept if name.as_posix() != MARKER]


def _check_content(kind: str, source: Path, files: Iterable[str]) -> None:
    names = set(files)
    if kind == "model" and "config.json" not in names:
        raise StageError(f"{source}: got a folder without config.json; write a model folder in Hugging Face's layout.")
    if kind == "model" and not any(name.endswith(".safetensors") for name in names):
        raise StageError(f"{source}: got a model without .safetensors files; write one saved as safetensors.")
    if not names:
        raise StageError(f"{source}: got an empty folder; write one with parquet, images or chat JSONL.")


def _checked_name(name: str) -> str:
    from g4trainer.recipe import STAGED_NAME

    if not STAGED_NAME.fullmatch(name):
        raise StageError(
            f"name: got {name!r}; write letters, digits, dots, dashes and underscores, for example --name my-model."
        )
    return name


def _refuse_another_source(folder: str, listing: Mapping[str, Any], source: str) -> None:
    if listing["source"] != source:
        raise StageError(f"{folder}: staged from {listing['source']}, got {source}; write another --name.")


def _read_marker(bucket: Bucket, folder: str) -> dict[str, Any] | None:
    """STAGED.json, or None where it is missing. Raises StageError where it is damaged."""
    try:
        listing = json.loads(bucket.read(f"{folder}/{MARKER}"))
        for entry in listing["files"].values():
            int(entry["size"]), str(entry["crc32c"])
        str(listing["source"]), str(listing["revision"])
    except ObjectNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError(f"{bucket.url}/{folder}/{MARKER}: damaged: {error!r}; delete it and stage again.") from error
    return dict(listing)


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "crc32c": crc32c_of_file(path)}


def _entries(source: Path, files: Iterable[str]) -> dict[str, dict[str, Any]]:
    return {name: _entry(source / name) for name in files}


def _fingerprint(source: Path, files: Iterable[str]) -> str:
    """Of names, sizes and times: an unchanged folder is known without reading it."""
    stats = [(name, (source / name).stat()) for name in files]
    text = json.dumps([(name, found.st_size, found.st_mtime_ns) for name, found in stats])
    return f"files-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
