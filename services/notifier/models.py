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
from datetime import datetime
from enum import StrEnum
from typing import Any
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
    PASSWORD_CHANGED = "password_changed"  # noqa: S105 - a name
    VERIFY_EMAIL = "verify_email"
    RESET_PASSWORD = "reset_password"  # noqa: S105 - a name


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


class Email(msgspec.Struct, frozen=True):
    """An email in the hands of a sender, who is named by `claim`. `attempts` counts the one in hand."""

    id: UUID
    claim: UUID
    category: str
    context: dict[str, Any]
    message_id: str
    attempts: int
    address: str
    display_name: str
    locale: str


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


def greeting_name(text: str) -> str:
    """The name as a message may use it; empty if mail programs could make a link of it. Who registers chooses the
    name and an address, which may be a stranger's: that must not be a way to send strangers links."""
    name = one_line(text)
    return "" if _LINK.search(name) else name


def one_line(text: str) -> str:
    """`text` without line breaks and other controls: what people write ends up in headers and titles."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
