"""Copying a finished run's artifacts to a folder, each checked against the sha256 in results.json."""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from g4kit.billing import FILE as COST
from g4kit.billing import settle
from g4kit.cloud.base import Bucket, Cloud, ObjectNameError, ObjectNotFoundError, Progress, check_object_name
from g4kit.cloud.local_bucket import storage_errors
from g4kit.copying import open_copying
from g4kit.errors import FailedError, UserError
from g4kit.following import describe
from g4kit.output import say
from g4kit.runs import DamagedError, read_document, read_run, run_folder
from g4kit.transfer import in_parallel
from g4trainer.export_folder import EXPORTED
from g4trainer.rundir import file_entry

EXPORTS = {"bf16": "export", "nf4": "export-nf4"}
"""Folders of a run's merged models, by the base weights they were merged into; copied only when they are asked for."""
ALWAYS = ("recipe.json", "results.json")
"""Copied with whatever is asked for: they say what the rest is."""


class FetchError(UserError):
    """Something that cannot be fetched as asked."""


@dataclass(frozen=True)
class Fetched:
    folder: str
    files: list[str]
    copied: int
    """Files that were copied; the others were there already, with the right bytes."""
    size: int
    """Bytes of all files."""


def fetch(cloud: Cloud, run_id: str, folder: Path, only: Iterable[str]) -> Fetched:
    """only: parts such as `adapter` or `report`; all of them where it is empty.

    Raises FetchError where the run has not finished or a part is unknown, FailedError where bytes differ.
    """
    view = read_run(cloud, run_id)
    results = read_document(cloud.bucket, f"{run_folder(run_id)}/results.json")
    if results is None:
        raise FetchError(f"run {run_id}: has no results yet ({describe(view)}); write: g4kit runs {run_id} --watch")
    settle(cloud, run_id, say)
    parts = list(only)
    artifacts = _artifacts(run_id, results)
    for onto, part in EXPORTS.items():
        if part in parts:
            artifacts |= _of_export(cloud.bucket, run_id, onto)
    names = choose(artifacts, parts)
    copied = copy_checked(cloud.bucket, run_folder(run_id), folder, {name: artifacts[name] for name in names})
    size = sum(artifacts[name]["size"] for name in names)
    for name in ALWAYS:
        if name not in names:
            with storage_errors(folder):
                cloud.bucket.download_file(f"{run_folder(run_id)}/{name}", folder / name)
    with contextlib.suppress(ObjectNotFoundError), storage_errors(folder):  # there once its process has ended
        cloud.bucket.download_file(f"{run_folder(run_id)}/{COST}", folder / COST)
    return Fetched(str(folder), names, copied, size)


def copy_checked(bucket: Bucket, prefix: str, folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> int:
    """Copies the files that are not there yet, byte for byte; returns how many.

    prefix: of their names in the bucket. entries: size and sha256 by name. Raises FailedError where bytes differ.
    """

    def copy(name: str) -> bool:
        if _is_there(folder / name, entries[name]):
            copying.advance(entries[name]["size"])
            return False
        copying.file(name)
        _copy(bucket, f"{prefix}/{name}", folder / name, entries[name], copying.advance)
        return True

    with open_copying("copying", len(entries), sum(entry["size"] for entry in entries.values())) as copying:
        return sum(in_parallel(copy, entries, stop=copying.stop))


def read_exported(bucket: Bucket, run_id: str, onto: str) -> dict[str, Any] | None:
    """What a whole export of the run in the bucket says of itself; None without one. onto: of EXPORTS."""
    return read_document(bucket, f"{run_folder(run_id)}/{EXPORTS[onto]}/{EXPORTED}")


def choose(artifacts: Iterable[str], only: list[str]) -> list[str]:
    """Names of the artifacts that belong to the parts. Raises FetchError for a part that is not there."""
    names = sorted(artifacts)
    parts = {part_of(name) for name in names}
    unknown = [part for part in only if part not in parts]
    if unknown:
        raise FetchError(f"--only: got {', '.join(unknown)}; write one or more of {', '.join(sorted(parts))}.")
    return [name for name in names if not only or part_of(name) in only]


def part_of(name: str) -> str:
    """`adapter/adapter_model.safetensors` is of `adapter`, `report.html` of `report`."""
    first = PurePosixPath(name).parts[0]
    return first if "/" in name else PurePosixPath(first).stem


def _artifacts(run_id: str, results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    artifacts = results.get("artifacts")
    if not isinstance(artifacts, dict) or not artifacts:
        raise DamagedError(f"run {run_id}: results.json lists no artifacts; launch the run anew.")
    check_entries(artifacts, f"run {run_id}: results.json: artifacts", "launch the run anew")
    return artifacts


def check_entries(entries: Mapping[str, Any], where: str, mend: str) -> None:
    """Raises DamagedError for a name that would lead out of the folder, or an entry without size and sha256."""
    for name, entry in entries.items():
        try:
            check_object_name(name)
        except ObjectNameError as error:
            raise DamagedError(f"{where}: {error}") from error
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise DamagedError(f"{where}: {name}: got {entry!r}; {mend}.")


def _of_export(bucket: Bucket, run_id: str, onto: str) -> dict[str, dict[str, Any]]:
    """The files of a merged model, by their names in the run directory. Raises FetchError where there is none."""
    document, part = read_exported(bucket, run_id, onto), EXPORTS[onto]
    if document is None:
        raise FetchError(f"--only: got {part}, and run {run_id} has none; write: g4kit export {run_id} --onto {onto}")
    check_entries(document["files"], f"run {run_id}: {EXPORTED}", "export it anew")
    return {f"{part}/{name}": entry for name, entry in document["files"].items()}


def _is_there(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether the file was fetched before, byte for byte."""
    with storage_errors(path):
        if not path.is_file() or path.stat().st_size != entry["size"]:
            return False
        return bool(file_entry(path)["sha256"] == entry["sha256"])


def _copy(bucket: Bucket, name: str, path: Path, entry: Mapping[str, Any], progress: Progress) -> None:
    """The file appears under its name only once its bytes are known to be right."""
    unchecked = path.with_name(f".{path.name}.unchecked")
    with storage_errors(path):
        try:
            bucket.download_file(name, unchecked, progress=progress)
            found = file_entry(unchecked)
            if found["size"] != entry["size"] or found["sha256"] != entry["sha256"]:
                raise FailedError(
                    f"{bucket.url}/{name}: damaged: got {found['size']} bytes with sha256 {found['sha256'][:12]}, "
                    f"and results.json says {entry['size']} with {entry['sha256'][:12]}; launch the run anew."
                )
            unchecked.replace(path)
        except ObjectNotFoundError:
            raise FailedError(
                f"{bucket.url}/{name}: missing, and results.json lists it; launch the run anew."
            ) from None
        finally:
            unchecked.unlink(missing_ok=True)
