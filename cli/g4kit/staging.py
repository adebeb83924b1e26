"""Base models and data sets in the bucket: copied there, and listed in STAGED.json, which is written last."""

import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g4kit import __version__
from g4kit.cloud.base import Bucket, Object, ObjectNotFoundError
from g4kit.copying import open_copying
from g4kit.errors import FailedError
from g4kit.hub_source import HubSource, is_hub_id
from g4kit.output import size
from g4kit.sources import MARKER, FolderSource, Source, StageError
from g4kit.transfer import in_parallel
from g4trainer.hub import Kind
from g4trainer.rows import count_rows
from g4trainer.staging import FOLDERS, content_problems, refusal

BUILTIN: dict[str, Kind] = {"builtin:tiny-gemma4": "model", "builtin:digits": "data"}
"""Source -> kind. The trainer makes them: `python -m g4trainer tiny KIND FOLDER`."""
MAX_OBJECT_BYTES = 5 << 40
"""Of one object: https://cloud.google.com/storage/quotas#objects"""

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


def stage(
    bucket: Bucket,
    kind: Kind,
    source: str,
    name: str | None,
    *,
    trainer: tuple[str, ...],
    say: Say,
    revision: str | None = None,
) -> Staged:
    """Copies a base model or a data set into the bucket, through this machine.

    source: `builtin:...`, a folder, a `gs://` address, or a hub id with a revision. Raises StageError, StorageError.
    """
    if source in BUILTIN:
        if BUILTIN[source] != kind:
            raise StageError(f"source: got {source}, which is no {kind}; write g4kit stage {BUILTIN[source]} {source}.")
        return _stage_builtin(bucket, kind, source, source.partition(":")[2] if name is None else name, trainer, say)
    if source.startswith("builtin:"):
        known = " or ".join(builtin for builtin, its_kind in BUILTIN.items() if its_kind == kind)
        raise StageError(f"source: got {source}; write {known}, or a folder.")
    if source.startswith("gs://"):
        from g4kit.cloud.google_source import open_bucket_source

        return stage_source(bucket, kind, open_bucket_source(bucket, source), name, say)
    if is_hub_id(source):
        return stage_source(bucket, kind, HubSource(kind, source, revision), name, say)
    nouns = f"a folder, a hub id such as google/gemma-4-E2B-it, gs://BUCKET/FOLDER, or one of {', '.join(BUILTIN)}"
    return stage_source(bucket, kind, FolderSource(Path(source), nouns), name, say)


def stage_source(bucket: Bucket, kind: Kind, source: Source, name: str | None, say: Say) -> Staged:
    """Checks a source's files, then copies what is not there yet. Raises StageError."""
    folder = staged_folder(kind, source.name if name is None else name)
    if source.left_out:
        say(f"left out: {len(source.left_out)} files, for example {source.left_out[0]}")
    _check_content(kind, source)
    listing = read_marker(bucket, folder)
    if listing is not None:
        refuse_another_source(folder, listing, source.origin)
        if listing["revision"] != source.revision and not _holds(source, listing["files"]):
            raise StageError(
                f"{folder}: got other files than were staged from {source.origin} before, and runs may rely on those; "
                f"write another --name, or delete {bucket.url}/{folder}."
            )
        problems = staged_problems(bucket, folder)
        if not problems:
            return summary(folder, listing, already=True)
        say(f"{folder} is incomplete: {problems[0]}")
    return _copy(bucket, source, folder)


def staged_problems(bucket: Bucket, folder: str) -> list[str]:
    """What keeps a folder of the bucket from being staged: no marker, or files that are missing or not the same.

    Checksums are compared where the bucket lists them, as Cloud Storage does.
    """
    listing = read_marker(bucket, folder)
    if listing is None:
        return [f"{MARKER}: missing"]
    found = {item.name.removeprefix(f"{folder}/"): item for item in bucket.objects(f"{folder}/")}
    problems = []
    for path, entry in listing["files"].items():
        item = found.get(path)
        if item is None:
            problems.append(f"{path}: missing")
        elif item.size != entry["size"]:
            problems.append(f"{path}: has {item.size} bytes of {entry['size']}")
        elif item.crc32c is not None and item.crc32c != entry["crc32c"]:
            problems.append(f"{path}: has checksum {item.crc32c} in place of {entry['crc32c']}")
    return problems


def staged_folder(kind: Kind, name: str) -> str:
    """`models/NAME` or `datasets/NAME`. Raises StageError for a name that no recipe could say."""
    from g4trainer.recipe import STAGED_NAME

    if not STAGED_NAME.fullmatch(name):
        raise StageError(
            f"name: got {name!r}; write letters, digits, dots, dashes and underscores, for example --name my-model."
        )
    return f"{FOLDERS[kind]}/{name}"


def read_marker(bucket: Bucket, folder: str) -> dict[str, Any] | None:
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


def refuse_another_source(folder: str, listing: Mapping[str, Any], origin: str) -> None:
    if listing["source"] != origin:
        raise StageError(f"{folder}: staged from {listing['source']}, got {origin}; write another --name.")


def summary(folder: str, listing: Mapping[str, Any], *, already: bool) -> Staged:
    sizes = [entry["size"] for entry in listing["files"].values()]
    return Staged(folder, len(sizes), sum(sizes), already)


def _stage_builtin(bucket: Bucket, kind: Kind, source: str, name: str, trainer: tuple[str, ...], say: Say) -> Staged:
    folder = staged_folder(kind, name)
    listing = read_marker(bucket, folder)
    if listing is not None:
        refuse_another_source(folder, listing, source)
        if listing["revision"] == __version__ and not staged_problems(bucket, folder):
            return summary(folder, listing, already=True)
    say(f"making {source}")
    with tempfile.TemporaryDirectory(prefix="g4kit-") as temporary:
        made = Path(temporary) / name
        ended = subprocess.run([*trainer, "tiny", kind, str(made)], check=False, capture_output=True, text=True)
        if ended.returncode:
            said = ended.stderr.strip() or ended.stdout.strip()
            raise FailedError(f"{source}: making it ended with exit code {ended.returncode}:\n{said}")
        files = FolderSource(made, "")
        files.origin, files.revision = source, __version__
        return _copy(bucket, files, folder)


def _copy(bucket: Bucket, source: Source, folder: str) -> Staged:
    """Copies what is not there yet, byte for byte, and writes the marker last."""
    there = {item.name.removeprefix(f"{folder}/"): item for item in bucket.objects(f"{folder}/")}
    foreign = sorted(there.keys() - {*source.sizes, MARKER})
    if foreign:
        raise StageError(
            f"{folder}: holds files that {source.origin} lacks: {', '.join(foreign[:5])}; "
            f"write another --name, or delete {bucket.url}/{folder}."
        )
    if MARKER in there:  # until every file is right, the folder is not staged
        bucket.delete(f"{folder}/{MARKER}")

    def copy(name: str) -> dict[str, Any]:
        crc32c = _already_there(bucket, there.get(name), source, name)
        if crc32c is None:
            copying.file(name)
            crc32c = source.copy(name, bucket, f"{folder}/{name}", copying.advance)
        else:
            copying.advance(source.sizes[name])
        return {"size": source.sizes[name], "crc32c": crc32c}

    with open_copying("copying", len(source.sizes), sum(source.sizes.values())) as copying:
        entries = dict(zip(source.sizes, in_parallel(copy, source.sizes, stop=copying.stop), strict=True))
    listing = {"files": entries, "source": source.origin, "revision": source.revision}
    if folder.startswith(f"{FOLDERS['data']}/"):
        listing["rows"] = count_rows(source.sizes, source.read)
    bucket.write(f"{folder}/{MARKER}", (json.dumps(listing, indent=2) + "\n").encode())
    return summary(folder, listing, already=False)


def _already_there(bucket: Bucket, there: Object | None, source: Source, name: str) -> str | None:
    """The crc32c, where the object holds the very bytes of the source's file."""
    if there is None or there.size != source.sizes[name]:
        return None
    wanted = source.crc32c(name)
    found = there.crc32c or bucket.stat(there.name).crc32c
    return found if wanted == found else None


def _holds(source: Source, files: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the source has the very files that a marker lists."""
    if source.sizes != {name: entry["size"] for name, entry in files.items()}:
        return False
    return all(source.crc32c(name) == entry["crc32c"] for name, entry in files.items())


def _check_content(kind: Kind, source: Source) -> None:
    """All that is wrong with the files, said at once. Only a model's headers and JSON files are read."""
    if not source.sizes:
        raise StageError(f"{source.origin}: got an empty folder; write one with parquet, images or chat JSONL.")
    problems = [
        f"{name}: got {size(count)}, and an object holds {size(MAX_OBJECT_BYTES)} at most; write it as smaller files."
        for name, count in source.sizes.items()
        if count > MAX_OBJECT_BYTES
    ]
    if not problems:
        problems = content_problems(kind, source.sizes, source.read)
    if problems:
        raise StageError(refusal(source.origin, kind, problems))
