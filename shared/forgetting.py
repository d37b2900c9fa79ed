"""Forgetting a user: what the platform's tables hold goes, and that the user is gone is remembered, as a hash only.

A deleted user's access token is good for some minutes more, and events of other topics may come late; neither must
bring anything back. So whoever stores something of a user asks first, in the transaction that stores it:

    async with db.transaction() as tx:
        if await forgetting.is_forgotten(tx, user_id):
            return

Forgetting and storing lock each other out, so there is no moment in between. Ids are random enough (74 bits) that
their hashes tell nothing; they are kept as long as an event may still be delivered.
"""

import hashlib
from uuid import UUID

from shared.database import Connection, Database, Transaction
from shared.sweeping import sweep

_KEPT = "30 days"  # as the inbox
_LOCK = "hashtextextended(current_schema || 'forgotten' || $1, 0)"


async def forget(tx: Transaction, user_id: UUID) -> None:
    """Call first in the transaction that deletes the service's own rows of the user."""
    await tx.execute(f"SELECT pg_advisory_xact_lock({_LOCK})", str(user_id))
    await tx.execute("INSERT INTO forgotten (digest) VALUES ($1) ON CONFLICT DO NOTHING", _digest(user_id))
    await tx.execute("DELETE FROM idempotency_keys WHERE principal = $1", str(user_id))
    await tx.execute("DELETE FROM dead_letters WHERE position($1::bytea IN data) > 0", str(user_id).encode())


async def is_forgotten(tx: Connection, user_id: UUID) -> bool:
    """Call first in a transaction that stores something of the user: until it ends, the user cannot be forgotten."""
    await tx.execute(f"SELECT pg_advisory_xact_lock_shared({_LOCK})", str(user_id))
    return await tx.fetchval("SELECT 1 FROM forgotten WHERE digest = $1", _digest(user_id)) is not None


async def clean_up(db: Database) -> int:
    """Drop the hashes of users who were forgotten long ago; returns how many."""
    return await sweep(db, "forgotten", "forgotten_at", _KEPT)


def _digest(user_id: UUID) -> bytes:
    return hashlib.sha256(b"forgotten" + user_id.bytes).digest()
