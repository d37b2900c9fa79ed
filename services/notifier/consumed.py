"""What notifier reads of other services' events: only the fields it needs, so that new ones do not concern it."""

from typing import ClassVar
from uuid import UUID

import msgspec

from services.notifier.events import CampaignChunkQueued, CampaignCreated
from shared.events import Event


class SealedLink(msgspec.Struct, frozen=True):
    """The token of a link, to be opened only where the email is composed."""

    sealed_token: str
    valid_hours: int


class _Profile(Event, frozen=True, kw_only=True):
    """The whole account as it is at that version."""

    TOPIC: ClassVar = "users.events"
    KEY: ClassVar = "user_id"

    user_id: UUID
    email: str
    display_name: str
    locale: str
    version: int


class UserRegistered(_Profile, frozen=True, kw_only=True):
    TYPE: ClassVar = "user.registered.v1"

    link: SealedLink | None = None  # events from before there were links have none


class UserUpdated(_Profile, frozen=True, kw_only=True):
    TYPE: ClassVar = "user.updated.v1"


class UserVerificationRequested(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "user.verification_requested.v1"
    TOPIC: ClassVar = "users.events"
    KEY: ClassVar = "user_id"

    user_id: UUID
    link: SealedLink


class UserPasswordResetRequested(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "user.password_reset_requested.v1"
    TOPIC: ClassVar = "users.events"
    KEY: ClassVar = "user_id"

    user_id: UUID
    link: SealedLink


class UserPasswordChanged(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "user.password_changed.v1"
    TOPIC: ClassVar = "users.events"
    KEY: ClassVar = "user_id"

    user_id: UUID


class UserDeleted(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "user.deleted.v1"
    TOPIC: ClassVar = "users.events"
    KEY: ClassVar = "user_id"

    user_id: UUID


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
    UserVerificationRequested,
    UserPasswordResetRequested,
    UserPasswordChanged,
    UserDeleted,
    MediaProcessed,
    MediaFailed,
    CampaignCreated,
    CampaignChunkQueued,
)
