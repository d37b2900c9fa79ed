"""What users is about, and the rules that need nothing but their arguments."""

import re
import unicodedata
from datetime import datetime
from enum import StrEnum
from uuid import UUID

import msgspec

from shared.auth import Role

# Deliberately loose: whether an address works is found out by writing to it.
_ADDRESS = re.compile(r"[^@\s]{1,64}@[^@\s.]+(\.[^@\s.]+)+")
MAX_ADDRESS_LENGTH = 254


class Account(msgspec.Struct, frozen=True):
    id: UUID
    email: str
    email_verified: bool
    display_name: str
    bio: str
    locale: str
    role: Role
    created_at: datetime
    updated_at: datetime
    version: int
    disabled: bool = False


class Profile(msgspec.Struct, frozen=True):
    """What everybody may see of an account."""

    id: UUID
    display_name: str
    bio: str
    created_at: datetime
    version: int


class Session(msgspec.Struct, frozen=True):
    id: UUID
    account_id: UUID
    device: str
    address: str
    created_at: datetime
    last_seen_at: datetime


class Client(msgspec.Struct, frozen=True):
    """Where a request came from, as shown in the list of sessions."""

    device: str
    address: str


class Purpose(StrEnum):
    """What the link of an email is for, and for how many hours it is good."""

    VERIFY_EMAIL = "verify_email"
    RESET_PASSWORD = "reset_password"  # noqa: S105 - a name

    @property
    def valid_hours(self) -> int:
        return 48 if self is Purpose.VERIFY_EMAIL else 1


class Happening(StrEnum):
    """What the audit table notes."""

    REGISTERED = "registered"
    LOGGED_IN = "logged_in"
    LOGIN_FAILED = "login_failed"
    SESSION_ENDED = "session_ended"
    SESSIONS_ENDED = "sessions_ended"
    REFRESH_TOKEN_REUSED = "refresh_token_reused"  # noqa: S105 - a name
    VERIFICATION_REQUESTED = "verification_requested"
    EMAIL_VERIFIED = "email_verified"
    RESET_REQUESTED = "reset_requested"
    PASSWORD_RESET = "password_reset"  # noqa: S105 - a name
    PASSWORD_CHANGED = "password_changed"  # noqa: S105 - a name
    ROLE_CHANGED = "role_changed"
    DISABLED = "disabled"
    ENABLED = "enabled"


class SecurityEvent(msgspec.Struct, frozen=True):
    """Where the client is empty, an administrator or the platform did it."""

    id: UUID
    what: Happening
    device: str
    address: str
    created_at: datetime


class Tokens(msgspec.Struct, frozen=True):
    access_token: str
    refresh_token: str
    expires_in: int


def normalised_address(text: str) -> str | None:
    """The form in which addresses are compared and stored; `None` when it cannot be an address."""
    address = unicodedata.normalize("NFKC", text.strip()).casefold()
    if len(address) > MAX_ADDRESS_LENGTH or not _ADDRESS.fullmatch(address) or not address.isprintable():
        return None
    return address


def keeps_its_letters(text: str) -> bool:
    """Whether the normalised form is the address as given, but for the case; else it may be another's mailbox."""
    return normalised_address(text) == unicodedata.normalize("NFC", text.strip()).lower()
