"""Copying a finished run's artifacts to a folder, each checked against the sha256 in results.json."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from g4kit.cloud.base import Bucket, Cloud, ObjectNameError, ObjectNotFoundError, check_object_name
from g4kit.cloud.local_bucket import storage_errors
from g4kit.errors import FailedError, UserError
from g4kit.following import describe
from g4kit.runs import DamagedError, read_document, read_run, run_folder
from g4kit.transfer import in_parallel
from g4trainer.rundir import file_entry

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


def fetch(cloud: Cloud, run_id: str, folder: Path, only: Iterable[str], say: Callable[[str], None]) -> Fetched:
    """only: parts such as `adapter` or `report`; all of them where it is empty.

    Raises FetchError where the run has not finished or a part is unknown, FailedError where bytes differ.
    """
    view = read_run(cloud, run_id)
    results = read_document(cloud.bucket, f"{run_folder(run_id)}/results.json")
    if results is None:
        raise FetchError(f"run {run_id}: has no results yet ({describe(view)}); write: g4kit runs {run_id} --watch")
    artifacts = _artifacts(run_id, results)
    names = choose(artifacts, list(only))

    def copy(name: str) -> bool:
        if _is_there(folder / name, artifacts[name]):
            return False
        say(f"copying {name}")
        _copy(cloud.bucket, f"{run_folder(run_id)}/{name}", folder / name, artifacts[name])
        return True

    copied = sum(in_parallel(copy, names))
    for name in ALWAYS:
        if name not in names:
            with storage_errors(folder):
                cloud.bucket.download_file(f"{run_folder(run_id)}/{name}", folder / name)
    size = sum(artifacts[name]["size"] for name in names)
    return Fetched(str(folder), names, copied, size)


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
    for name, entry in artifacts.items():
        try:
            check_object_name(name)
        except ObjectNameError as error:
            raise DamagedError(f"run {run_id}: results.json: {error}") from error
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise DamagedError(f"run {run_id}: results.json: artifacts: {name}: got {entry!r}; launch the run anew.")
    return artifacts


def _is_there(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether the file was fetched before, byte for byte."""
    with storage_errors(path):
        if not path.is_file() or path.stat().st_size != entry["size"]:
            return False
        return bool(file_entry(path)["sha256"] == entry["sha256"])


def _copy(bucket: Bucket, name: str, path: Path, entry: Mapping[str, Any]) -> None:
    """The file appears under its name only once its bytes are known to be right."""
    unchecked = path.with_name(f".{path.name}.unchecked")
    with storage_errors(path):
        try:
            bucket.download_file(name, unchecked)
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
