"""What notifier is about, and the rules that need nothing but their arguments.

An email goes through these states:

    queued ──> claimed ──> sending ──> sent
      ^           │           │
      ├───────────┘           ├──> failed      refused for good (5xx), or given up after many attempts
      ├───────────────────────┤
      │   refused for now     └──> ambiguous   the message went out, its answer never came: it may have arrived
      └──────────────────────────────┘         only with EMAIL_RETRY_AMBIGUOUS

A sender that dies leaves its rows claimed or sending; when their lease is over, who finds them queues the claimed ones
again, for nothing of them has left, and treats those in sending as ambiguous. So each email is sent at most once, and
lost only where nobody can know whether it was sent. Exactly once does not exist for SMTP.
"""

import re
from collections.abc import Mapping
from datetime import datetime, time
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import msgspec

# One atom and a domain, or none: what else RFC 5321 allows is rare, and some of it could end the command it stands in.
_ADDRESS = re.compile(r"[^\s\x00-\x20\x7f()<>\[\]\\,;:\"@]{1,64}@[^\s\x00-\x20\x7f()<>\[\]\\,;:\"@]{1,255}")

_LINK = re.compile(r"[:/@]|\w\.\w")


class Category(StrEnum):
    """What a notification is about; there are templates for each."""

    WELCOME = "welcome"
    MEDIA_READY = "media_ready"
    MEDIA_FAILED = "media_failed"
    WEBHOOK_DISABLED = "webhook_disabled"
    CAMPAIGN = "campaign"  # its texts come with the campaign
    PASSWORD_CHANGED = "password_changed"  # noqa: S105 - a name
    VERIFY_EMAIL = "verify_email"
    RESET_PASSWORD = "reset_password"  # noqa: S105 - a name


# What somebody asked for, or must not miss, is no matter of preference.
OPTIONAL = frozenset(Category) - {Category.VERIFY_EMAIL, Category.RESET_PASSWORD, Category.PASSWORD_CHANGED}


class Recipient(msgspec.Struct, frozen=True):
    user_id: UUID
    email: str | None
    display_name: str
    locale: str
    stream_position: int


class Notification(msgspec.Struct, frozen=True):
    id: UUID
    user_id: UUID
    category: str
    title: str
    body: str
    data: dict[str, Any]
    read_at: datetime | None
    created_at: datetime


class StreamEntry(msgspec.Struct, frozen=True):
    """`data` is JSON without line breaks."""

    position: int
    event: str
    data: str


class EmailState(StrEnum):
    QUEUED = "queued"
    CLAIMED = "claimed"
    SENDING = "sending"
    SENT = "sent"
    FAILED = "failed"
    AMBIGUOUS = "ambiguous"
    SUPPRESSED = "suppressed"  # not wanted by its recipient, or the address refuses email


class Email(msgspec.Struct, frozen=True):
    """An email in the hands of a sender, who is named by `claim`. `attempts` counts the one in hand.

    A `suppressed` one is not to be sent, which is noted already.
    """

    id: UUID
    claim: UUID
    user_id: UUID
    category: str
    context: dict[str, Any]
    message_id: str
    attempts: int
    address: str
    display_name: str
    locale: str
    unsubscribe_token: UUID
    campaign_id: UUID | None
    suppressed: bool


class Leaving(msgspec.Struct, frozen=True):
    """An email that is about to leave."""

    email: Email


class Ended(msgspec.Struct, frozen=True):
    """An attempt and what follows: the email's state, and how long to wait before the next attempt if it is `QUEUED`.

    `counted` is false where nothing was attempted; `bounced` says that the address takes no email.
    """

    email: Email
    state: EmailState
    delay_seconds: float = 0
    error: str | None = None
    counted: bool = True
    bounced: bool = False


class Content(msgspec.Struct, frozen=True):
    """What an email says."""

    subject: str
    text: str
    html: str


class Outcome(StrEnum):
    """What became of one attempt to send."""

    SENT = "sent"
    REFUSED = "refused"  # for good: it is this message or this address
    POSTPONED = "postponed"  # the server will not take it now, or there is no server
    AMBIGUOUS = "ambiguous"


class WebhookEvent(StrEnum):
    """What webhooks can be told of."""

    MEDIA_PROCESSED = "media.processed"
    MEDIA_FAILED = "media.failed"


class Webhook(msgspec.Struct, frozen=True):
    id: UUID
    user_id: UUID
    url: str
    events: tuple[str, ...]
    secret: str
    disabled_at: datetime | None
    created_at: datetime


class Delivery(msgspec.Struct, frozen=True):
    """One event for one webhook, and how its delivery goes."""

    id: UUID
    webhook_id: UUID
    event_id: UUID
    type: str
    state: str
    attempts: int
    next_attempt_at: datetime
    last_status: int | None
    last_error: str | None
    created_at: datetime


class DeliveryInHand(msgspec.Struct, frozen=True):
    """A delivery in the hands of a dispatcher, who is named by `claim`. `attempts` counts the one in hand."""

    id: UUID
    webhook_id: UUID
    claim: UUID
    event_id: UUID
    payload: str
    attempts: int
    url: str
    secret: str


class Audience(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whom a campaign is for: everybody, or who is named, or who reads that language."""

    user_ids: tuple[UUID, ...] | None = None
    locale: str | None = None


class SendWindow(msgspec.Struct, frozen=True):
    """The times of the day at which a campaign is sent. One that begins after it ends passes midnight."""

    start: time
    until: time
    time_zone: str


class NewCampaign(msgspec.Struct, frozen=True):
    """What an administrator wants sent: at once, or from `send_at` on."""

    name: str
    subject: str
    text: str
    html: str | None
    audience: Audience
    window: SendWindow | None = None
    send_at: datetime | None = None


class CampaignState(StrEnum):
    SCHEDULED = "scheduled"
    RUNNING = "running"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    DONE = "done"


class Campaign(msgspec.Struct, frozen=True):
    """`state` is what was ordered: running, paused or cancelled; what it comes to is told by `Progress`. `counts` are
    those of its emails by state, once nothing of it is left to send."""

    id: UUID
    name: str
    subject: str
    text: str
    html: str | None
    audience: Audience
    window: SendWindow | None
    send_at: datetime
    state: str
    prepared: bool
    created_at: datetime
    counts: dict[str, int] | None

    def as_made(self) -> "Campaign":
        """What it was when it was made, whatever was ordered since."""
        return msgspec.structs.replace(self, state=CampaignState.RUNNING, prepared=False, counts=None)


class Progress(msgspec.Struct, frozen=True):
    """A campaign and how far it is. `queued` counts those in hand, too."""

    campaign: Campaign
    state: CampaignState
    total: int
    queued: int
    sent: int
    failed: int
    suppressed: int
    ambiguous: int

    @classmethod
    def of(cls, campaign: Campaign, counted: Mapping[str, int], now: datetime) -> "Progress":
        """`counted`: its emails by state; not needed where the campaign has its counts."""
        counts = counted if campaign.counts is None else campaign.counts
        queued = sum(counts.get(s, 0) for s in (EmailState.QUEUED, EmailState.CLAIMED, EmailState.SENDING))
        state = CampaignState(campaign.state)
        if state is not CampaignState.CANCELLED and campaign.prepared and queued == 0:
            state = CampaignState.DONE
        elif state is CampaignState.RUNNING and campaign.send_at > now:
            state = CampaignState.SCHEDULED
        return cls(
            campaign=campaign,
            state=state,
            total=sum(counts.values()),
            queued=queued,
            sent=counts.get(EmailState.SENT, 0),
            failed=counts.get(EmailState.FAILED, 0),
            suppressed=counts.get(EmailState.SUPPRESSED, 0),
            ambiguous=counts.get(EmailState.AMBIGUOUS, 0),
        )


class RetryPolicy(msgspec.Struct, frozen=True):
    """When to try again; times in seconds."""

    max_attempts: int
    first_delay: float
    longest_delay: float
    retry_ambiguous: bool

    def decide(self, outcome: Outcome, attempts: int) -> tuple[EmailState, float]:
        """The state after the given number of attempts, and the delay before the next."""
        match outcome:
            case Outcome.SENT:
                return EmailState.SENT, 0
            case Outcome.REFUSED:
                return EmailState.FAILED, 0
            case Outcome.AMBIGUOUS if not self.retry_ambiguous:
                return EmailState.AMBIGUOUS, 0
        if attempts >= self.max_attempts:
            return (EmailState.AMBIGUOUS if outcome is Outcome.AMBIGUOUS else EmailState.FAILED), 0
        return EmailState.QUEUED, min(self.longest_delay, self.first_delay * 3.0 ** min(attempts - 1, 30))


def is_sendable(address: str) -> bool:
    """Whether the address can stand in an SMTP command and in a header as it is."""
    return _ADDRESS.fullmatch(address) is not None


def without_links(text: str) -> str:
    """A name or a title as a message may use it; empty if mail programs could make a link of it. Who registers chooses
    names and an address, which may be a stranger's: that must not be a way to send strangers links."""
    line = one_line(text)
    return "" if _LINK.search(line) else line


def in_email(context: Mapping[str, Any]) -> dict[str, Any]:
    """What an email is made from, without what its recipient's account could have a stranger sent: see
    `without_links`. Of a webhook's URL the host is left."""
    kept = dict(context)
    if "title" in kept:
        kept["title"] = without_links(kept["title"])
    if "url" in kept:
        kept["url"] = urlsplit(kept["url"]).hostname
    return kept


def one_line(text: str) -> str:
    """`text` without line breaks and other controls: what people write ends up in headers and titles."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
