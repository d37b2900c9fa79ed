"""The SQL of sessions and refresh tokens."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import msgspec

from services.users.models import Client, Session
from shared.database import Connection, Record

_SESSION = "id, account_id, device, address, created_at, last_seen_at"


async def insert_session(
    connection: Connection, session_id: UUID, account_id: UUID, client: Client, expires_at: datetime
) -> None:
    await connection.execute(
        "INSERT INTO sessions (id, account_id, device, address, expires_at) VALUES ($1, $2, $3, $4, $5)",
        session_id,
        account_id,
        client.device,
        client.address,
        expires_at,
    )


async def insert_refresh_token(connection: Connection, digest: bytes, session_id: UUID) -> None:
    await connection.execute("INSERT INTO refresh_tokens (digest, session_id) VALUES ($1, $2)", digest, session_id)


class FoundToken(msgspec.Struct, frozen=True):
    session: Session
    role: str
    disabled: bool
    spent_seconds_ago: float | None


async def get_refresh_token_for_update(connection: Connection, digest: bytes) -> FoundToken | None:
    """A token of a session that has not expired, locked together with that session."""
    row = await connection.fetchrow(
        "SELECT s.id, s.account_id, s.device, s.address, s.created_at, s.last_seen_at, a.role, a.disabled,"
        " extract(epoch FROM clock_timestamp() - t.spent_at)::float8 AS spent_seconds_ago"
        "  FROM refresh_tokens t JOIN sessions s ON s.id = t.session_id JOIN accounts a ON a.id = s.account_id"
        " WHERE t.digest = $1 AND s.expires_at > now() FOR UPDATE OF s, t",
        digest,
    )
    return FoundToken(_session(row), row["role"], row["disabled"], row["spent_seconds_ago"]) if row else None


async def spend_refresh_token(connection: Connection, digest: bytes, session_id: UUID, kept_seconds: int) -> None:
    """And forget those that the session has spent so long ago that it would have ended without the next."""
    await connection.execute(
        "UPDATE refresh_tokens SET spent_at = clock_timestamp() WHERE digest = $1 AND spent_at IS NULL", digest
    )
    await connection.execute(
        "DELETE FROM refresh_tokens WHERE session_id = $1 AND spent_at < now() - make_interval(secs => $2)",
        session_id,
        kept_seconds,
    )


async def touch_session(connection: Connection, session_id: UUID, expires_at: datetime) -> None:
    await connection.execute(
        "UPDATE sessions SET last_seen_at = now(), expires_at = $2 WHERE id = $1", session_id, expires_at
    )


async def list_sessions(connection: Connection, account_id: UUID, before: UUID, limit: int) -> Sequence[Session]:
    rows = await connection.fetch(
        f"SELECT {_SESSION} FROM sessions WHERE account_id = $1 AND expires_at > now() AND id < $2"
        " ORDER BY id DESC LIMIT $3",
        account_id,
        before,
        limit,
    )
    return [_session(row) for row in rows]


async def delete_session(connection: Connection, account_id: UUID, session_id: UUID) -> bool:
    status = await connection.execute("DELETE FROM sessions WHERE account_id = $1 AND id = $2", account_id, session_id)
    return status != "DELETE 0"


async def delete_sessions(connection: Connection, account_id: UUID, *, but: UUID | None = None) -> None:
    """All of the account's sessions, or all `but` one."""
    await connection.execute("DELETE FROM sessions WHERE account_id = $1 AND id IS DISTINCT FROM $2", account_id, but)


def _session(row: Record) -> Session:
    return Session(**{name: row[name] for name in Session.__struct_fields__})
