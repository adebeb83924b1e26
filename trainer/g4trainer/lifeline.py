"""Every rank's connection to rank 0: whose end is the end of all, and how it is told.

A rank that fails leaves the others waiting in a collective operation, NCCL's for ever. So each keeps a connection to
rank 0. It reports a failure there; one that was killed is missed at once, for the kernel closes its sockets. Rank 0
writes down the one failure, tells the others the exit code, and all end, wherever they are stuck.
"""

import dataclasses
import logging
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from g4trainer.exits import ExitCode, RankFailed, ShortOfMemory
from g4trainer.outcome import KNOWN, failure_of
from g4trainer.ranks import Ranks
from g4trainer.wire import Wire, listen

SETTLE_S = 1.0
"""A death breaks the others' connections too. Whoever has no better explanation waits so long for the true one."""
GOODBYE_S = 10.0
"""How long rank 0 waits for the others to end."""

log = logging.getLogger(__name__)


class Lifeline:
    """Between the ranks of an attempt; all make theirs at the same time. For one process there is nothing to do."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._ending = threading.RLock()
        self._end_for: Callable[[RankFailed], ExitCode] | None = None
        self._verdict: ExitCode | None = None
        self._waiting = threading.Event()
        self._told = threading.Event()
        self._peers: dict[int, Wire] = {}
        self._gone = threading.Event()
        if ranks.size > 1:
            (self._listen if ranks.leads else self._connect)()

    # Rank 0

    def watch(self, end: Callable[[RankFailed], ExitCode]) -> None:
        """From now on a failure of another rank ends this process. end: writes down how; it may run in a thread."""
        self._end_for = end

    def begin_end(self, error: Exception | None) -> None:
        """Called where this process comes to its own end; returns unless another rank's failure ends it already."""
        if self.ranks.size > 1 and error is not None and not isinstance(error, KNOWN):
            time.sleep(SETTLE_S)
        self._ending.acquire()

    def dismiss(self, code: ExitCode) -> None:
        """Tells the others that it is over, and waits until they are gone."""
        for wire in list(self._peers.values()):
            wire.send({"end": int(code)})
        if self._peers:
            self._gone.wait(GOODBYE_S)

    def _listen(self) -> None:
        host = os.environ.get("MASTER_ADDR", "localhost")
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server(("", 0), family=family)
        self._token = secrets.token_hex(16)
        listen(listener, on_message=self._hear, on_lost=self._miss)
        self.ranks.share((host, listener.getsockname()[1], self._token))
        met = time.monotonic() + GOODBYE_S
        while len(self._peers) < self.ranks.size - 1 and time.monotonic() < met:
            time.sleep(0.005)

    def _hear(self, wire: Wire, message: Any) -> None:
        if wire.peer is None:
            if message.get("token") == self._token:
                wire.peer = int(message["rank"])
                self._peers[wire.peer] = wire
            return
        if "trace" in message:
            log.error("rank %d:\n%s", wire.peer, message["trace"])
        failure = message["failure"]
        code = ExitCode(failure["code"])
        self._end(RankFailed(wire.peer, code, failure["reason"], failure["remedy"], part=message["part"]))

    def _miss(self, wire: Wire) -> None:
        if wire.peer is None:
            return
        self._peers.pop(wire.peer, None)
        if not self._peers:
            self._gone.set()
        self._end(
            RankFailed(
                wire.peer,
                ExitCode.FAILED,
                "a process of this attempt died, killed or crashed",
                "run it again; if it happens again, look for what killed it, most often too little host memory.",
            )
        )

    def _end(self, error: RankFailed) -> None:
        """In a thread of its own: the one that heard of it must go on to hear of the peer's end."""
        threading.Thread(target=self._end_now, args=(error,), name="end", daemon=True).start()

    def _end_now(self, error: RankFailed) -> None:
        """Ends the process, also where the end cannot be written down: the main thread may wait for ever."""
        if not self._ending.acquire(blocking=False):
            return
        code = error.code
        try:
            if self._end_for:
                code = self._end_for(error)
            self.dismiss(code)
        except Exception:  # the process must not outlive it
            log.exception("%s; and the end cannot be written down", error)
        finally:
            leave_at_once(code)

    # The others

    def report(self, error: Exception) -> None:
        """Tells rank 0 what went wrong here."""
        if not isinstance(error, KNOWN):
            time.sleep(SETTLE_S)
        failure = dataclasses.asdict(failure_of(error))
        part = error.part if isinstance(error, ShortOfMemory) else None
        message: dict[str, Any] = {"failure": {**failure, "code": int(failure["code"])}, "part": part}
        if not isinstance(error, KNOWN):
            message["trace"] = "".join(traceback.format_exception(error))
        self._wire.send(message)

    def verdict(self) -> ExitCode:
        """Waits for rank 0's end, and returns its exit code."""
        self._waiting.set()
        self._told.wait()
        self._wire.close()  # rank 0 waits for that before it leaves their common groups
        return ExitCode.FAILED if self._verdict is None else self._verdict

    def _connect(self) -> None:
        host, port, token = self.ranks.share(("", 0, ""))
        self._wire = Wire(socket.create_connection((host, port)), on_message=self._obey, on_lost=self._orphaned)
        self._wire.send({"rank": self.ranks.rank, "token": token})

    def _obey(self, _: Wire, message: Any) -> None:
        self._verdict = ExitCode(message["end"])
        self._stop()

    def _orphaned(self, _: Wire) -> None:
        self._stop()

    def _stop(self) -> None:
        """Ends the process, unless its main thread waits for this."""
        if self._told.is_set():
            return
        self._told.set()
        if not self._waiting.is_set():
            leave_at_once(ExitCode.FAILED if self._verdict is None else self._verdict)


before_leaving: list[Callable[[ExitCode], None]] = []
"""Called by `leave_at_once`, for example to tell the launcher the exit code."""


def leave_at_once(code: ExitCode) -> None:
    """Ends the process without waiting for its threads: the main one may be stuck in a collective operation."""
    try:
        for tell in before_leaving:
            tell(code)
    finally:
        exit_at_once(code)


def exit_at_once(status: int) -> NoReturn:
    """Ends the process without Python's own end, which waits for sums under way that the other ranks left."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # the streams may be closed pipes
        os._exit(status)
