"""The SQL of signing keys."""

from collections.abc import Sequence
from datetime import datetime

import msgspec

from shared.database import Connection


class StoredKey(msgspec.Struct, frozen=True):
    id: str
    public_key: bytes
    private_key: bytes
    active_from: datetime


async def list_signing_keys(connection: Connection) -> Sequence[StoredKey]:
    """Newest first."""
    rows = await connection.fetch(
        "SELECT id, public_key, private_key, active_from FROM signing_keys ORDER BY active_from DESC, created_at DESC"
    )
    return [StoredKey(**row) for row in rows]


async def insert_signing_key_if_due(
    connection: Connection, key: tuple[str, bytes, bytes], lead_seconds: float, every_seconds: float
) -> bool:
    """Insert the key (id, public, private) unless the newest is younger, however many processes try at once.

    It signs after `lead_seconds`; the very first one at once.
    """
    await connection.execute("LOCK TABLE signing_keys IN SHARE ROW EXCLUSIVE MODE")
    status = await connection.execute(
        "INSERT INTO signing_keys (id, public_key, private_key, active_from)"
        " SELECT $1, $2, $3, now() + CASE WHEN EXISTS (SELECT FROM signing_keys)"
        "  THEN make_interval(secs => $4) ELSE interval '0' END"
        " WHERE NOT EXISTS (SELECT FROM signing_keys WHERE active_from > now() - make_interval(secs => $5))",
        *key,
        lead_seconds,
        every_seconds,
    )
    return status != "INSERT 0 0"


async def delete_retired_signing_keys(connection: Connection, seconds: float) -> None:
    """Those that another has signed instead of for so long."""
    await connection.execute(
        "DELETE FROM signing_keys k WHERE EXISTS (SELECT FROM signing_keys n WHERE n.active_from > k.active_from"
        " AND n.active_from < now() - make_interval(secs => $1))",
        seconds,
    )
