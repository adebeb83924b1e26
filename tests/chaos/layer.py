"""Between a process and the files below a folder: kills at a chosen operation, fails one, or acts as a mounted bucket.

It replaces the functions of `os`, `io` and `builtins` that pathlib, shutil and open() call, so that nothing of the
trainer has to know of it and nothing can pass it by in Python. The options, as JSON:

    kill_at      SIGKILL before the operation of that number that changes something below `under`; in a write's middle
    fail_at      that operation raises OSError(`errno`)
    count        a file that the number of such operations is written to at the end
    under        of which folder in the run directory; the whole run directory without it
    bucket       acts as gcsfuse does:
        age_s        what other processes change is seen so much later: names, sizes and content
        journal      a file that gets a line for each object written: time.monotonic(), process id, operation, path
        close_fails  number of the close that fails and leaves the object cut
"""

import builtins
import errno
import io
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

real: dict[str, Callable[..., Any]] = {
    name: getattr(os, name)
    for name in ("stat", "listdir", "scandir", "replace", "rename", "unlink", "mkdir", "rmdir", "link", "fsync")
}
real_open = io.open
BUFFER_BYTES = 8192


def install(folder: Path, options: dict[str, Any]) -> None:
    layer = Layer(os.path.realpath(folder), options)
    for name in real:
        setattr(os, name, getattr(layer, name))
    os.remove = layer.unlink
    io.open = builtins.open = layer.open
    vars(shutil)["_use_fd_functions"] = False  # rmtree by paths, which the layer sees


class Layer:
    def __init__(self, folder: str, options: dict[str, Any]) -> None:
        self.folder = folder
        self.under = os.path.join(folder, options.get("under", "")).rstrip("/")  # noqa: PTH118 pathlib would loop
        self.kill_at, self.fail_at = options.get("kill_at"), options.get("fail_at")
        self.errno, self.count_to = options.get("errno", errno.EIO), options.get("count")
        self.bucket = options.get("bucket")
        self.operations = self.closes = 0
        self.seen: dict[tuple[str, str], tuple[float, Any]] = {}

    def inside(self, path: Any) -> str | None:
        """The absolute path, if it is one below the folder."""
        if isinstance(path, int) or path is None:
            return None
        full = os.path.abspath(os.fsdecode(path))  # noqa: PTH100
        return full if full == self.folder or full.startswith(self.folder + "/") else None

    def change(self, operation: str, path: str, middle: Callable[[], None] = lambda: None) -> None:
        """Counts an operation, and kills or fails where it is its turn. middle: does the first half of it."""
        if path != self.under and not path.startswith(self.under + "/"):
            return
        self.operations += 1
        if self.count_to:
            with real_open(self.count_to, "w") as file:
                file.write(str(self.operations))
        if self.operations == self.kill_at:
            middle()
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        if self.operations == self.fail_at:
            middle()
            raise OSError(self.errno, os.strerror(self.errno), path)

    def written(self, operation: str, path: str) -> None:
        """Another generation of an object is there."""
        self.forget(path)
        if self.bucket:
            line = f"{time.monotonic():.6f} {os.getpid()} {operation} {path}\n".encode()
            journal = os.open(self.bucket["journal"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(journal, line)
            os.close(journal)

    def forget(self, path: str) -> None:
        for kind in ("stat", "content", "list"):
            self.seen.pop((kind, path), None)
        self.seen.pop(("list", os.path.dirname(path)), None)  # noqa: PTH120

    def look(self, kind: str, path: str, really: Callable[[], Any]) -> Any:
        """What is there, or was when this process looked last, if that is not long ago. An error counts as a look."""
        if not self.bucket:
            return really()
        at, found = self.seen.get((kind, path), (0.0, None))
        if found is None or time.monotonic() - at >= self.bucket["age_s"]:
            try:
                found = (really(), None)
            except OSError as error:
                found = (None, error)
            self.seen[kind, path] = (time.monotonic(), found)
        if found[1] is not None:
            raise type(found[1])(found[1].errno, found[1].strerror, path)
        return found[0]

    # What replaces os.* and open

    def open(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        path = self.inside(file)
        if path is None:
            return real_open(file, mode, *arguments, **options)
        if set(mode) & set("wxa+"):
            self.change("open", path)
            buffering = options.get("buffering", arguments[0] if arguments else -1)
            writer = io.BufferedWriter(_Writing(self, path, mode), buffering if buffering > 1 else BUFFER_BYTES)
            return writer if "b" in mode else io.TextIOWrapper(writer, encoding=options.get("encoding"))
        content = self.look("content", path, lambda: _read(path))
        reader = io.BufferedReader(_Content(content))
        return reader if "b" in mode else io.TextIOWrapper(reader, encoding=options.get("encoding"))

    def stat(self, path: Any, **options: Any) -> Any:
        inside = self.inside(path)
        if inside is None:
            return real["stat"](path, **options)
        return self.look("stat", inside, lambda: real["stat"](inside))

    def listdir(self, path: Any = ".") -> Any:
        inside = self.inside(path)
        if inside is None:
            return real["listdir"](path)
        return self.look("list", inside, lambda: real["listdir"](inside))

    def scandir(self, path: Any = ".") -> Any:
        inside = self.inside(path)
        return real["scandir"](path) if inside is None else _Listing(self, inside, self.listdir(inside))

    def replace(self, source: Any, target: Any, **options: Any) -> None:
        path = self.inside(target)
        if path is None:
            real["replace"](source, target, **options)
            return
        if self.bucket and os.path.isdir(source):  # noqa: PTH112
            raise OSError(errno.ENOSYS, "a bucket renames no folder", path)
        self.change("replace", path)
        real["replace"](source, target)
        self.forget(os.fsdecode(source))
        self.written("replace", path)

    rename = replace

    def unlink(self, path: Any, **options: Any) -> None:
        self._alter("unlink", path, options)

    def mkdir(self, path: Any, mode: int = 0o777, **options: Any) -> None:
        self._alter("mkdir", path, options | {"mode": mode})

    def rmdir(self, path: Any, **options: Any) -> None:
        self._alter("rmdir", path, options)

    def _alter(self, name: str, path: Any, options: dict[str, Any]) -> None:
        inside = self.inside(path)
        if inside is not None:
            self.change(name, inside)
            self.forget(inside)
        real[name](path, **options)

    def link(self, source: Any, target: Any, **options: Any) -> None:
        if self.bucket and self.inside(target):
            raise OSError(errno.ENOTSUP, "a bucket has no hard links", target)
        real["link"](source, target, **options)

    def fsync(self, descriptor: int) -> None:
        if not self.bucket:
            real["fsync"](descriptor)


class _Writing(io.RawIOBase):
    """A file that is being written. A kill leaves what was written so far, as gcsfuse does."""

    def __init__(self, layer: Layer, path: str, mode: str) -> None:
        super().__init__()
        self._layer, self._path = layer, path
        self._file = real_open(path, mode if "b" in mode else mode + "b", buffering=0)
        layer.forget(path)

    def write(self, data: Any) -> int:
        content = memoryview(data).cast("B")
        self._layer.change("write", self._path, lambda: void(self._file.write(content[: len(content) // 2])))
        while content:
            content = content[self._file.write(content) :]
        return len(memoryview(data).cast("B"))

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._file.fileno())

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        layer = self._layer
        layer.change("close", self._path, self._file.close)
        layer.closes += 1
        if layer.bucket and layer.closes == layer.bucket.get("close_fails"):
            self._file.truncate(os.fstat(self._file.fileno()).st_size // 2)
            self._file.close()
            raise OSError(errno.EIO, "close failed", self._path)
        self._file.close()
        layer.written("close", self._path)


class _Content(io.RawIOBase):
    """An object as it was when it was read."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._content.readinto(buffer)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._content.seek(offset, whence)

    def tell(self) -> int:
        return self._content.tell()


class _Entry:
    """What scandir yields."""

    def __init__(self, layer: Layer, folder: str, name: str) -> None:
        self.name, self.path, self._layer = name, f"{folder}/{name}", layer

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return os.path.isdir(self.path)  # noqa: PTH112

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return os.path.isfile(self.path)  # noqa: PTH113

    def is_symlink(self) -> bool:
        return False

    def is_junction(self) -> bool:
        return False

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        return self._layer.stat(self.path)

    def __fspath__(self) -> str:
        return self.path


class _Listing:
    def __init__(self, layer: Layer, folder: str, names: list[str]) -> None:
        self._entries = iter([_Entry(layer, folder, name) for name in names])

    def __iter__(self) -> Iterator[_Entry]:
        return self._entries

    def __next__(self) -> _Entry:
        return next(self._entries)

    def __enter__(self) -> "_Listing":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        pass


def void(_: object) -> None:
    """Makes an expression a statement."""


def _read(path: str) -> bytes:
    with real_open(path, "rb") as file:
        return bytes(file.read())
