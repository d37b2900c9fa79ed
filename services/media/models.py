"""What media are, and the rules that need nothing else."""

from collections.abc import Iterable, Iterator
from datetime import datetime
from enum import StrEnum
from uuid import UUID

import msgspec


class Status(StrEnum):
    PROCESSING = "processing"
    READY = "ready"
    FAILED = "failed"


class Visibility(StrEnum):
    PRIVATE = "private"
    PUBLIC = "public"


class Variant(msgspec.Struct, frozen=True):
    """A WebP made from an original, and its hash."""

    name: str
    width: int
    height: int
    bytes: int
    sha256: str


# A span of the stored original (where it starts and how long it is), or bytes that stand in for another.
Piece = tuple[int, int] | bytes


class Shown(msgspec.Struct, frozen=True):
    """An original as everybody may see it, without its metadata: the pieces in order, their sum and their hash."""

    pieces: tuple[Piece, ...]
    bytes: int
    sha256: str


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """An image of an owner. `blob_id` names its bytes, which it may share with other media."""

    id: UUID
    owner_id: UUID
    blob_id: UUID
    title: str
    visibility: Visibility
    status: Status
    failure: str | None
    content_type: str
    bytes: int
    width: int | None
    height: int | None
    sha256: str
    placeholder: str | None
    variants: tuple[Variant, ...]
    shown: Shown | None
    created_at: datetime
    updated_at: datetime
    version: int

    def variant(self, name: str) -> Variant | None:
        return next((v for v in self.variants if v.name == name), None)


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """An upload straight to the store; `media_id` is what came of it, once it is complete."""

    id: UUID
    owner_id: UUID
    content_type: str
    bytes: int
    expires_at: datetime
    media_id: UUID | None


class Usage(msgspec.Struct, frozen=True):
    bytes: int
    items: int


class Quota(msgspec.Struct, frozen=True):
    bytes: int
    items: int

    def allows(self, usage: Usage) -> bool:
        return usage.bytes <= self.bytes and usage.items <= self.items


class Processed(msgspec.Struct, frozen=True):
    """What processing an original gave; width and height are those of the image as the eye sees it.

    `shown` is how others see the original; `None` where its metadata cannot be told from the picture.
    """

    width: int
    height: int
    placeholder: str
    variants: tuple[Variant, ...]
    shown: Shown | None


# What the parts agree on: name -> longest side in pixels. They are never larger than the original.
VARIANTS = {"small": 256, "medium": 640, "large": 1280}
VARIANT_TYPE = "image/webp"
# Of what moves there is one more, which moves too; the others show the first frame.
ANIMATED, ANIMATED_LONGEST = "animated", 640


def variant_path(media_id: UUID, name: str) -> str:
    """Where the API serves a variant; what a signature covers."""
    return f"/api/v1/media/{media_id}/variants/{name}"


def original_path(media_id: UUID) -> str:
    """Where the API serves the original; what a signature covers."""
    return f"/api/v1/media/{media_id}/original"


def upload_path(upload_id: UUID) -> str:
    """Where the API takes the bytes of an upload, for a store that cannot sign URLs itself."""
    return f"/api/v1/media/uploads/{upload_id}"


def incoming_key(upload_id: UUID) -> str:
    """Where a client writes; nothing else is ever read from there than to copy it."""
    return f"incoming/{upload_id}"


def all_keys(blob_id: UUID) -> list[str]:
    """Every object that a blob may have."""
    return [original_key(blob_id), *(variant_key(blob_id, name) for name in (*VARIANTS, ANIMATED))]


def original_key(blob_id: UUID) -> str:
    return f"originals/{blob_id}"


def variant_key(blob_id: UUID, name: str) -> str:
    return f"variants/{blob_id}/{name}.webp"


def cut(pieces: Iterable[Piece], start: int, length: int) -> Iterator[Piece]:
    """`length` bytes from `start` of what the pieces make up."""
    end = start + length
    at = 0
    for piece in pieces:
        size = len(piece) if isinstance(piece, bytes) else piece[1]
        first, last = max(start - at, 0), min(end - at, size)
        if first < last:
            yield piece[first:last] if isinstance(piece, bytes) else (piece[0] + first, last - first)
        at += size
