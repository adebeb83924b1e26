"""Weights read ahead of the loader, by several readers, each in the order of its file.

safetensors maps its files. A mounted bucket answers the faults of mapped pages one small piece after another, which is
far slower than the bucket reads in parallel. What was read before is in the system's page cache, where the mapping
finds it; that memory is no process's own, and the system takes it back when it needs it.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

READERS = 8
PIECE_BYTES = 512 * 2**20
"""That one reader takes at a time: long enough for a mount to see that it reads in order."""
BLOCK_BYTES = 8 * 2**20
MEMORY_SHARE = 0.9
"""Of the memory that is available, what may be read ahead: more would push out what was not used yet."""
MEMINFO = Path("/proc/meminfo")

log = logging.getLogger(__name__)


@contextlib.contextmanager
def reading_ahead(folder: Path) -> Iterator[None]:
    """While it is entered, the folder's safetensors files are read, in their order; leaving it ends that.

    An error of reading is logged only: the loader meets it too, and says whose it is.
    """
    sizes = {path: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    available = available_bytes()
    if available is None or sum(sizes.values()) > MEMORY_SHARE * available:
        log.info("the weights are not read ahead: the memory that is available is less, or not known")
        yield
        return
    stop = threading.Event()
    with ThreadPoolExecutor(READERS, thread_name_prefix="read-ahead") as readers:
        pieces = [
            readers.submit(_read, path, start, stop)
            for path, size in sizes.items()
            for start in range(0, size, PIECE_BYTES)
        ]
        try:
            yield
        finally:
            stop.set()
            readers.shutdown(cancel_futures=True)
    for piece in pieces:
        problem = None if piece.cancelled() else piece.exception()
        if problem is not None:
            log.warning("reading ahead: %s", problem)


def available_bytes() -> int | None:
    """Memory that new pages may take without swapping, by proc_meminfo(5); None where the system does not tell."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except FileNotFoundError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _read(path: Path, start: int, stop: threading.Event) -> None:
    block = memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        end = start + PIECE_BYTES
        while start < end and not stop.is_set():
            count = file.readinto(block[: end - start])
            if not count:
                return
            start += count
