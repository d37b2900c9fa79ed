"""Idempotency-Key: a POST that is sent again has no second effect and gets the first answer, also after a crash.

The result is stored in the transaction of the effect, so there is never one without the other:

    async with db.transaction() as tx:
        if (earlier := await once.find(tx, Account)) is not None:
            return earlier
        ...
        await once.keep(tx, account)

The handler renders the same answer from the same result. Same key and other body: 422. In progress: 409, `Retry-After`.
Keys belong to the caller and are kept for 24 hours. A result is kept as it is, so it must not hold a secret: what opens
sessions takes no key (docs/adr/0020).
"""

import hashlib
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from shared.database import Database, Transaction
from shared.errors import Conflict, FieldError, InvalidInput
from shared.sweeping import sweep

T = TypeVar("T")

HEADER = "Idempotency-Key"
MAX_LENGTH = 255
_KEPT = "24 hours"


class InProgress(Conflict):
    type = "idempotency-in-progress"
    title = "A request with this Idempotency-Key is in progress"

    def __init__(self) -> None:
        super().__init__(headers={"Retry-After": "1"})


class KeyReused(InvalidInput):
    type = "idempotency-key-reused"
    title = "This Idempotency-Key was used with another request"

    def __init__(self) -> None:
        super().__init__([FieldError(f"/{HEADER}", "was used with another request")])


@dataclass(frozen=True)
class Once:
    """One request's key; without one (`key` is `None`) finding and keeping do nothing.

    `fingerprint` tells requests with the same key apart: a hash of method, path and body.
    """

    principal: str
    key: str | None
    fingerprint: bytes

    async def find(self, tx: Transaction, type_: type[T]) -> T | None:
        """The result of the earlier request, if there was one. Raises `InProgress` or `KeyReused`."""
        if self.key is None:
            return None
        digest = hashlib.blake2b(f"once:{self.principal}:{self.key}".encode(), digest_size=8).digest()
        if not await tx.fetchval(
            "SELECT pg_try_advisory_xact_lock($1::bigint # hashtext(current_schema))",
            int.from_bytes(digest, signed=True),
        ):
            raise InProgress
        row = await tx.fetchrow(
            "SELECT fingerprint, result FROM idempotency_keys WHERE principal = $1 AND key = $2",
            self.principal,
            self.key,
        )
        if row is None:
            return None
        if row["fingerprint"] != self.fingerprint:
            raise KeyReused
        try:
            return msgspec.json.decode(row["result"], type=type_)
        except msgspec.ValidationError:  # of another release
            raise Conflict("this was done before, and its answer cannot be given again") from None

    async def keep(self, tx: Transaction, result: object) -> None:
        if self.key is not None:
            await tx.execute(
                "INSERT INTO idempotency_keys (principal, key, fingerprint, result) VALUES ($1, $2, $3, $4)",
                self.principal,
                self.key,
                self.fingerprint,
                msgspec.json.encode(result),
            )


async def clean_up(db: Database) -> int:
    """Forget keys that are older than 24 hours; returns how many."""
    return await sweep(db, "idempotency_keys", "created_at", _KEPT)
