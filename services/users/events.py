"""What users publishes. The JSON Schemas under `schemas/` are made from these classes; contract tests compare them."""

from typing import ClassVar
from uuid import UUID

import msgspec

from shared.events import Event

TOPIC = "users.events"


class SealedLink(msgspec.Struct, frozen=True):
    """The token of a link, readable with `LINK_SECRET` only (`shared.sealing`)."""

    sealed_token: str
    valid_hours: int


class _Profile(Event, frozen=True, kw_only=True):
    """The whole account as it is at that version."""

    TOPIC: ClassVar = TOPIC
    KEY: ClassVar = "user_id"

    user_id: UUID
    email: str
    display_name: str
    locale: str
    version: int
    email_verified: bool | None = None  # unknown: from before it was told


class UserRegistered(_Profile, frozen=True, kw_only=True):
    TYPE: ClassVar = "user.registered.v1"

    link: SealedLink


class UserUpdated(_Profile, frozen=True, kw_only=True):
    TYPE: ClassVar = "user.updated.v1"


class UserVerificationRequested(Event, frozen=True, kw_only=True):
    """Whoever owns the address is to be sent a link that proves it."""

    TYPE: ClassVar = "user.verification_requested.v1"
    TOPIC: ClassVar = TOPIC
    KEY: ClassVar = "user_id"

    user_id: UUID
    link: SealedLink


class UserPasswordResetRequested(Event, frozen=True, kw_only=True):
    """Whoever owns the address is to be sent a link that lets them choose a new password."""

    TYPE: ClassVar = "user.password_reset_requested.v1"
    TOPIC: ClassVar = TOPIC
    KEY: ClassVar = "user_id"

    user_id: UUID
    link: SealedLink


class UserPasswordChanged(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "user.password_changed.v1"
    TOPIC: ClassVar = TOPIC
    KEY: ClassVar = "user_id"

    user_id: UUID


class UserDeleted(Event, frozen=True, kw_only=True):
    """The account is gone: whoever has something of the user forgets it."""

    TYPE: ClassVar = "user.deleted.v1"
    TOPIC: ClassVar = TOPIC
    KEY: ClassVar = "user_id"

    user_id: UUID


PRODUCES: tuple[type[Event], ...] = (
    UserRegistered,
    UserUpdated,
    UserVerificationRequested,
    UserPasswordResetRequested,
    UserPasswordChanged,
    UserDeleted,
)
