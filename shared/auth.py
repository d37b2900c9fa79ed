"""Who calls: access tokens (JWT, EdDSA) verified by every service itself against the users' public keys.

Algorithm, type, issuer and audience are fixed; key hints in the token (`jku`, `jwk`, `x5u`) are ignored. Verifying
costs some 170 us, looking up a verified token 1 us, so a bounded number is kept, by hash.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextvars import Context
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol
from uuid import UUID

import aiohttp
import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shared.clock import Clock, SystemClock
from shared.errors import Unauthenticated, Unavailable
from shared.logs import get_logger

log = get_logger()

ALGORITHM = "EdDSA"
TYPE = "at+jwt"
ISSUER = "tenfold"
AUDIENCE = "tenfold-api"
_CACHED_TOKENS = 10_000
_REFRESH_SECONDS = 300.0
_REFETCH_SECONDS = 5.0
_FETCH_SECONDS = 3.0
_MAX_TOKEN_LENGTH = 4096


class Role(StrEnum):
    USER = "user"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Principal:
    user_id: UUID
    session_id: UUID
    role: Role
    expires_at: int


class KeySource(Protocol):
    async def public_key(self, key_id: str) -> Ed25519PublicKey | None:
        """The key of that id; `None` when there is none. Raises `Unavailable` when it cannot be found out."""
        ...


def issue(principal: Principal, key_id: str, key: Ed25519PrivateKey, issued_at: int) -> str:
    """An access token for `principal`; times are seconds since the epoch."""
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": str(principal.user_id),
        "sid": str(principal.session_id),
        "role": principal.role.value,
        "iat": issued_at,
        "exp": principal.expires_at,
    }
    return jwt.encode(claims, key, algorithm=ALGORITHM, headers={"kid": key_id, "typ": TYPE})


class TokenVerifier:
    def __init__(self, keys: KeySource, clock: Clock | None = None) -> None:
        self._keys = keys
        self._clock = clock or SystemClock()
        self._verified: OrderedDict[bytes, Principal] = OrderedDict()

    async def verify(self, token: str) -> Principal:
        """Raises `Unauthenticated` unless the token is ours, whole and not expired."""
        if len(token) > _MAX_TOKEN_LENGTH:
            raise Unauthenticated("the token is too long")
        if not token.isascii():
            raise Unauthenticated("the token is not valid")
        digest = hashlib.blake2b(token.encode(), digest_size=16).digest()
        principal = self._verified.get(digest)
        if principal is None:
            principal = await self._verify(token)
            self._verified[digest] = principal
            if len(self._verified) > _CACHED_TOKENS:
                self._verified.popitem(last=False)
        if principal.expires_at <= self._clock.now().timestamp():
            self._verified.pop(digest, None)
            raise Unauthenticated("the token has expired")
        return principal

    async def _verify(self, token: str) -> Principal:
        try:
            header = jwt.get_unverified_header(token)
            if header.get("alg") != ALGORITHM or header.get("typ") != TYPE:
                raise Unauthenticated("the token is of another kind")
            key = await self._keys.public_key(str(header.get("kid", "")))
            if key is None:
                raise Unauthenticated("the token's key is not known")
            claims = jwt.decode(
                token,
                key,
                algorithms=[ALGORITHM],
                issuer=ISSUER,
                audience=AUDIENCE,
                # Expiry is checked above against our clock, for cached tokens as for new ones.
                options={"require": ["exp", "iat", "sub", "sid", "role"], "verify_exp": False, "verify_iat": False},
            )
            return Principal(UUID(claims["sub"]), UUID(claims["sid"]), Role(claims["role"]), int(claims["exp"]))
        except (jwt.InvalidTokenError, ValueError, TypeError) as error:
            raise Unauthenticated("the token is not valid") from error


class JwksClient:
    """The users' public keys over HTTP: refreshed in time, served stale when users is away, and not fetched more often
    than every few seconds, whatever key ids the tokens name."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session
        self._keys: Mapping[str, Ed25519PublicKey] = {}
        self._fetched_at = float("-inf")
        self._tried_at = float("-inf")
        self._answered_at = float("-inf")
        self._lock = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None

    async def public_key(self, key_id: str) -> Ed25519PublicKey | None:
        if key_id not in self._keys:
            await self._refresh(key_id)
        elif self._is_due() and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.create_task(self._refresh(key_id), context=Context())  # nobody waits for it
        if not self._keys:
            raise Unavailable("the keys that tokens are verified with cannot be had")
        return self._keys.get(key_id)

    def _is_due(self) -> bool:
        now = time.monotonic()
        return now - self._fetched_at > _REFRESH_SECONDS and now - self._tried_at >= _REFETCH_SECONDS

    async def _refresh(self, key_id: str) -> None:
        came_at = time.monotonic()
        async with self._lock:
            if self._answered_at >= came_at:
                return  # who waited shares the outcome: else callers would try one after the other
            fresh = key_id in self._keys and time.monotonic() - self._fetched_at <= _REFRESH_SECONDS
            # Without any key every try counts: a process that starts before users must not turn callers away for long.
            just_tried = time.monotonic() - self._tried_at < _REFETCH_SECONDS
            if fresh or (just_tried and self._keys):
                return
            self._tried_at = time.monotonic()
            try:
                timeout = aiohttp.ClientTimeout(total=_FETCH_SECONDS)
                async with self._session.get(self._url, timeout=timeout) as response:
                    response.raise_for_status()
                    self._keys = parse_jwks(await response.read())
                self._fetched_at = time.monotonic()
            except (TimeoutError, aiohttp.ClientError, ValueError) as error:
                log.warning("jwks_not_fetched", error=repr(error), stale=bool(self._keys))
            self._answered_at = time.monotonic()


def parse_jwks(document: bytes) -> dict[str, Ed25519PublicKey]:
    """The Ed25519 keys of a JWK set by their ids; others, and what is no key, are passed over. Raises `ValueError`."""
    keys: dict[str, Ed25519PublicKey] = {}
    for jwk in msgspec.json.decode(document, type=_KeySet).keys:
        if jwk.get("kty") == "OKP" and jwk.get("crv") == "Ed25519" and isinstance(jwk.get("kid"), str):
            try:
                key = jwt.PyJWK(jwk, algorithm=ALGORITHM).key
            except (jwt.PyJWTError, ValueError, TypeError) as error:
                log.warning("jwk_passed_over", kid=jwk["kid"], error=repr(error))
                continue
            if isinstance(key, Ed25519PublicKey):
                keys[jwk["kid"]] = key
    return keys


class _KeySet(msgspec.Struct):
    keys: list[dict[str, Any]]
