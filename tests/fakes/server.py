"""HTTP on loopback for the fakes: requests come in, services answer, faults come between."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fakes.faults import STATUS, Fault, Faults, Kind

BLOCK_BYTES = 1 << 18
REASONS = {403: "forbidden", 404: "notFound", 408: "timeout", 412: "conditionNotMet", 429: "rateLimitExceeded"}
STATES = {
    400: "INVALID_ARGUMENT",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ALREADY_EXISTS",
    412: "FAILED_PRECONDITION",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
}


class Body:
    """A request's body, read as it comes; `limit` cuts it short, `flip` changes its first byte."""

    def __init__(self, stream: BufferedIOBase, length: int) -> None:
        self._stream = stream
        self.left = length
        self.limit: int | None = None
        self.flip = False

    def blocks(self) -> Iterator[bytes]:
        while self.left and (self.limit is None or self.limit > 0):
            wanted = min(BLOCK_BYTES, self.left if self.limit is None else min(self.left, self.limit))
            block = self._stream.read(wanted)
            if not block:
                raise ConnectionResetError("the client ended the connection within a request's body")
            self.left -= len(block)
            self.limit = None if self.limit is None else self.limit - len(block)
            if self.flip:
                block, self.flip = bytes([block[0] ^ 1]) + block[1:], False
            yield block

    def read(self) -> bytes:
        return b"".join(self.blocks())

    def drain(self) -> None:
        self.limit = None
        for _ in self.blocks():
            pass


@dataclass
class Request:
    method: str
    path: str
    """Still percent-encoded, so that a slash within a name differs from one between names."""
    queries: Mapping[str, list[str]]
    """Every value of each parameter."""
    headers: Mapping[str, str]
    """By their names in lower case."""
    body: Body
    base_url: str

    @property
    def query(self) -> Mapping[str, str]:
        """The last value of each parameter."""
        return {key: values[-1] for key, values in self.queries.items()}

    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.body.read() or b"{}"))


@dataclass
class Answer:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    stream: Iterator[bytes] | None = None
    """In place of `body`, `length` bytes in all."""
    length: int = 0

    def blocks(self) -> Iterator[bytes]:
        return self.stream if self.stream is not None else iter([self.body])

    @property
    def size(self) -> int:
        return self.length if self.stream is not None else len(self.body)


Service = Callable[[Request], Answer | None]
"""None where the path is another service's."""


class FakeServer:
    """Serves until closed. `requests` counts what came, by method and path."""

    def __init__(self, services: Sequence[Service]) -> None:
        self.faults = Faults()
        self.requests: list[str] = []
        self._services = services
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def dispatch(self, request: Request) -> Answer:
        for service in self._services:
            answer = service(request)
            if answer is not None:
                return answer
        return error(404, f"no such path: {request.path}")

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, TimeoutError):
                    self.close_connection = True

            def serve(self) -> None:
                Exchange(server, self).run()

            def log_message(self, *_: object) -> None:
                pass

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = serve  # noqa: N815 the names that http.server calls

        return Handler


class Exchange:
    """One request and its answer."""

    def __init__(self, server: FakeServer, handler: BaseHTTPRequestHandler) -> None:
        self._server = server
        self._handler = handler
        address = urlsplit(handler.path)
        self._line = f"{handler.command} {handler.path}"
        self._request = Request(
            method=handler.command,
            path=address.path,
            queries=parse_qs(address.query, keep_blank_values=True),
            headers={key.lower(): value for key, value in handler.headers.items()},
            body=Body(handler.rfile, int(handler.headers.get("Content-Length") or 0)),
            base_url=server.url,
        )

    def run(self) -> None:
        self._server.requests.append(self._line)
        fault = self._server.faults.take(self._line)
        if fault is None:
            answer = self._server.dispatch(self._request)
            self._request.body.drain()
            self._send(answer)
        elif fault.kind in STATUS:
            self._request.body.drain()
            self._send(error(STATUS[fault.kind], f"injected: {fault.kind}"))
        else:
            self._run_with(fault)

    def _run_with(self, fault: Fault) -> None:
        body = self._request.body
        if fault.kind is Kind.RESET:
            self._reset()
        elif fault.kind is Kind.STALL:
            time.sleep(fault.seconds)
            self._reset()
        elif fault.kind is Kind.RETURN_503_AFTER:
            body.limit = fault.after_bytes
            self._server.dispatch(self._request)
            body.drain()
            self._send(error(503, f"injected: {fault.kind}"))
        elif fault.kind is Kind.ANSWER_LOST:
            self._server.dispatch(self._request)
            self._reset()
        elif fault.kind is Kind.BROKEN_STREAM:
            answer = self._server.dispatch(self._request)
            body.drain()
            self._send(answer, break_after=min(fault.after_bytes, answer.size // 2))
        else:
            self._change_a_byte()

    def _change_a_byte(self) -> None:
        had_body = self._request.body.left > 0
        self._request.body.flip = had_body
        answer = self._server.dispatch(self._request)
        self._request.body.drain()
        if not had_body:
            whole = b"".join(answer.blocks())
            answer = Answer(answer.status, answer.headers, bytes([whole[0] ^ 1]) + whole[1:] if whole else whole)
        self._send(answer)

    def _send(self, answer: Answer, break_after: int | None = None) -> None:
        handler = self._handler
        handler.send_response(answer.status)
        for key, value in answer.headers.items():
            handler.send_header(key, value)
        handler.send_header("Content-Length", str(answer.size))
        handler.end_headers()
        left = answer.size if break_after is None else break_after
        for block in answer.blocks():
            handler.wfile.write(block[:left])
            left -= len(block[:left])
        handler.wfile.flush()
        if break_after is not None:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)

    def _reset(self) -> None:
        """Ends the connection with RST, as a lost machine does."""
        handler = self._handler
        handler.close_connection = True
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        raise ConnectionResetError("injected")


def ok(document: Mapping[str, Any]) -> Answer:
    return Answer(200, {"Content-Type": "application/json"}, json.dumps(document).encode())


def error(status: int, message: str, details: Sequence[Mapping[str, Any]] = ()) -> Answer:
    """An error as Google's JSON APIs write it."""
    reason = REASONS.get(status, "invalid")
    document = {
        "error": {
            "code": status,
            "message": message,
            "status": STATES.get(status, "UNKNOWN"),
            "errors": [{"message": message, "domain": "global", "reason": reason}],
            "details": list(details),
        }
    }
    return Answer(status, {"Content-Type": "application/json"}, json.dumps(document).encode())
