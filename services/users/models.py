"""What users is about, and the rules that need nothing but their arguments."""

import re
import unicodedata
from datetime import datetime
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
