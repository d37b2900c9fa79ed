"""What users publishes. The JSON Schemas under `schemas/` are made from these classes; contract tests compare them."""

from typing import ClassVar
from uuid import UUID

from shared.events import Event

TOPIC = "users.events"


class UserRegistered(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "user.registered.v1"
    TOPIC: ClassVar = TOPIC
    KEY: ClassVar = "user_id"

    user_id: UUID
    email: str
    display_name: str
    locale: str
    version: int


class UserUpdated(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "user.updated.v1"
    TOPIC: ClassVar = TOPIC
    KEY: ClassVar = "user_id"

    user_id: UUID
    email: str
    display_name: str
    locale: str
    version: int


PRODUCES: tuple[type[Event], ...] = (UserRegistered, UserUpdated)
