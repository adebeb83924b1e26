"""What the parts of the storage fake share: an object's JSON, its own metadata, and a request's precondition."""

from collections.abc import Mapping
from typing import Any

from g4kit.cloud.base import Object

Metadata = dict[tuple[str, str, int], dict[str, str]]
"""What clients keep with an object, by bucket, name and generation; files have no place for it."""


def resource(bucket: str, found: Object, metadata: Metadata) -> dict[str, Any]:
    """The JSON of an object; numbers are strings, as everywhere in this API."""
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": found.name,
        "size": str(found.size),
        "generation": str(found.generation),
        "metageneration": "1",
        "metadata": metadata.get((bucket, found.name, found.generation), {}),
        "crc32c": found.crc32c,
        "updated": found.updated.isoformat(timespec="microseconds").replace("+00:00", "Z"),
    }


def generation_match(query: Mapping[str, str]) -> int | None:
    return int(query["ifGenerationMatch"]) if "ifGenerationMatch" in query else None
