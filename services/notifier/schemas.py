"""Request and response shapes."""

from datetime import datetime
from typing import Any
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


def position_after(header: str | None, query: StreamQuery) -> int | None:
    """The position to go on from; `None` to start from now. Raises `InvalidLastEventId`."""
    given, pointer = (header, "/Last-Event-ID") if header else (query.last_event_id, "?last_event_id")
    if not given:
        return None
    if not (given.isascii() and given.isdecimal() and len(given) <= _MAX_POSITION_DIGITS):
        raise InvalidLastEventId(pointer)
    return int(given)
