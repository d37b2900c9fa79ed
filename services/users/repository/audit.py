"""The SQL of security events."""

from collections.abc import Sequence
from uuid import UUID

from services.users.models import Client, Happening, SecurityEvent
from shared.database import Connection


async def insert_security_event(
    connection: Connection, event_id: UUID, account_id: UUID, what: Happening, client: Client
) -> None:
    """Nothing, if the account is gone."""
    await connection.execute(
        "INSERT INTO security_events (id, account_id, what, device, address)"
        " SELECT $1, id, $3, $4, $5 FROM accounts WHERE id = $2 FOR KEY SHARE",
        event_id,
        account_id,
        what.value,
        client.device,
        client.address,
    )


async def list_security_events(
    connection: Connection, account_id: UUID, before: UUID, limit: int
) -> Sequence[SecurityEvent]:
    """Newest first."""
    rows = await connection.fetch(
        "SELECT id, what, device, address, created_at FROM security_events WHERE account_id = $1 AND id < $2"
        " ORDER BY id DESC LIMIT $3",
        account_id,
        before,
        limit,
    )
    return [SecurityEvent(**{**row, "what": Happening(row["what"])}) for row in rows]
