"""A large file to Cloud Storage in chunks, within a session that another process can go on with.

Reference: https://cloud.google.com/storage/docs/performing-resumable-uploads
"""

import os
import re
from pathlib import Path
from typing import Any

from google.api_core import exceptions
from google.auth.transport.requests import AuthorizedSession

from g4kit.cloud.base import Crc32c, Progress
from g4kit.cloud.google_client import Access
from g4kit.transfer import SessionFile

CHUNK_BYTES = 8 << 20
"""Sent and kept in memory at a time; a multiple of 256 KiB, as Cloud Storage wants it."""
RANGE = re.compile(r"bytes=0-(\d+)")
GOING_ON, GONE = 308, {404, 410}


class Upload:
    """One file's way into the bucket. After an error it asks how far the session is, and goes on from there."""

    def __init__(self, access: Access, blob: Any, path: Path, session: SessionFile, progress: Progress | None) -> None:
        self._access = access
        self._blob = blob
        self._path = path
        self._session = session
        self._progress = progress or (lambda _: None)
        self._http = AuthorizedSession(access.credentials)
        self._checksum, self._summed, self._told = Crc32c(), 0, 0

    def run(self, if_generation_match: int | None) -> None:
        """Makes the object, and fills the blob's properties. Raises PreconditionFailed, BadRequest for other bytes."""
        with self._path.open("rb") as file, self._http:
            self._file, self._size = file, os.fstat(file.fileno()).st_size
            url, known = self._session.read(), False
            while True:
                if url is None:
                    url, known = self._begin(if_generation_match), True
                try:
                    self._blob._set_properties(self._send_all(url, known))
                    if known or self._is_there():
                        self._session.remove()
                        return
                    url = None  # an earlier process made the object, and it was deleted or replaced since
                except exceptions.GoogleAPICallError as error:
                    self._session.remove()
                    if error.code not in GONE or known:
                        raise
                    url = None  # sessions last a week

    def _begin(self, if_generation_match: int | None) -> str:
        url: str = self._blob.create_resumable_upload_session(
            content_type="application/octet-stream",
            size=self._size,
            checksum=None,
            if_generation_match=if_generation_match,
            retry=self._access.retry(),
            timeout=self._access.patience.timeout_s,
        )
        self._session.write(url)
        return url

    def _is_there(self) -> bool:
        generation = self._blob.generation
        found = self._blob.bucket.get_blob(
            self._blob.name, retry=self._access.retry(), timeout=self._access.patience.timeout_s
        )
        return found is not None and found.generation == generation

    def _send_all(self, url: str, known: bool) -> dict[str, Any]:
        """known: nothing has been sent yet. Returns the object's JSON."""
        self._offset: int | None = 0 if known else None
        step = self._access.retry()(self._step)
        while True:
            done: dict[str, Any] | None = step(url)
            if done is not None:
                return done

    def _step(self, url: str) -> dict[str, Any] | None:
        """Sends one chunk, asking first where it must begin if that is not certain."""
        if self._offset is None:
            return self._put(url, b"", f"bytes */{self._size}")
        offset, self._offset = self._offset, None
        chunk = self._read(offset)
        last = offset + len(chunk) == self._size
        headers = {"X-Goog-Hash": f"crc32c={self._checksum.base64}"} if last else {}
        return self._put(url, chunk, f"bytes {offset}-{offset + len(chunk) - 1}/{self._size}", headers)

    def _put(
        self, url: str, chunk: bytes, content_range: str, headers: dict[str, str] | None = None
    ) -> dict[str, Any] | None:
        response = self._http.put(
            url,
            data=chunk,
            headers={"Content-Range": content_range, **(headers or {})},
            timeout=self._access.patience.timeout_s,
            allow_redirects=False,
        )
        if response.status_code == GOING_ON:
            found = RANGE.match(response.headers.get("Range", ""))
            self._advance_to(int(found[1]) + 1 if found else 0)
            return None
        if not response.ok:
            raise exceptions.from_http_response(response)
        self._advance_to(self._size)
        return dict(response.json())

    def _advance_to(self, offset: int) -> None:
        self._offset = offset
        self._progress(max(0, offset - self._told))
        self._told = max(self._told, offset)

    def _read(self, offset: int) -> bytes:
        """The chunk at an offset; the checksum covers the file up to its end."""
        if self._summed > offset:
            self._checksum, self._summed = Crc32c(), 0
        self._file.seek(self._summed)
        while self._summed < offset:
            block = self._file.read(min(CHUNK_BYTES, offset - self._summed))
            self._checksum.update(block)
            self._summed += len(block)
        chunk = self._file.read(CHUNK_BYTES)
        self._checksum.update(chunk)
        self._summed += len(chunk)
        return chunk
