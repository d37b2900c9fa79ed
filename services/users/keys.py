"""The keys that access tokens are signed with: Ed25519, the private half encrypted at rest, shared by all instances."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from services.users import repository
from services.users.repository import StoredKey
from shared.auth import Principal, issue
from shared.clock import Clock
from shared.database import Database
from shared.errors import Unavailable
from shared.ids import new_id
from shared.logs import get_logger

log = get_logger()

_RELOAD_SECONDS = 5.0


class UnreadableKeys(Exception):
    """The keys in the database were encrypted with another secret."""


class SigningKeys:
    """Signs with the newest key, verifies with all. It is a `shared.auth.KeySource`."""

    def __init__(self, db: Database, secret: str, clock: Clock) -> None:
        self._db = db
        self._cipher = _cipher(secret)
        self._clock = clock
        self._stored: Sequence[StoredKey] = ()
        self._public: dict[str, Ed25519PublicKey] = {}
        self._loaded_at = float("-inf")
        self._lock = asyncio.Lock()
        self._signing: tuple[str, Ed25519PrivateKey] | None = None

    @classmethod
    @asynccontextmanager
    async def opened(cls, db: Database, secret: str, clock: Clock) -> "AsyncIterator[SigningKeys]":
        """Makes the first key where there is none yet. Raises `UnreadableKeys` when the secret does not fit."""
        keys = cls(db, secret, clock)
        await keys._make_first()
        yield keys

    def sign(self, principal: Principal) -> str:
        assert self._signing is not None
        key_id, key = self._signing
        return issue(principal, key_id, key, int(self._clock.now().timestamp()))

    async def public_key(self, key_id: str) -> Ed25519PublicKey | None:
        if key_id not in self._public:
            await self._reload()
        return self._public.get(key_id)

    async def public_keys(self) -> dict[str, bytes]:
        """The raw public keys by their ids, newest first."""
        await self._reload()
        return {key.id: key.public_key for key in self._stored}

    async def _make_first(self) -> None:
        private = Ed25519PrivateKey.generate()
        async with self._db.transaction() as tx:
            await repository.insert_first_signing_key(
                tx,
                str(new_id()),
                private.public_key().public_bytes_raw(),
                self._cipher.encrypt(private.private_bytes_raw()),
            )
            self._use(await repository.list_signing_keys(tx))

    async def _reload(self) -> None:
        """At most every few seconds, whatever key ids tokens name. Without the database the known keys stay in use."""
        async with self._lock:
            if time.monotonic() - self._loaded_at <= _RELOAD_SECONDS:
                return
            try:
                async with self._db.transaction() as tx:
                    self._use(await repository.list_signing_keys(tx))
            except Unavailable as error:
                log.warning("keys_not_reloaded", error=str(error))
                self._loaded_at = time.monotonic()

    def _use(self, stored: Sequence[StoredKey]) -> None:
        newest = stored[0]
        try:
            private = self._cipher.decrypt(newest.private_key)
        except InvalidToken:
            raise UnreadableKeys(
                "USERS_SIGNING_KEY_SECRET is not the one the signing keys were encrypted with"
            ) from None
        self._stored = stored
        self._public = {key.id: Ed25519PublicKey.from_public_bytes(key.public_key) for key in stored}
        self._signing = newest.id, Ed25519PrivateKey.from_private_bytes(private)
        self._loaded_at = time.monotonic()


def _cipher(secret: str) -> Fernet:
    derived = HKDF(SHA256(), 32, salt=None, info=b"tenfold users signing keys").derive(secret.encode())
    return Fernet(base64.urlsafe_b64encode(derived))
