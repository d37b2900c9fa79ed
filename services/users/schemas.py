"""Request and response shapes."""

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, UnsetType

from services.users import models
from shared.paging import PageQuery

_WITHOUT_NUL = r"^[^\x00]*$"  # PostgreSQL takes any other character
Password = Annotated[str, Meta(min_length=8, max_length=256)]
Address = Annotated[str, Meta(min_length=3, max_length=models.MAX_ADDRESS_LENGTH, pattern=_WITHOUT_NUL)]
# `$` alone would let a line feed at the end pass.
DisplayName = Annotated[
    str,
    Meta(min_length=1, max_length=80, pattern=r"^[^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f][^\x00-\x1f\x7f]*(?!\n)$"),
]
Bio = Annotated[str, Meta(max_length=1000, pattern=_WITHOUT_NUL)]
Locale = Annotated[str, Meta(pattern=r"^[a-z]{2}(-[A-Z]{2})?(?!\n)$")]


class Register(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    email: Address
    password: Password
    display_name: DisplayName


class LogIn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    email: Address
    password: Annotated[str, Meta(max_length=256)]


class Refresh(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    refresh_token: Annotated[str, Meta(max_length=256)]


class ChangePassword(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    current_password: Annotated[str, Meta(max_length=256)]
    new_password: Password


class RequestReset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    email: Address


class ResetPassword(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    new_password: Password


class AccountQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    query: Annotated[str, Meta(max_length=254, pattern=_WITHOUT_NUL)] = ""


class AdminChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["user", "admin"] | UnsetType = UNSET
    disabled: bool | UnsetType = UNSET


class ChangeAccount(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    display_name: DisplayName | UnsetType = UNSET
    bio: Bio | UnsetType = UNSET
    locale: Locale | UnsetType = UNSET


class User(msgspec.Struct, frozen=True):
    id: UUID
    email: str
    email_verified: bool
    display_name: str
    bio: str
    locale: str
    role: str
    created_at: datetime
    updated_at: datetime
    version: int

    @classmethod
    def of(cls, account: models.Account) -> "User":
        return msgspec.convert(account, cls, from_attributes=True)


class AdminUser(User, frozen=True, kw_only=True):
    disabled: bool

    @classmethod
    def of(cls, account: models.Account) -> "AdminUser":
        return msgspec.convert(account, cls, from_attributes=True)


class SecurityEvent(msgspec.Struct, frozen=True):
    id: UUID
    what: str
    device: str
    address: str
    created_at: datetime

    @classmethod
    def of(cls, event: models.SecurityEvent) -> "SecurityEvent":
        return cls(event.id, event.what.value, event.device, event.address, event.created_at)


class PublicProfile(msgspec.Struct, frozen=True):
    id: UUID
    display_name: str
    bio: str
    created_at: datetime

    @classmethod
    def of(cls, profile: models.Profile) -> "PublicProfile":
        return cls(profile.id, profile.display_name, profile.bio, profile.created_at)


class SessionTokens(msgspec.Struct, frozen=True):
    access_token: str
    token_type: str
    expires_in: int
    refresh_token: str

    @classmethod
    def of(cls, tokens: models.Tokens) -> "SessionTokens":
        return cls(tokens.access_token, "Bearer", tokens.expires_in, tokens.refresh_token)


class SessionEntry(msgspec.Struct, frozen=True):
    id: UUID
    device: str
    address: str
    created_at: datetime
    last_seen_at: datetime
    current: bool

    @classmethod
    def of(cls, session: models.Session, current: UUID) -> "SessionEntry":
        return cls(
            session.id,
            session.device,
            session.address,
            session.created_at,
            session.last_seen_at,
            current=session.id == current,
        )


class Jwk(msgspec.Struct, frozen=True):
    kid: str
    x: str
    kty: str = "OKP"
    crv: str = "Ed25519"
    use: str = "sig"
    alg: str = "EdDSA"


class JwkSet(msgspec.Struct, frozen=True):
    keys: list[Jwk]
