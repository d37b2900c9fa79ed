"""What media's worker needs of the events it consumes: its own, and that a user is gone."""

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


class UserDeleted(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "user.deleted.v1"
    TOPIC: ClassVar = "users.events"
    KEY: ClassVar = "user_id"

    user_id: UUID


CONSUMES: tuple[type[Event], ...] = (MediaUploaded, MediaDeleted, UserDeleted)
