"""Request and response shapes."""

from datetime import UTC, datetime, time
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import UNSET, UnsetType

from services.notifier import models
from services.notifier.errors import InvalidLastEventId, NotAMoment
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


class Audience(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Exactly one of: `{"all": true}`, `{"user_ids": [...]}`, `{"locale": "de"}`, which takes `de-AT` in."""

    all: Literal[True] | UnsetType = UNSET
    user_ids: Annotated[list[UUID], msgspec.Meta(min_length=1, max_length=1000)] | UnsetType = UNSET
    locale: Annotated[str, msgspec.Meta(pattern=r"^[a-z]{2}(-[A-Z]{2})?$")] | UnsetType = UNSET

    def __post_init__(self) -> None:
        if sum(choice is not UNSET for choice in (self.all, self.user_ids, self.locale)) != 1:
            raise ValueError("Expected exactly one of `all`, `user_ids` and `locale`")

    def model(self) -> models.Audience:
        return models.Audience(
            None if isinstance(self.user_ids, UnsetType) else tuple(self.user_ids),
            None if isinstance(self.locale, UnsetType) else self.locale,
        )


_NO_NUL = r"^[^\x00]*$"  # which PostgreSQL does not keep
_TimeOfDay = Annotated[str, msgspec.Meta(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")]


class SendWindow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Times of the day; `{"from": "22:00", "until": "06:00", ...}` passes midnight. The time zone by its IANA name."""

    start: _TimeOfDay = msgspec.field(name="from")
    until: _TimeOfDay
    time_zone: Annotated[str, msgspec.Meta(min_length=1, max_length=100, pattern=_NO_NUL)]

    def __post_init__(self) -> None:
        if self.start == self.until:
            raise ValueError("Expected two different times")

    def model(self) -> models.SendWindow:
        return models.SendWindow(time.fromisoformat(self.start), time.fromisoformat(self.until), self.time_zone)


class NewCampaign(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=_NO_NUL)]
    subject: Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=20_000, pattern=_NO_NUL)]
    audience: Audience
    html: Annotated[str, msgspec.Meta(max_length=40_000, pattern=_NO_NUL)] | None = None
    send_at: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    window: SendWindow | None = None

    def model(self) -> models.NewCampaign:
        """Raises `NotAMoment`."""
        if self.send_at is not None:
            _require_in_utc(self.send_at)
        window = self.window.model() if self.window else None
        return models.NewCampaign(
            self.name, self.subject, self.text, self.html, self.audience.model(), window, self.send_at
        )


def _require_in_utc(moment: datetime) -> None:
    """The first and the last hours that a date can tell are beyond that elsewhere."""
    try:
        moment.astimezone(UTC)
    except OverflowError:
        raise NotAMoment("/send_at") from None


class Campaign(msgspec.Struct, frozen=True):
    """`queued` counts emails still to be sent; `ambiguous` those of which nobody can know whether they were."""

    id: UUID
    name: str
    subject: str
    state: models.CampaignState
    total: int
    queued: int
    sent: int
    failed: int
    suppressed: int
    ambiguous: int
    send_at: datetime
    created_at: datetime

    @classmethod
    def of(cls, progress: models.Progress) -> "Campaign":
        campaign = progress.campaign
        return cls(
            id=campaign.id,
            name=campaign.name,
            subject=campaign.subject,
            state=progress.state,
            total=progress.total,
            queued=progress.queued,
            sent=progress.sent,
            failed=progress.failed,
            suppressed=progress.suppressed,
            ambiguous=progress.ambiguous,
            send_at=campaign.send_at,
            created_at=campaign.created_at,
        )


def position_after(header: str | None, query: StreamQuery) -> int | None:
    """The position to go on from; `None` to start from now. Raises `InvalidLastEventId`."""
    given, pointer = (header, "/Last-Event-ID") if header else (query.last_event_id, "?last_event_id")
    if not given:
        return None
    if not (given.isascii() and given.isdecimal() and len(given) <= _MAX_POSITION_DIGITS):
        raise InvalidLastEventId(pointer)
    return int(given)
