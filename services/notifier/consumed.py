"""What notifier reads of other services' events: only the fields it needs, so that new ones do not concern it."""

from typing import ClassVar
from uuid import UUID

from services.notifier.events import CampaignChunkQueued, CampaignCreated
from shared.events import Event


class UserRegistered(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "user.registered.v1"
    TOPIC: ClassVar = "users.events"
    KEY: ClassVar = "user_id"

    user_id: UUID
    email: str
    display_name: str
    locale: str
    version: int


class UserUpdated(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "user.updated.v1"
    TOPIC: ClassVar = "users.events"
    KEY: ClassVar = "user_id"

    user_id: UUID
    email: str
    display_name: str
    locale: str
    version: int


class MediaProcessed(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "media.processed.v1"
    TOPIC: ClassVar = "media.events"
    KEY: ClassVar = "media_id"

    media_id: UUID
    owner_id: UUID
    title: str


class MediaFailed(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "media.failed.v1"
    TOPIC: ClassVar = "media.events"
    KEY: ClassVar = "media_id"

    media_id: UUID
    owner_id: UUID
    title: str
    reason: str


CONSUMES: tuple[type[Event], ...] = (
    UserRegistered,
    UserUpdated,
    MediaProcessed,
    MediaFailed,
    CampaignCreated,
    CampaignChunkQueued,
)
