"""The keys that access tokens are signed with: Ed25519, the private half encrypted at rest, shared by all instances.

A new key is published at once and signs after a lead time, when every instance and verifier has had the time to learn
of it; the one before it is published until its last token has expired. So no good token meets a verifier that does not
know its key, and instances need not agree on a moment.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime

import asyncpg
from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from services.users.repository import keys as repository
from services.users.repository.keys import StoredKey
from services.users.settings import Settings
from shared.auth import Principal, issue
from shared.clock import Clock
from shared.database import Database
from shared.errors import TenfoldError, Unavailable
from shared.ids import new_id
from shared.logs import get_logger
from shared.sealing import cipher

log = get_logger()

_RELOAD_SECONDS = 5.0


class UnreadableKeys(Exception):
    """The keys in the database were encrypted with another secret."""


class SigningKeys:
    """Signs with the newest key that is active, verifies with all. It is a `shared.auth.KeySource`."""

    def __init__(self, db: Database, settings: Settings, clock: Clock) -> None:
        self._db = db
        self._cipher = cipher(settings.signing_key_secret, "users signing keys")
        self._settings = settings
        self._clock = clock
        self._stored: Sequence[StoredKey] = ()
        self._public: dict[str, Ed25519PublicKey] = {}
        self._private: Sequence[tuple[datetime, str, Ed25519PrivateKey]] = ()
        self._loaded_at = float("-inf")
        self._lock = asyncio.Lock()

    @classmethod
    @asynccontextmanager
    async def opened(cls, db: Database, settings: Settings, clock: Clock) -> "AsyncIterator[SigningKeys]":
        """Makes the first key where there is none yet. Raises `UnreadableKeys` when the secret does not fit."""
        keys = cls(db, settings, clock)
        await keys.rotate_if_due()
        yield keys

    def sign(self, principal: Principal) -> str:
        now = self._clock.now()
        key_id, key = next(
            ((key_id, key) for active_from, key_id, key in self._private if active_from <= now),
            self._private[-1][1:],  # the clock is behind the database's
        )
        return issue(principal, key_id, key, int(now.timestamp()))

    async def public_key(self, key_id: str) -> Ed25519PublicKey | None:
        if key_id not in self._public:
            await self._reload()
        return self._public.get(key_id)

    async def public_keys(self) -> dict[str, bytes]:
        """The raw public keys by their ids, newest first."""
        await self._reload()
        return {key.id: key.public_key for key in self._stored}

    async def rotate(self) -> StoredKey:
        """Publish a new key unless there is one that does not sign yet; the newest key."""
        await self._rotate_if_older(0)
        return self._stored[0]

    async def rotate_if_due(self) -> None:
        """Publish a new key when the newest has signed for long enough; drop those whose tokens have all expired."""
        await self._rotate_if_older(self._settings.signing_key_rotation_seconds)

    async def keep_rotating(self) -> None:
        """Rotate on schedule and learn of keys of other instances well before they sign, for ever."""
        while True:
            await asyncio.sleep(min(60.0, max(0.1, self._settings.signing_key_lead_seconds / 4)))
            try:
                await self.rotate_if_due()
            except (TenfoldError, asyncpg.PostgresError) as error:
                log.warning("keys_not_rotated", error=str(error))

    async def _rotate_if_older(self, seconds: float) -> None:
        private = Ed25519PrivateKey.generate()
        key_id, public = str(new_id()), private.public_key().public_bytes_raw()
        sealed = self._cipher.encrypt(private.private_bytes_raw())
        lead = self._settings.signing_key_lead_seconds
        async with self._db.transaction() as tx:
            stored = await repository.list_signing_keys(tx)
            age = (self._clock.now() - stored[0].active_from).total_seconds() if stored else None
            # Looked at first without a lock; the database's clock decides.
            due = age is None or age >= seconds
            if due and await repository.insert_signing_key_if_due(tx, (key_id, public, sealed), lead, seconds):
                log.info("key_published", key_id=key_id, signs_after_seconds=lead if stored else 0)
            if len(stored) > 1:
                await repository.delete_retired_signing_keys(tx, self._settings.access_token_seconds + lead)
            stored = await repository.list_signing_keys(tx)
        self._use(stored)

    async def _reload(self) -> None:
        """At most every few seconds, whatever key ids tokens name. Without the database the known keys stay in use."""
        async with self._lock:
            if time.monotonic() - self._loaded_at <= _RELOAD_SECONDS:
                return
            try:
                async with self._db.transaction() as tx:
                    stored = await repository.list_signing_keys(tx)
            except Unavailable as error:
                log.warning("keys_not_reloaded", error=str(error))
                self._loaded_at = time.monotonic()
            else:
                self._use(stored)

    def _use(self, stored: Sequence[StoredKey]) -> None:
        try:
            self._private = [
                (key.active_from, key.id, Ed25519PrivateKey.from_private_bytes(self._cipher.decrypt(key.private_key)))
                for key in stored
            ]
        except InvalidToken:
            raise UnreadableKeys(
                "USERS_SIGNING_KEY_SECRET is not the one the signing keys were encrypted with"
            ) from None
        self._stored = stored
        self._public = {key.id: Ed25519PublicKey.from_public_bytes(key.public_key) for key in stored}
        self._loaded_at = time.monotonic()
