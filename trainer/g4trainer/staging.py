"""A repository of the model hub in the bucket: what the job without a GPU does, so that no weights pass a laptop.

Every file is written once, from its beginning to its end, under its own name: a mounted bucket makes the object when
it is closed. STAGED.json is written last, so what an ended attempt left is never taken for a model; the next attempt
reads it, keeps what has the hub's digest and writes the rest again.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from g4trainer.hub import BLOCK_BYTES, HubError, HubRepo, Kind, open_repo
from g4trainer.model_files import model_problems
from g4trainer.rows import Read, count_rows, missing_splits
from g4trainer.rundir import read_json, write_json

MARKER = "STAGED.json"
FOLDERS: dict[Kind, str] = {"model": "models", "data": "datasets"}
NOUNS: dict[Kind, str] = {"model": "model", "data": "data set"}
WORKERS = 4
"""Files on their way at a time. A mounted bucket keeps some 64 MB of each in memory."""
SAY_EVERY_S = 15.0

Say = Callable[[str], None]


def stage(kind: Kind, repo_id: str, revision: str | None, folder: Path, say: Say) -> dict[str, Any]:
    """Copies a repository into a folder of the bucket and returns its STAGED.json. Raises HubError."""
    repo = open_repo(kind, repo_id, revision)
    say(f"{repo.origin}: commit {repo.commit}, {len(repo.files)} files, {_gb(_size(repo))}")
    listing = _listing(folder)
    if listing is not None:
        if (listing["source"], listing["revision"]) != (repo.origin, repo.commit):
            raise HubError(
                f"{folder}: holds {listing['source']} at {listing['revision']}, and runs may rely on it; write another "
                "--name."
            )
        if _is_complete(folder, listing):
            say("already staged")
            return listing
    check(repo)
    foreign = sorted(set(_files(folder)) - {*repo.files, MARKER})
    if foreign:
        raise HubError(
            f"{folder}: holds files that {repo.origin} lacks: {', '.join(foreign[:5])}; write another --name."
        )
    (folder / MARKER).unlink(missing_ok=True)
    counter = _Counter(_size(repo), say)
    with ThreadPoolExecutor(WORKERS) as pool:
        entries = list(pool.map(lambda name: _copy(repo, name, folder / name, counter), repo.files))
    listing = {
        "files": dict(zip(repo.files, entries, strict=True)),
        "source": repo.origin,
        "revision": repo.commit,
    }
    if kind == "data":
        listing["rows"] = count_rows(_files(folder), lambda name, start, count: _part(folder / name, start, count))
    write_json(folder / MARKER, listing)
    say(f"staged {len(repo.files)} files, {_gb(_size(repo))}")
    return listing


def check(repo: HubRepo) -> None:
    """Raises HubError with all that is wrong with the files; of weights, only headers are read."""
    if not repo.files:
        raise HubError(f"{repo.origin}: got no files; write another repository.")
    sizes = {name: file.size for name, file in repo.files.items()}
    problems = content_problems(repo.kind, sizes, repo.read)
    if problems:
        raise HubError(refusal(repo.origin, repo.kind, problems))


def content_problems(kind: Kind, sizes: Mapping[str, int], read: Read) -> list[str]:
    """All that keeps files from being a model, or a data set, that a run can use; of weights, only headers are read.

    sizes: bytes of each file by its path.
    """
    if kind == "model":
        return model_problems(sizes, read)
    return [
        f"{split}: missing; write {split}.parquet, {split}.jsonl for chat, or a folder {split}/<label>/ of images."
        for split in missing_splits(sizes)
    ]


def refusal(origin: str, kind: Kind, problems: Sequence[str]) -> str:
    said = "\n".join(f"  {problem}" for problem in problems)
    return f"{origin}: got a {NOUNS[kind]} that no run can use:\n{said}"


def _copy(repo: HubRepo, name: str, path: Path, counter: "_Counter") -> dict[str, Any]:
    """The file's entry in STAGED.json, its bytes in place."""
    there = _entry_of(repo, name, path)
    if there is not None:
        counter.add(repo.files[name].size)
        return there
    path.parent.mkdir(parents=True, exist_ok=True)
    checks = repo.checks(name)
    with path.open("wb") as file:
        for block in repo.blocks(name):
            file.write(block)
            checks.update(block)
            counter.add(len(block))
    entry = checks.entry()
    counter.say(f"copied {name}")
    return entry


def _entry_of(repo: HubRepo, name: str, path: Path) -> dict[str, Any] | None:
    """Of a file that an earlier attempt has copied whole; None where it has not."""
    if not path.is_file() or path.stat().st_size != repo.files[name].size:
        return None
    checks = repo.checks(name)
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            checks.update(block)
    return checks.entry() if checks.right else None


def _part(path: Path, start: int, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(count)


def _listing(folder: Path) -> dict[str, Any] | None:
    """STAGED.json, or None where there is none. Raises HubError where it is damaged."""
    try:
        listing = read_json(folder / MARKER)
        str(listing["source"]), str(listing["revision"]), dict(listing["files"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise HubError(f"{folder / MARKER}: damaged: {error!r}; delete it and stage again.") from error
    return dict(listing)


def _is_complete(folder: Path, listing: dict[str, Any]) -> bool:
    found = _files(folder)
    return all(found.get(name) == entry["size"] for name, entry in listing["files"].items())


def _files(folder: Path) -> dict[str, int]:
    paths = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _size(repo: HubRepo) -> int:
    return sum(file.size for file in repo.files.values())


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


class _Counter:
    """Says now and then how far the copies are; used by several threads."""

    def __init__(self, total: int, say: Say) -> None:
        self.say = say
        self._total, self._done = total, 0
        self._begun = self._said_at = time.monotonic()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._said_at < SAY_EVERY_S:
                return
            self._said_at = now
            rate = self._done / (now - self._begun)
        left_s = max(0.0, self._total - self._done) / rate
        self.say(f"{_gb(self._done)} of {_gb(self._total)}, {rate / 1e6:.0f} MB/s, {left_s:.0f} s left")
