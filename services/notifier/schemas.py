"""Request and response shapes."""

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import msgspec

from services.notifier import models
from services.notifier.errors import InvalidLastEventId
from shared.paging import PageQuery

_MAX_POSITION_DIGITS = 18


class InboxQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    unread: bool | None = None


class StreamQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`last_event_id` stands in for the header where a client cannot set it; the header wins."""

    last_event_id: str | None = None


class Notification(msgspec.Struct, frozen=True):
    id: UUID
    category: str
    title: str
    body: str
    data: dict[str, Any]
    read_at: datetime | None
    created_at: datetime

    @classmethod
    def of(cls, notification: models.Notification) -> "Notification":
        return msgspec.convert(notification, cls, from_attributes=True)


class NotificationPage(msgspec.Struct, frozen=True):
    items: list[Notification]
    next_cursor: str | None
    unread: int


class MediaChange(msgspec.Struct, frozen=True):
    """`data` of the stream's event `media`."""

    media_id: UUID
    status: str
    title: str
    reason: str | None = None


class Preferences(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which categories of email are wanted; what is not named is."""

    email: dict[str, bool]


class NewWebhook(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    url: Annotated[str, msgspec.Meta(min_length=8, max_length=2000)]
    events: Annotated[list[models.WebhookEvent], msgspec.Meta(min_length=1, max_length=20)]


class Webhook(msgspec.Struct, frozen=True, omit_defaults=True):
    """`secret` is in the answer to the creation only."""

    id: UUID
    url: str
    events: list[str]
    disabled: bool
    created_at: datetime
    secret: str | None = None

    @classmethod
    def of(cls, webhook: models.Webhook, secret: str | None = None) -> "Webhook":
        return cls(
            webhook.id, webhook.url, list(webhook.events), webhook.disabled_at is not None, webhook.created_at, secret
        )


class Delivery(msgspec.Struct, frozen=True):
    """`state` is queued, delivered or failed; `last_status` the receiver's last HTTP status, where it answered."""

    id: UUID
    event_id: UUID
    type: str
    state: str
    attempts: int
    next_attempt_at: datetime | None
    last_status: int | None
    last_error: str | None
    created_at: datetime

    @classmethod
    def of(cls, delivery: models.Delivery) -> "Delivery":
        waits = delivery.state in ("queued", "claimed")
        return cls(
            delivery.id,
            delivery.event_id,
            delivery.type,
            "queued" if waits else delivery.state,
            delivery.attempts,
            delivery.next_attempt_at if waits else None,
            delivery.last_status,
            delivery.last_error,
            delivery.created_at,
        )


def position_after(header: str | None, query: StreamQuery) -> int | None:
    """The position to go on from; `None` to start from now. Raises `InvalidLastEventId`."""
    given, pointer = (header, "/Last-Event-ID") if header else (query.last_event_id, "?last_event_id")
    if not given:
        return None
    if not (given.isascii() and given.isdecimal() and len(given) <= _MAX_POSITION_DIGITS):
        raise InvalidLastEventId(pointer)
    return int(given)
