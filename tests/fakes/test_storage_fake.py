"""The storage fake keeps to Cloud Storage's protocol, seen by Google's own client and by plain HTTP."""

import http.client
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.api_core.exceptions import BadRequest, Forbidden, NotFound, PreconditionFailed, TooManyRequests
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from google.cloud.storage.exceptions import InvalidResponse

from fakes.faults import Fault, Kind
from fakes.server import FakeServer
from fakes.storage import FakeStorage

CHUNK = 256 << 10


@pytest.fixture
def fake(tmp_path: Path) -> FakeStorage:
    made = FakeStorage(tmp_path / "buckets", page_size=3)
    made.make_bucket("b")
    return made


@pytest.fixture
def server(fake: FakeStorage) -> Iterator[FakeServer]:
    made = FakeServer([fake])
    yield made
    made.close()


@pytest.fixture
def bucket(server: FakeServer) -> Any:
    """A bucket of Google's client."""
    options = {"api_endpoint": server.url}
    return storage.Client(project="p", credentials=AnonymousCredentials(), client_options=options).bucket("b")


def test_small_and_large_objects_go_up_and_down(bucket: Any, tmp_path: Path) -> None:
    large = os.urandom(3 * CHUNK + 17)
    bucket.blob("a/small").upload_from_string(b"--\r\nsmall\r\n")
    (tmp_path / "large").write_bytes(large)
    bucket.blob("large", chunk_size=CHUNK).upload_from_filename(tmp_path / "large")
    assert bucket.blob("a/small").download_as_bytes() == b"--\r\nsmall\r\n"
    assert bucket.blob("large").download_as_bytes(start=10, end=CHUNK) == large[10 : CHUNK + 1]
    assert bucket.blob("large", chunk_size=CHUNK).download_as_bytes() == large
    assert (tmp_path / "buckets" / "b" / "large").read_bytes() == large


def test_listing_has_pages_prefixes_and_a_delimiter(bucket: Any) -> None:
    names = [f"runs/{run}/{file}" for run in ("a", "a-b", "b", "c") for file in ("x", "y")] + ["runs/file", "z"]
    for name in names:
        bucket.blob(name).upload_from_string(b"")
    assert [blob.name for blob in bucket.list_blobs()] == sorted(names)
    pages = bucket.list_blobs(prefix="runs/", delimiter="/")
    assert [blob.name for blob in pages] == ["runs/file"]
    assert pages.prefixes == {"runs/a/", "runs/a-b/", "runs/b/", "runs/c/"}
    assert pages.page_number == 2


def test_preconditions_and_generations(bucket: Any) -> None:
    blob = bucket.blob("a")
    blob.upload_from_string(b"1", if_generation_match=0)
    first = blob.generation
    with pytest.raises(PreconditionFailed):
        blob.upload_from_string(b"2", if_generation_match=0)
    blob.upload_from_string(b"2", if_generation_match=first)
    with pytest.raises(PreconditionFailed):
        bucket.blob("a").delete(if_generation_match=first)
    with pytest.raises(NotFound):
        bucket.blob("a", generation=first).download_as_bytes()
    bucket.blob("a").delete(if_generation_match=blob.generation)
    assert not bucket.blob("a").exists()


def test_compose_and_rewrite_copy_on_the_server(bucket: Any, fake: FakeStorage) -> None:
    fake.make_bucket("other")
    fake.rewrite_bytes = 4
    for name in ("1", "2"):
        bucket.blob(name).upload_from_string(name.encode() * 5)
    bucket.blob("both").compose([bucket.blob("1"), bucket.blob("2")])
    copy = bucket.client.bucket("other").blob("copy")
    token, calls = None, 0
    while calls == 0 or token:
        token, done, size = copy.rewrite(bucket.blob("both"), token=token)
        calls += 1
    assert (calls, done, size) == (3, 10, 10)
    assert copy.download_as_bytes() == b"1111122222"


def test_a_session_goes_on_in_another_process(server: FakeServer) -> None:
    data = os.urandom(2 * CHUNK + 5)
    begun = call(server, "POST", "/upload/storage/v1/b/b/o?uploadType=resumable", json.dumps({"name": "x"}).encode())
    session = begun.headers["Location"].removeprefix(server.url)
    server.faults.add(Fault(Kind.RETURN_503_AFTER, "PUT", after_bytes=CHUNK + 1))
    whole = {"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}"}
    assert call(server, "PUT", session, data, whole).status == 503
    asked = call(server, "PUT", session, b"", {"Content-Range": "bytes */*"})
    assert (asked.status, asked.headers["Range"]) == (308, f"bytes=0-{CHUNK - 1}")
    rest = {"Content-Range": f"bytes {CHUNK}-{len(data) - 1}/{len(data)}"}
    assert call(server, "PUT", session, data[CHUNK:], rest).status == 200
    assert call(server, "GET", "/download/storage/v1/b/b/o/x?alt=media").body == data
    assert call(server, "PUT", session, b"", {"Content-Range": "bytes */*"}).status == 200  # told again
    assert call(server, "DELETE", session).status == 499
    assert call(server, "PUT", session, b"", {"Content-Range": "bytes */*"}).status == 410


def test_bytes_that_change_on_their_way_make_no_object(bucket: Any, server: FakeServer) -> None:
    for where, size in (("POST", 100), ("PUT", None)):  # of unknown size is in chunks
        server.faults.add(Fault(Kind.WRONG_CHECKSUM, where))
        with pytest.raises((BadRequest, InvalidResponse)):
            bucket.blob("x").upload_from_file(io.BytesIO(os.urandom(100)), size=size, checksum="crc32c", retry=None)
        assert server.faults.waiting == 0
    assert not bucket.blob("x").exists()


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        (Kind.RETURN_503, 503),
        (Kind.RETURN_408, 408),
        (Kind.RETURN_429, 429),
        (Kind.STALE_GENERATION, 412),
        (Kind.RESET, "ended"),
        (Kind.ANSWER_LOST, "ended"),
        (Kind.STALL, "ended"),
        (Kind.BROKEN_STREAM, "cut"),
        (Kind.WRONG_CHECKSUM, "changed"),
    ],
)
def test_each_fault_comes_once(server: FakeServer, bucket: Any, kind: Kind, seen: int | str) -> None:
    bucket.blob("a").upload_from_string(b"data" * 100)
    path = "/download/storage/v1/b/b/o/a?alt=media"
    server.faults.add(Fault(kind, "GET /download", seconds=0.1))
    found = call(server, "GET", path)
    if seen == "changed":
        assert (found.status, len(found.body)) == (200, 400)
        assert found.body != b"data" * 100
    else:
        assert found.status == seen
    assert server.faults.waiting == 0
    assert call(server, "GET", path).body == b"data" * 100


def test_a_denied_permission_and_a_full_quota_are_google_errors(
    bucket: Any, fake: FakeStorage, server: FakeServer
) -> None:
    fake.denied.add("storage.objects.create")
    with pytest.raises(Forbidden, match=r"storage\.objects\.create"):
        bucket.blob("a").upload_from_string(b"")
    asked = ["storage.objects.list", "storage.objects.create", "storage.objects.get"]
    assert bucket.test_iam_permissions(asked) == ["storage.objects.list", "storage.objects.get"]
    server.faults.add(Fault(Kind.RETURN_429))
    with pytest.raises(TooManyRequests):
        bucket.blob("a").exists(retry=None)


class Reply:
    def __init__(self, status: int | str, headers: Any = None, body: bytes = b"") -> None:
        self.status, self.headers, self.body = status, headers or {}, body


def call(
    server: FakeServer, method: str, path: str, data: bytes | None = None, headers: dict[str, str] | None = None
) -> Reply:
    """The reply, whatever its status; `ended` or `cut` where the connection was."""
    asked = urllib.request.Request(server.url + path, data=data, headers=headers or {}, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=10) as reply:
            body = reply.read()
            cut = len(body) != int(reply.headers["Content-Length"])
            return Reply("cut" if cut else reply.status, reply.headers, body)
    except urllib.error.HTTPError as failed:
        return Reply(failed.code, failed.headers, failed.read())
    except (ConnectionError, urllib.error.URLError):
        return Reply("ended")
    except http.client.IncompleteRead:
        return Reply("cut")
