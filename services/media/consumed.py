"""What media's worker needs of the events it consumes, which are its own."""

from typing import ClassVar
from uuid import UUID

from services.media.events import TOPIC
from shared.events import Event


class MediaUploaded(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "media.uploaded.v1"
    TOPIC: ClassVar = TOPIC
    KEY: ClassVar = "media_id"

    media_id: UUID
    owner_id: UUID
    blob_id: UUID
    content_type: str
    bytes: int


class MediaDeleted(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "media.deleted.v1"
    TOPIC: ClassVar = TOPIC
    KEY: ClassVar = "media_id"

    media_id: UUID


CONSUMES: tuple[type[Event], ...] = (MediaUploaded, MediaDeleted)
