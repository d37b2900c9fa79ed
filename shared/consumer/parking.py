"""Where events wait that could not be handled: parked for another round, or dead. All the SQL of both tables.

An event that failed is parked with the time of its next round; later events of its key are parked behind it where order
matters. The oldest parked event of a key is its head, and only heads are taken.
"""

import traceback
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import NAMESPACE_OID, UUID, uuid5

import msgspec

from shared.database import Connection, Record
from shared.events import Envelope
from shared.records import Fetched

UNREADABLE = "unreadable"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ABANDONED_AFTER = "30 days"
_REASON_LENGTH = 1000
_STACK_LENGTH = 8000
_EVENT = "ordered, topic, event_id, type, source, key, time, headers, data, origin"


@dataclass(frozen=True)
class Fault:
    reason: str
    stack: str = ""
    attempts: int = 0

    @classmethod
    def of(cls, error: BaseException, attempts: int) -> "Fault":
        stack = "".join(traceback.format_exception(error))
        return cls(f"{type(error).__name__}: {error}", stack, attempts)


@dataclass(frozen=True)
class Parked:
    """A parked event in hand. `rounds` of waiting it has had, and `attempts` of its handler."""

    id: int
    envelope: Envelope
    ordered: bool
    rounds: int
    attempts: int


async def park(
    connection: Connection,
    group: str,
    envelope: Envelope,
    *,
    ordered: bool,
    fault: Fault | None = None,
    seconds: float = 0,
) -> None:
    """Let the event wait `seconds` for its next round, which counts if the `fault` took attempts; without a `fault` it
    only waits behind its key's head."""
    await connection.execute(
        f"INSERT INTO parked_events (consumer, {_EVENT}, rounds, attempts, reason, stack, due_at)"  # noqa: S608
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9::text::jsonb, $10, $11, $12, $13, $14, $15,"
        " clock_timestamp() + make_interval(secs => $16)) ON CONFLICT DO NOTHING",
        group,
        *_values(envelope, ordered),
        int(fault is not None and fault.attempts > 0),
        *_fault(fault or Fault("waits behind an earlier event of its key")),
        seconds,
    )


async def any_waits(connection: Connection, group: str) -> bool:
    """Whether the group has any parked event that later ones wait behind."""
    sql = "SELECT 1 FROM parked_events WHERE ordered AND consumer = $1 LIMIT 1"
    return await connection.fetchval(sql, group) is not None


async def waiting_keys(connection: Connection, group: str, keys: Collection[str]) -> set[str]:
    """Those of `keys` that have a parked event which later ones wait behind."""
    rows = await connection.fetch(
        "SELECT DISTINCT key FROM parked_events WHERE ordered AND consumer = $1 AND key = ANY ($2)", group, list(keys)
    )
    return {row["key"] for row in rows}


async def claim(connection: Connection, group: str, limit: int, lease_seconds: float) -> list[Parked]:
    """Take heads that are due. They are this caller's for `lease_seconds`; who died gives them back by that."""
    rows = await connection.fetch(_CLAIM, group, limit, lease_seconds)
    return [Parked(row["id"], _envelope(row), row["ordered"], row["rounds"], row["attempts"]) for row in rows]


# Not what is due by `clock_timestamp()`: that may change from row to row, so no index can be asked for it.
_CLAIM = f"""
    UPDATE parked_events SET due_at = clock_timestamp() + make_interval(secs => $3) WHERE id IN (
        SELECT id FROM parked_events p WHERE consumer = $1 AND due_at <= statement_timestamp() AND NOT (ordered
            AND EXISTS (SELECT FROM parked_events e WHERE e.ordered AND e.consumer = p.consumer
                           AND e.topic = p.topic AND e.key = p.key AND e.id < p.id))
        ORDER BY id LIMIT $2 FOR UPDATE SKIP LOCKED)
    RETURNING id, rounds, attempts, {_EVENT}
"""  # noqa: S608


async def wait_again(connection: Connection, parked: Parked, seconds: float, fault: Fault | None = None) -> None:
    """Another wait: for its next round, or, without a `fault`, for a part that is down."""
    await connection.execute(
        "UPDATE parked_events SET due_at = clock_timestamp() + make_interval(secs => $2), rounds = rounds + $3,"
        " attempts = attempts + $4, reason = coalesce(nullif($5, ''), reason), stack = coalesce(nullif($6, ''), stack)"
        " WHERE id = $1",
        parked.id,
        seconds,
        int(fault is not None),
        *_fault(fault or Fault("")),
    )


async def release(connection: Connection, parked: Parked) -> None:
    """It has had its effect, or is dead: the next of its key is the head now."""
    await connection.execute("DELETE FROM parked_events WHERE id = $1", parked.id)


async def bury(connection: Connection, group: str, envelope: Envelope, ordered: bool, fault: Fault) -> None:
    await connection.execute(
        f"INSERT INTO dead_letters (consumer, {_EVENT}, attempts, reason, stack)"  # noqa: S608
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9::text::jsonb, $10, $11, $12, $13, $14)"
        " ON CONFLICT (consumer, event_id) DO UPDATE SET attempts = excluded.attempts, reason = excluded.reason,"
        " stack = excluded.stack, died_at = now()",
        group,
        *_values(envelope, ordered),
        *_fault(fault),
    )


async def bury_abandoned(connection: Connection, limit: int) -> int:
    """Dead are also events that nobody has given a round for long: their group is gone. Returns how many were."""
    status = await connection.execute(
        "WITH abandoned AS (DELETE FROM parked_events WHERE id IN ("  # noqa: S608
        f"  SELECT id FROM parked_events WHERE due_at < now() - interval '{ABANDONED_AFTER}'"
        "    ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED)"
        f" RETURNING consumer, {_EVENT}, attempts, reason, stack)"
        f" INSERT INTO dead_letters (consumer, {_EVENT}, attempts, reason, stack)"
        f" SELECT consumer, {_EVENT}, attempts, reason, stack FROM abandoned"
        " ON CONFLICT (consumer, event_id) DO UPDATE SET died_at = now()",
        limit,
    )
    return int(status.split()[-1])


async def dead_letters(connection: Connection, limit: int) -> list[Record]:
    return await connection.fetch(
        "SELECT consumer, event_id, type, topic, key, origin, attempts, reason, died_at FROM dead_letters"
        " ORDER BY died_at DESC LIMIT $1",
        limit,
    )


async def dead_letter(connection: Connection, event_id: UUID) -> list[Record]:
    """One a consumer group that buried it."""
    return await connection.fetch(
        f"SELECT consumer, {_EVENT}, attempts, reason, stack, died_at FROM dead_letters"  # noqa: S608
        " WHERE event_id = $1",
        event_id,
    )


async def redrive(connection: Connection, event_ids: list[UUID] | None) -> int:
    """Park dead letters again, due now and under their own ids; `None` means all. Returns how many.

    What could not be read as an event stays: no code can give it an effect.
    """
    status = await connection.execute(
        f"WITH raised AS (DELETE FROM dead_letters WHERE type <> $2 AND ($1::uuid[] IS NULL OR event_id = ANY ($1))"  # noqa: S608
        f" RETURNING consumer, {_EVENT}, died_at)"
        f" INSERT INTO parked_events (consumer, {_EVENT}, rounds, attempts, reason, stack, due_at)"
        f" SELECT consumer, {_EVENT}, 0, 0, 'redriven', '', clock_timestamp() FROM raised ORDER BY died_at, time"
        " ON CONFLICT DO NOTHING",
        event_ids,
        UNREADABLE,
    )
    return int(status.split()[-1])


def unreadable(record: Fetched, origin: str) -> Envelope:
    """A stand-in for bytes that are not one of our events, under an id that stays when they are delivered again."""
    headers: dict[str, str] = {}
    with suppress(ValueError):
        headers = {name: value.decode("latin-1") for name, value in record.headers}
    time = _EPOCH
    with suppress(OverflowError):  # whoever sent it says when that was
        time += timedelta(milliseconds=record.timestamp)
    return Envelope(
        id=uuid5(NAMESPACE_OID, origin),
        type=UNREADABLE,
        source="",
        topic=record.topic,
        key=(record.key or b"").decode("latin-1"),
        time=time,
        data=record.value or b"",
        headers=headers,
        origin=origin,
    )


def _values(envelope: Envelope, ordered: bool) -> tuple[object, ...]:
    return (
        ordered,
        envelope.topic,
        envelope.id,
        envelope.type,
        envelope.source,
        _text(envelope.key),
        envelope.time,
        msgspec.json.encode({_text(name): _text(value) for name, value in envelope.headers.items()}).decode(),
        envelope.data,
        envelope.origin,
    )


def _fault(fault: Fault) -> tuple[object, ...]:
    return fault.attempts, _text(fault.reason)[:_REASON_LENGTH], _text(fault.stack)[-_STACK_LENGTH:]


def _text(text: str) -> str:
    """Without what PostgreSQL cannot hold: NUL, and the lone surrogates by which Python passes bytes on."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def _envelope(row: Record) -> Envelope:
    return Envelope(
        id=row["event_id"],
        type=row["type"],
        source=row["source"],
        topic=row["topic"],
        key=row["key"],
        time=row["time"],
        data=row["data"],
        headers=msgspec.json.decode(row["headers"]),
        origin=row["origin"],
    )
