"""What goes wrong between a client and a service, on order. The vocabulary is that of Cloud Storage's retry
conformance tests (github.com/googleapis/conformance-tests, storage/v1)."""

import enum
import re
import threading
from dataclasses import dataclass

KIB_256 = 256 << 10


class Kind(enum.StrEnum):
    RETURN_503 = "return-503"
    RETURN_408 = "return-408"
    RETURN_429 = "return-429"
    RESET = "return-reset-connection"
    """The connection ends before the request is looked at."""
    ANSWER_LOST = "answer-lost"
    """The request is carried out, and the connection ends before its answer."""
    BROKEN_STREAM = "return-broken-stream"
    """The answer ends after `after_bytes` of its body, or half of it if it is shorter."""
    RETURN_503_AFTER = "return-503-after"
    """The first `after_bytes` of the request's body are taken in, then 503."""
    STALL = "stall"
    """Nothing comes for `seconds`, then the connection ends."""
    WRONG_CHECKSUM = "wrong-checksum"
    """One byte of the body is changed on its way: of the request's if it has one, else of the answer's."""
    STALE_GENERATION = "stale-generation"
    """412, as if another writer had been first."""


STATUS = {Kind.RETURN_503: 503, Kind.RETURN_408: 408, Kind.RETURN_429: 429, Kind.STALE_GENERATION: 412}
"""Of the faults that are an answer in place of the right one."""


@dataclass(frozen=True)
class Fault:
    kind: Kind
    where: str = ""
    """Regular expression that `METHOD path?query` must match."""
    after_bytes: int = KIB_256
    seconds: float = 5.0


class Faults:
    """Faults to come. Each is used up by the first request that it matches; requests take them in order."""

    def __init__(self) -> None:
        self._waiting: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, *faults: Fault) -> None:
        with self._lock:
            self._waiting += faults

    def take(self, request: str) -> Fault | None:
        with self._lock:
            for fault in self._waiting:
                if re.search(fault.where, request):
                    self._waiting.remove(fault)
                    return fault
        return None

    def clear(self) -> None:
        with self._lock:
            self._waiting.clear()

    @property
    def waiting(self) -> int:
        """Faults that no request has met yet."""
        with self._lock:
            return len(self._waiting)
