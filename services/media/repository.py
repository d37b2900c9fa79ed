"""All the SQL of media, a function a question. `get_...` answers `None` for what is not there."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from services.media.models import Image, Processed, Shown, Status, Upload, Usage, Variant, Visibility
from shared.database import Connection, Record
from shared.errors import TenfoldError
from shared.loader import fetch_by_key

CONSTRAINTS: Mapping[str, type[TenfoldError]] = {}

_MEDIA = (
    "id, owner_id, blob_id, title, visibility, status, failure, content_type, bytes, width, height, sha256,"
    " placeholder, variants, shown, created_at, updated_at, version"
)
_UPLOAD = "id, owner_id, content_type, bytes, expires_at, media_id"
_AT_ONCE = 1000  # rows that one statement deletes
_CHANGED = "version = version + 1, updated_at = now()"


async def get_media(connection: Connection, ids: Sequence[UUID]) -> Mapping[UUID, Image]:
    rows = await fetch_by_key(connection, f"SELECT {_MEDIA} FROM media WHERE id", "uuid", ids)
    return {row["id"]: _image(row) for row in rows}


async def get_media_for_update(connection: Connection, media_id: UUID) -> Image | None:
    row = await connection.fetchrow(f"SELECT {_MEDIA} FROM media WHERE id = $1 FOR UPDATE", media_id)
    return _image(row) if row else None


async def list_media(connection: Connection, owner_id: UUID, before: UUID, limit: int) -> list[Image]:
    """Newest first."""
    rows = await connection.fetch(
        f"SELECT {_MEDIA} FROM media WHERE owner_id = $1 AND id < $2 ORDER BY id DESC LIMIT $3", owner_id, before, limit
    )
    return [_image(row) for row in rows]


async def get_twin_that_is_ready(connection: Connection, blob_id: UUID) -> Image | None:
    """Any media of the same bytes that has been processed."""
    row = await connection.fetchrow(
        f"SELECT {_MEDIA} FROM media WHERE blob_id = $1 AND status = 'ready' LIMIT 1", blob_id
    )
    return _image(row) if row else None


async def insert_media(
    connection: Connection, media_id: UUID, owner_id: UUID, blob_id: UUID, content_type: str, size: int, sha256: str
) -> Image:
    row = await connection.fetchrow(
        "INSERT INTO media (id, owner_id, blob_id, content_type, bytes, sha256) VALUES ($1, $2, $3, $4, $5, $6)"
        f" RETURNING {_MEDIA}",
        media_id,
        owner_id,
        blob_id,
        content_type,
        size,
        sha256,
    )
    assert row is not None
    return _image(row)


async def update_media(connection: Connection, media_id: UUID, title: str, visibility: Visibility) -> Image:
    row = await connection.fetchrow(
        f"UPDATE media SET title = $2, visibility = $3, {_CHANGED} WHERE id = $1 RETURNING {_MEDIA}",
        media_id,
        title,
        visibility.value,
    )
    assert row is not None
    return _image(row)


async def mark_ready(connection: Connection, media_id: UUID, processed: Processed) -> None:
    await connection.execute(
        "UPDATE media SET status = 'ready', failure = NULL, width = $2, height = $3, placeholder = $4,"
        f" variants = $5::text::jsonb, shown = $6::text::jsonb, {_CHANGED} WHERE id = $1",
        media_id,
        processed.width,
        processed.height,
        processed.placeholder,
        msgspec.json.encode(processed.variants).decode(),
        msgspec.json.encode(processed.shown).decode() if processed.shown else None,
    )


async def mark_failed(connection: Connection, media_id: UUID, failure: str) -> None:
    await connection.execute(
        f"UPDATE media SET status = 'failed', failure = $2, {_CHANGED} WHERE id = $1", media_id, failure
    )


async def delete_media(connection: Connection, media_id: UUID) -> None:
    await connection.execute("DELETE FROM media WHERE id = $1", media_id)


async def delete_all_of(connection: Connection, owner_id: UUID) -> None:
    """The owner's media and sums; blobs without uses are doomed. Each statement is short, however many there are."""
    while await connection.fetchval(
        "WITH gone AS (DELETE FROM media WHERE id IN (SELECT id FROM media WHERE owner_id = $1 LIMIT $2)"
        "  RETURNING blob_id),"
        " released AS (SELECT blob_id, count(*) AS n FROM gone GROUP BY blob_id),"
        " freed AS (UPDATE blobs SET uses = uses - n,"
        "  sha256 = CASE WHEN uses > n THEN sha256 END,"
        "  doomed_at = CASE WHEN uses > n THEN NULL ELSE now() END"
        "  FROM released WHERE id = blob_id)"
        " SELECT count(*) FROM gone",
        owner_id,
        _AT_ONCE,
    ):
        pass
    await connection.execute("DELETE FROM usage WHERE owner_id = $1", owner_id)
    # The row stays for the sweeper, since somebody may still be writing; whose it was is forgotten.
    await connection.execute(
        "UPDATE uploads SET owner_id = $2, media_id = NULL WHERE owner_id = $1", owner_id, UUID(int=0)
    )


async def get_usage(connection: Connection, owner_id: UUID) -> Usage:
    row = await connection.fetchrow("SELECT bytes, items FROM usage WHERE owner_id = $1", owner_id)
    return Usage(row["bytes"], row["items"]) if row else Usage(0, 0)


async def add_usage(connection: Connection, owner_id: UUID, size: int) -> Usage:
    """Count one item of `size` bytes more; the new sums, locked until the transaction ends."""
    row = await connection.fetchrow(
        "INSERT INTO usage (owner_id, bytes, items) VALUES ($1, $2, 1) ON CONFLICT (owner_id)"
        " DO UPDATE SET bytes = usage.bytes + $2, items = usage.items + 1 RETURNING bytes, items",
        owner_id,
        size,
    )
    assert row is not None
    return Usage(row["bytes"], row["items"])


async def subtract_usage(connection: Connection, owner_id: UUID, size: int) -> None:
    """Count one item of `size` bytes less."""
    await connection.execute(
        "UPDATE usage SET bytes = bytes - $2, items = items - 1 WHERE owner_id = $1", owner_id, size
    )


async def get_usage_with_uploads(connection: Connection, owner_id: UUID) -> Usage:
    """The sums, counting uploads that have not been completed as if they were, and the bytes of those that have been
    until they are swept. Until the transaction ends, whoever asks for this owner's waits."""
    await connection.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended(current_schema || 'uploads' || $1::text, 0))", str(owner_id)
    )
    row = await connection.fetchrow(
        "SELECT coalesce(sum(bytes), 0)::bigint AS bytes, coalesce(sum(items), 0)::bigint AS items FROM ("
        " SELECT bytes, items FROM usage WHERE owner_id = $1"
        " UNION ALL SELECT sum(bytes), count(*) FILTER (WHERE media_id IS NULL)"
        "  FROM uploads WHERE owner_id = $1) AS sums",
        owner_id,
    )
    assert row is not None
    return Usage(row["bytes"], row["items"])


async def insert_upload(
    connection: Connection,
    upload_id: UUID,
    owner_id: UUID,
    content_type: str,
    size: int,
    open_seconds: float,
    grace: float,
) -> Upload:
    """An upload whose URL holds for `open_seconds`, and whose bytes are swept `grace` seconds later."""
    row = await connection.fetchrow(
        "INSERT INTO uploads (id, owner_id, content_type, bytes, expires_at, doomed_at) VALUES ($1, $2, $3, $4,"
        " date_trunc('second', now()) + make_interval(secs => $5), now() + make_interval(secs => $5 + $6))"
        f" RETURNING {_UPLOAD}",
        upload_id,
        owner_id,
        content_type,
        size,
        open_seconds,
        grace,
    )
    assert row is not None
    return Upload(**row)


async def get_upload(connection: Connection, upload_id: UUID) -> Upload | None:
    row = await connection.fetchrow(f"SELECT {_UPLOAD} FROM uploads WHERE id = $1", upload_id)
    return Upload(**row) if row else None


async def get_upload_for_update(connection: Connection, upload_id: UUID) -> Upload | None:
    row = await connection.fetchrow(f"SELECT {_UPLOAD} FROM uploads WHERE id = $1 FOR UPDATE", upload_id)
    return Upload(**row) if row else None


async def complete_upload(connection: Connection, upload_id: UUID, media_id: UUID) -> None:
    await connection.execute("UPDATE uploads SET media_id = $2 WHERE id = $1", upload_id, media_id)


async def get_doomed_uploads(connection: Connection, limit: int) -> list[UUID]:
    rows = await connection.fetch("SELECT id FROM uploads WHERE doomed_at <= now() ORDER BY doomed_at LIMIT $1", limit)
    return [row["id"] for row in rows]


async def forget_uploads(connection: Connection, doomed: Sequence[UUID]) -> None:
    await connection.execute("DELETE FROM uploads WHERE id = ANY($1)", doomed)


async def announce_blob(connection: Connection, blob_id: UUID, seconds: float) -> None:
    """Note that bytes are about to be stored; they are swept after `seconds` unless they are put to use before."""
    await connection.execute(
        "INSERT INTO blobs (id, doomed_at) VALUES ($1, now() + make_interval(secs => $2))", blob_id, seconds
    )


async def use_blob(connection: Connection, announced: UUID, sha256: str) -> UUID | None:
    """Count one use more of the blob with that hash and return its id.

    Where there is none yet, `announced` becomes it; else `announced` is doomed. `None` when it was swept meanwhile.
    """
    # Two first uploads of the same bytes come one after the other.
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(current_schema || $1, 0))", sha256)
    known: UUID | None = await connection.fetchval(
        "UPDATE blobs SET uses = uses + 1 WHERE sha256 = $1 AND uses > 0 RETURNING id", sha256
    )
    if known is not None:
        await doom_blob(connection, announced)
        return known
    # A sweep that runs this very moment must not see it as doomed before this transaction is seen.
    found: UUID | None = await connection.fetchval(
        "UPDATE blobs SET uses = 1, sha256 = $2, doomed_at = NULL"
        " WHERE id = $1 AND doomed_at > now() + interval '1 minute' RETURNING id",
        announced,
        sha256,
    )
    return found


async def release_blob(connection: Connection, blob_id: UUID) -> None:
    """Count one use less; without uses it is doomed."""
    await connection.execute(
        "UPDATE blobs SET uses = uses - 1,"
        " sha256 = CASE WHEN uses > 1 THEN sha256 END,"
        " doomed_at = CASE WHEN uses > 1 THEN NULL ELSE now() END"
        " WHERE id = $1",
        blob_id,
    )


async def doom_blob(connection: Connection, blob_id: UUID) -> datetime | None:
    """Have the objects of a blob deleted unless it is in use, also when it has been swept already.

    When it was doomed; `None` when it is in use.
    """
    # clock_timestamp: a sweep in progress must see that the row is another than the one it started from.
    doomed_at: datetime | None = await connection.fetchval(
        "INSERT INTO blobs (id, doomed_at) VALUES ($1, clock_timestamp()) ON CONFLICT (id)"
        " DO UPDATE SET doomed_at = CASE WHEN blobs.uses = 0 THEN clock_timestamp() END RETURNING doomed_at",
        blob_id,
    )
    return doomed_at


async def get_doomed_blobs(connection: Connection, limit: int) -> list[tuple[UUID, datetime]]:
    rows = await connection.fetch(_DOOMED_BLOBS, limit)
    return [(row["id"], row["doomed_at"]) for row in rows]


# No index can be asked for what is due by `clock_timestamp()`, and blobs of uploads in progress are doomed later.
_DOOMED_BLOBS = "SELECT id, doomed_at FROM blobs WHERE doomed_at <= statement_timestamp() ORDER BY doomed_at LIMIT $1"


async def forget_blobs(connection: Connection, doomed: Sequence[tuple[UUID, datetime]]) -> None:
    """Those that are doomed still as they were when their objects were deleted; others are swept again."""
    await connection.executemany("DELETE FROM blobs WHERE id = $1 AND doomed_at = $2", doomed)


def _image(row: Record) -> Image:
    fields: dict[str, Any] = dict(row)
    fields["visibility"] = Visibility(row["visibility"])
    fields["status"] = Status(row["status"])
    fields["variants"] = msgspec.json.decode(row["variants"], type=tuple[Variant, ...])
    fields["shown"] = msgspec.json.decode(row["shown"], type=Shown) if row["shown"] else None
    return Image(**fields)
