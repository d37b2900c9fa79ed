"""What media publishes. The JSON Schemas under `schemas/` are made from these classes; contract tests compare them."""

from typing import ClassVar
from uuid import UUID

import msgspec

from shared.events import Event

TOPIC = "media.events"


class MediaUploaded(Event, frozen=True, kw_only=True):
    """The bytes are in the store. `blob_id` is where; media of identical bytes share one."""

    TYPE: ClassVar = "media.uploaded.v1"
    TOPIC: ClassVar = TOPIC
    KEY: ClassVar = "media_id"

    media_id: UUID
    owner_id: UUID
    blob_id: UUID
    sha256: str
    content_type: str
    bytes: int


class VariantMade(msgspec.Struct, frozen=True):
    name: str
    content_type: str
    width: int
    height: int
    bytes: int


class MediaProcessed(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "media.processed.v1"
    TOPIC: ClassVar = TOPIC
    KEY: ClassVar = "media_id"

    media_id: UUID
    owner_id: UUID
    title: str
    width: int
    height: int
    variants: tuple[VariantMade, ...]


class MediaFailed(Event, frozen=True, kw_only=True):
    """The image cannot be processed, whatever is tried. `code` is for programs, `reason` for people."""

    TYPE: ClassVar = "media.failed.v1"
    TOPIC: ClassVar = TOPIC
    KEY: ClassVar = "media_id"

    media_id: UUID
    owner_id: UUID
    title: str
    code: str
    reason: str


class MediaDeleted(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "media.deleted.v1"
    TOPIC: ClassVar = TOPIC
    KEY: ClassVar = "media_id"

    media_id: UUID
    owner_id: UUID


PRODUCES: tuple[type[Event], ...] = (MediaUploaded, MediaProcessed, MediaFailed, MediaDeleted)
