"""A directory as the bucket, with Cloud Storage's generations and preconditions."""

import contextlib
import datetime
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from g4kit.cloud.base import (
    BLOCK_BYTES,
    ChecksumError,
    Crc32c,
    Object,
    ObjectNameError,
    ObjectNotFoundError,
    PreconditionError,
    Progress,
    StorageError,
    check_object_name,
    crc32c_of_file,
)
from g4trainer import rundir

INTERNAL_FOLDER = "local"
"""Below the root, and no part of the bucket: executions and locks."""
REMEDIES = {
    errno.ENOSPC: "no space left on the disk; free some, or set G4KIT_ROOT to a folder on another disk.",
    errno.EDQUOT: "the disk quota is used up; free some space, or set G4KIT_ROOT to a folder on another disk.",
    errno.EROFS: "the file system is read-only; set G4KIT_ROOT to a folder that can be written.",
    errno.EACCES: "permission denied; allow writing it, or set G4KIT_ROOT to a folder that can be written.",
    errno.EPERM: "operation not permitted; allow writing it, or set G4KIT_ROOT to a folder that can be written.",
    errno.ENOTDIR: "a file is where a folder should be; move it away, or set G4KIT_ROOT to another folder.",
    errno.EISDIR: "a folder is where a file should be; move it away.",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one.",
}


@contextlib.contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turns what a file system refuses, and the user can mend, into a StorageError; the rest passes."""
    try:
        yield
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        raise StorageError(f"{error.filename or where}: {REMEDIES[error.errno]}") from error


class LocalBucket:
    """Objects are files below `root`; `root/local` is the target's own and not part of the bucket.

    The generation is the file's modification time in nanoseconds; writing makes it grow. Preconditions hold between
    processes of this machine: create-only through a hard link, compare-and-set under a lock.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def url(self) -> str:
        return str(self.root)

    def job_path(self, name: str) -> str:
        return str(self._path(name))

    def stat(self, name: str) -> Object:
        path = self._path(name)
        with self._found(name):
            found = self._object(name, path)
            return Object(found.name, found.size, found.generation, found.updated, crc32c_of_file(path))

    def read(self, name: str) -> bytes:
        return self.read_with_generation(name)[0]

    def read_with_generation(self, name: str) -> tuple[bytes, int]:
        with self._found(name), self._path(name).open("rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns

    def write(self, name: str, data: bytes, *, if_generation_match: int | None = None) -> Object:
        path = self._path(name)
        with storage_errors(path):
            if if_generation_match == 0:
                self._create(name, path, data)
            else:
                with self._lock():
                    before = self._check(name, path, if_generation_match)
                    rundir.write_bytes(path, data)
                    _grow_generation(path, before)
            return self.stat(name)

    def delete(self, name: str, *, if_generation_match: int | None = None) -> None:
        path = self._path(name)
        with self._found(name), self._lock():
            self._check(name, path, if_generation_match)
            path.unlink()

    def objects(self, prefix: str = "") -> Iterator[Object]:
        for name in sorted(self._names(prefix)):
            # The trainer deletes old checkpoints while this lists.
            with contextlib.suppress(FileNotFoundError):
                yield self._object(name, self.root / name)

    def folders(self, prefix: str = "") -> list[str]:
        folder = self._folder(prefix)
        with storage_errors(folder):
            if not folder.is_dir():
                return []
            names = {f"{prefix}{child.name}/" for child in folder.iterdir() if child.is_dir()} - {f"{INTERNAL_FOLDER}/"}
        return sorted(Path(name).name for name in names if next(self._names(name), None))

    def upload_file(
        self, path: Path, name: str, *, if_generation_match: int | None = None, progress: Progress | None = None
    ) -> Object:
        target = self._path(name)
        with path.open("rb") as reading, storage_errors(target), _partial(target) as partial:
            crc32c = _copy(reading, partial, progress)
            with self._lock():
                before = self._check(name, target, if_generation_match)
                partial.replace(target)
                _grow_generation(target, before)
            found = self._object(name, target)
        return Object(found.name, found.size, found.generation, found.updated, crc32c)

    def download_file(self, name: str, path: Path, *, progress: Progress | None = None) -> Object:
        source = self._path(name)
        with self._found(name):
            found = self._object(name, source)
            reading = source.open("rb")
        with reading, storage_errors(path), _partial(path) as partial:
            crc32c = _copy(reading, partial, progress)
            written = crc32c_of_file(partial)
            if written != crc32c:
                raise ChecksumError(name, crc32c, written)
            partial.replace(path)
        return Object(found.name, found.size, found.generation, found.updated, crc32c)

    def _create(self, name: str, path: Path, data: bytes) -> None:
        try:
            rundir.create_bytes(path, data)
        except FileExistsError:
            raise PreconditionError(name, 0, _generation(path)) from None

    def _check(self, name: str, path: Path, wanted: int | None) -> int:
        """The generation that is there, 0 for none. Raises PreconditionError where another one is wanted."""
        found = _generation(path)
        if wanted is not None and wanted != found:
            raise PreconditionError(name, wanted, found)
        return found

    def _path(self, name: str) -> Path:
        if check_object_name(name).split("/", 1)[0] == INTERNAL_FOLDER:
            raise ObjectNameError(name)
        return self.root / name

    def _folder(self, prefix: str) -> Path:
        """The folder that `prefix` leads into: all of it up to its last slash."""
        folder = prefix.rpartition("/")[0]
        return self._path(folder) if folder else self.root

    def _names(self, prefix: str) -> Iterator[str]:
        """Names of the objects below a prefix, in no order; unreadable folders raise StorageError."""
        top = self._folder(prefix)

        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise error

        with storage_errors(top):
            for folder, folders, files in os.walk(top, onerror=refuse):
                here = Path(folder).relative_to(self.root)
                if here == Path():
                    folders[:] = [child for child in folders if child != INTERNAL_FOLDER]
                names = ((here / file).as_posix() for file in files if not file.endswith(rundir.TEMPORARY_SUFFIX))
                yield from (name for name in names if name.startswith(prefix))

    def _object(self, name: str, path: Path) -> Object:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise IsADirectoryError(path)
        updated = datetime.datetime.fromtimestamp(found.st_mtime, datetime.UTC)
        return Object(name, found.st_size, found.st_mtime_ns, updated, None)

    @contextlib.contextmanager
    def _found(self, name: str) -> Iterator[None]:
        """A folder is no object, and a file holds none."""
        with storage_errors(self.root / name):
            try:
                yield
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise ObjectNotFoundError(self.url, name) from None

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One writer at a time, over all processes of this machine; the kernel lets go when one dies."""
        folder = self.root / INTERNAL_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "bucket.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _generation(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _grow_generation(path: Path, before: int) -> None:
    """Two writes within one tick of the file system's clock still get two generations."""
    if _generation(path) <= before:
        os.utime(path, ns=(before + 1, before + 1))


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to and rename from; removed at the end if it is still there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}{rundir.TEMPORARY_SUFFIX}")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _copy(reading: BinaryIO, target: Path, progress: Progress | None) -> str:
    """Copies the bytes and returns their CRC32C as they were read."""
    checksum = Crc32c()
    with target.open("wb") as writing:
        while block := reading.read(BLOCK_BYTES):
            checksum.update(block)
            writing.write(block)
            if progress:
                progress(len(block))
        writing.flush()
        os.fsync(writing.fileno())
    target.chmod(rundir.FILE_MODE)
    return checksum.base64
