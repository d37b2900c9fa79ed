"""The SQL of recipients, their inbox, their stream and their preferences, a function a question."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import msgspec

from services.notifier.models import Notification, Recipient, StreamEntry
from shared.database import Connection, Record

_RECIPIENT = "user_id, email, display_name, locale, stream_position"
_NOTIFICATION = "id, user_id, category, title, body, data, read_at, created_at"


async def upsert_recipient(
    connection: Connection, user_id: UUID, email: str, display_name: str, locale: str, version: int
) -> None:
    """Keep what an account of that version says, unless what is known is as new."""
    # What an address refused is nobody's business any more when nobody has it.
    await connection.execute(
        "DELETE FROM suppressions s USING recipients r WHERE r.user_id = $1 AND s.address = r.email AND r.email <> $2"
        " AND r.source_version < $3",
        user_id,
        email,
        version,
    )
    await connection.execute(
        "INSERT INTO recipients (user_id, email, display_name, locale, source_version) VALUES ($1, $2, $3, $4, $5)"
        " ON CONFLICT (user_id) DO UPDATE SET email = excluded.email, display_name = excluded.display_name,"
        " locale = excluded.locale, source_version = excluded.source_version, updated_at = now()"
        " WHERE recipients.source_version < excluded.source_version",
        user_id,
        email,
        display_name,
        locale,
        version,
    )


async def restore_recipient(
    connection: Connection, user_id: UUID, email: str, display_name: str, locale: str, version: int
) -> None:
    """Keep what an account of that version says, also in place of what is known as being of the same version."""
    await connection.execute(
        "INSERT INTO recipients (user_id, email, display_name, locale, source_version) VALUES ($1, $2, $3, $4, $5)"
        " ON CONFLICT (user_id) DO UPDATE SET email = excluded.email, display_name = excluded.display_name,"
        " locale = excluded.locale, source_version = excluded.source_version, updated_at = now()"
        " WHERE recipients.source_version <= excluded.source_version AND (recipients.email, recipients.display_name,"
        " recipients.locale) IS DISTINCT FROM (excluded.email, excluded.display_name, excluded.locale)",
        user_id,
        email,
        display_name,
        locale,
        version,
    )


async def ensure_recipient(connection: Connection, user_id: UUID) -> None:
    """The recipient's row, made without address where the user is not known yet, and locked."""
    await connection.execute("INSERT INTO recipients (user_id) VALUES ($1) ON CONFLICT DO NOTHING", user_id)
    await connection.execute("SELECT FROM recipients WHERE user_id = $1 FOR UPDATE", user_id)


async def advance_stream(connection: Connection, user_id: UUID, by: int) -> Recipient:
    """The recipient, whose last `by` positions are now the caller's. Its row stays locked until the transaction ends,
    so that positions become visible in order; it is made, without address, where the user is not known yet."""
    row = await connection.fetchrow(
        "INSERT INTO recipients (user_id, stream_position) VALUES ($1, $2) ON CONFLICT (user_id)"
        f" DO UPDATE SET stream_position = recipients.stream_position + $2 RETURNING {_RECIPIENT}",
        user_id,
        by,
    )
    assert row is not None
    return Recipient(**row)


async def delete_recipient(connection: Connection, user_id: UUID) -> None:
    """With everything that hangs on it, and that its address refused email."""
    await connection.execute(
        "WITH gone AS (DELETE FROM recipients WHERE user_id = $1 RETURNING email)"
        " DELETE FROM suppressions s USING gone WHERE s.address = gone.email",
        user_id,
    )


async def require_recipient(connection: Connection, user_id: UUID) -> None:
    """There is a row of the user afterwards, if need be without address."""
    await connection.execute("INSERT INTO recipients (user_id) VALUES ($1) ON CONFLICT DO NOTHING", user_id)


async def insert_stream_entries(connection: Connection, user_id: UUID, entries: Sequence[StreamEntry]) -> None:
    await connection.executemany(
        "INSERT INTO stream_entries (user_id, position, event, data) VALUES ($1, $2, $3, $4::text::jsonb)",
        [(user_id, entry.position, entry.event, entry.data) for entry in entries],
    )


async def get_stream_position(connection: Connection, user_id: UUID) -> int:
    """Of the newest entry; 0 when there has been none."""
    return await connection.fetchval("SELECT stream_position FROM recipients WHERE user_id = $1", user_id) or 0


async def list_stream_positions(connection: Connection, user_ids: Sequence[UUID]) -> Mapping[UUID, int]:
    rows = await connection.fetch(
        "SELECT user_id, stream_position FROM recipients WHERE user_id = ANY ($1::uuid[])", user_ids
    )
    return {row["user_id"]: row["stream_position"] for row in rows}


async def list_stream_entries(connection: Connection, user_id: UUID, after: int, limit: int) -> Sequence[StreamEntry]:
    """Oldest first."""
    rows = await connection.fetch(
        "SELECT position, event, data FROM stream_entries WHERE user_id = $1 AND position > $2"
        " ORDER BY position LIMIT $3",
        user_id,
        after,
        limit,
    )
    return [StreamEntry(**row) for row in rows]


async def delete_old_stream_entries(connection: Connection, older_than_seconds: float, limit: int) -> int:
    status = await connection.execute(
        "DELETE FROM stream_entries WHERE (user_id, position) IN (SELECT user_id, position FROM stream_entries"
        " WHERE created_at < now() - make_interval(secs => $1) ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED)",
        older_than_seconds,
        limit,
    )
    return int(status.split()[-1])


async def insert_notification(
    connection: Connection,
    notification_id: UUID,
    user_id: UUID,
    category: str,
    title: str,
    body: str,
    data: Mapping[str, Any],
) -> Notification:
    row = await connection.fetchrow(
        "INSERT INTO notifications (id, user_id, category, title, body, data) VALUES ($1, $2, $3, $4, $5,"
        f" $6::text::jsonb) RETURNING {_NOTIFICATION}",
        notification_id,
        user_id,
        category,
        title,
        body,
        msgspec.json.encode(data).decode(),
    )
    assert row is not None
    return _notification(row)


async def get_inbox(
    connection: Connection, user_id: UUID, unread: bool | None, before: UUID, limit: int
) -> tuple[Sequence[Notification], int]:
    """Newest first, and the number of all unread ones. `unread` is `None` for both kinds."""
    rows = await connection.fetch(
        f"SELECT {_NOTIFICATION} FROM notifications WHERE user_id = $1 AND id < $2"
        " AND ($3::boolean IS NULL OR (read_at IS NULL) = $3) ORDER BY id DESC LIMIT $4",
        user_id,
        before,
        unread,
        limit,
    )
    count: int = await connection.fetchval(
        "SELECT count(*) FROM notifications WHERE user_id = $1 AND read_at IS NULL", user_id
    )
    return [_notification(row) for row in rows], count


async def mark_read(connection: Connection, marks: Sequence[tuple[UUID, UUID]]) -> Sequence[bool]:
    """Mark notifications, each given after its user, in the order given; false where the user has no such one."""
    rows = await connection.fetch(
        "WITH marks AS (SELECT n.id FROM notifications n JOIN unnest($1::uuid[], $2::uuid[]) AS m (user_id, id)"
        "  ON n.id = m.id AND n.user_id = m.user_id ORDER BY n.id FOR UPDATE OF n)"
        " UPDATE notifications n SET read_at = coalesce(read_at, now()) FROM marks WHERE n.id = marks.id"
        " RETURNING n.id",
        [user_id for user_id, _ in marks],
        [notification_id for _, notification_id in marks],
    )
    found = {row["id"] for row in rows}
    return [notification_id in found for _, notification_id in marks]


async def mark_all_read(connection: Connection, user_id: UUID) -> None:
    await connection.execute("UPDATE notifications SET read_at = now() WHERE user_id = $1 AND read_at IS NULL", user_id)


async def get_refused_email(connection: Connection, user_id: UUID) -> Sequence[str]:
    """The categories of email the user does not want."""
    return await connection.fetchval("SELECT refused_email FROM preferences WHERE user_id = $1", user_id) or []


async def add_refused_email(connection: Connection, user_id: UUID, category: str) -> None:
    await connection.execute(
        "INSERT INTO preferences (user_id, refused_email) VALUES ($1, ARRAY[$2::text]) ON CONFLICT (user_id) DO UPDATE"
        " SET refused_email = array_remove(preferences.refused_email, $2) || $2, updated_at = now()",
        user_id,
        category,
    )


async def set_refused_email(connection: Connection, user_id: UUID, categories: Sequence[str]) -> None:
    await connection.execute(
        "INSERT INTO preferences (user_id, refused_email) VALUES ($1, $2)"
        " ON CONFLICT (user_id) DO UPDATE SET refused_email = excluded.refused_email, updated_at = now()",
        user_id,
        list(categories),
    )


def _notification(row: Record) -> Notification:
    return Notification(**{**row, "data": msgspec.json.decode(row["data"])})
