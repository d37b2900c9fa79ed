"""The transactional outbox: an event is written with the change it tells of, and relayed to the bus afterwards.

`await outbox.add(tx, event)` inserts a row while the transaction holds the aggregate's lock, so row ids of one key are
in order. The relay, in every API process, takes a few shards of the keys at a time, each under a transaction-level
advisory lock (safe behind PgBouncer; two relays never split one key), hands the rows on in order and deletes those the
bus has. It keeps no cursor, so a transaction that commits late is not passed over. It is woken at commit; polling is
the safety net. A key whose event fails waits alone. While the bus is away one transaction at a time tries it, at
growing intervals.
"""

import asyncio
import hashlib
import time
import zlib
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from functools import cache, partial
from itertools import starmap

import asyncpg
import msgspec

from shared import metrics
from shared.database import Connection, Database, Transaction
from shared.errors import TenfoldError
from shared.events import Bus, Envelope, Event, Message
from shared.logs import get_logger

log = get_logger()

SHARDS = 16
_TOGETHER = 4  # shards in a transaction: fewer and larger batches, for the database and the broker
_SIDE_BY_SIDE = 3  # such transactions: one is read while another is sent, and the rows of a third are deleted
_BATCH_BYTES = 4 * 1024 * 1024  # of the data of a shard's rows
_POLL_SECONDS = 1.0
_RETRY_SECONDS = 1.0
_LONGEST_RETRY_SECONDS = 5.0
_DRAIN_SECONDS = 5.0
_LOOK_ROWS = 10_000

RELAYED = metrics.Counter("tenfold_outbox_relayed_total", "Events handed to the bus", ("service",))
FAILED = metrics.Counter("tenfold_outbox_failed_total", "Events the bus did not take", ("service",))
BACKLOG = metrics.Gauge("tenfold_outbox_backlog", "Rows waiting in the outbox (counted up to 10,000)", ("service",))
OLDEST = metrics.Gauge("tenfold_outbox_oldest_seconds", "Age of the oldest row", ("service",))


class Outbox:
    def __init__(self, service: str, relay: "Relay") -> None:
        self._service = service
        self._relay = relay

    async def add(self, tx: Transaction, *events: Event) -> None:
        """Publish `events` if and when `tx` commits."""
        envelopes = Envelope.wrap_all(events, source=self._service)
        shards = [shard_of(envelope.key) for envelope in envelopes]
        await tx.execute(
            "INSERT INTO outbox (shard, topic, event_id, type, source, key, headers, data, record_headers)"
            " SELECT s, t, i, y, $5, k, h::jsonb, d, r FROM unnest($1::smallint[], $2::text[], $3::uuid[], $4::text[],"
            " $6::text[], $7::text[], $8::bytea[], $9::bytea[]) WITH ORDINALITY AS rows (s, t, i, y, k, h, d, r, n)"
            " ORDER BY n",
            shards,
            [envelope.topic for envelope in envelopes],
            [envelope.id for envelope in envelopes],
            [envelope.type for envelope in envelopes],
            self._service,
            [envelope.key for envelope in envelopes],
            [msgspec.json.encode(envelope.headers).decode() for envelope in envelopes],
            [envelope.data for envelope in envelopes],
            [envelope.to_message().headers for envelope in envelopes],
        )
        tx.after_commit(partial(self._relay.wake, shards))


class Relay:
    """Moves rows from the outbox to the bus until closed. Open it with `Relay.opened`."""

    def __init__(self, service: str, db: Database, bus: Bus) -> None:
        self._service = service
        self._db = db
        self._bus = bus
        self._woken = asyncio.Event()
        self._stopping = asyncio.Event()
        self._waiting_keys: dict[str, float] = {}
        self._due: dict[int, None] = {}  # shards that may have rows, those first that have waited longest

    @classmethod
    @asynccontextmanager
    async def opened(cls, service: str, db: Database, bus: Bus) -> "AsyncIterator[Relay]":
        """Relay while open; at the end, what is committed is still relayed, for at most a few seconds."""
        relay = cls(service, db, bus)
        task = asyncio.create_task(relay._run(), name=f"{service}-relay")
        try:
            yield relay
        finally:
            relay._stopping.set()
            relay.wake()
            await asyncio.wait([task], timeout=_DRAIN_SECONDS)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def wake(self, shards: Collection[int] = ()) -> None:
        """Rows of these shards were committed."""
        self._due.update(dict.fromkeys(shards))
        self._woken.set()

    async def _run(self) -> None:
        refused = 0  # sweeps in a row that found no bus or no database
        look_at = 0.0
        while True:
            stopping = self._stopping.is_set()
            if refused:
                with suppress(TimeoutError):  # commits go on meanwhile, and each would be another try
                    async with asyncio.timeout(min(_RETRY_SECONDS * 2 ** (refused - 1), _LONGEST_RETRY_SECONDS)):
                        await self._stopping.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(0 if stopping else max(0.0, look_at - time.monotonic())):
                    await self._woken.wait()
            self._woken.clear()
            look = stopping or bool(refused) or time.monotonic() >= look_at
            if look:
                look_at = time.monotonic() + _POLL_SECONDS
            try:
                more = await self.sweep(look=look, careful=bool(refused))
                if more:
                    self._woken.set()
                refused = 0
            except (TenfoldError, asyncpg.PostgresError) as error:
                refused += 1
                log.warning("relay_failed", relay=self._service, error=str(error))
                if stopping:
                    return
            else:
                if stopping and not more:
                    return

    async def sweep(self, *, look: bool = True, careful: bool = False) -> bool:
        """Relay what is due for a second at most, and say whether more is. `look`: all shards that have rows are due.

        `careful`: one transaction at a time, so that a bus that is still away costs one connection. Raises
        `Unavailable` then.
        """
        now = time.monotonic()
        self._waiting_keys = {key: until for key, until in self._waiting_keys.items() if until > now}
        if look:
            self._due.update(dict.fromkeys(await self._look()))
        until = time.monotonic() + _POLL_SECONDS
        in_hand: set[int] = set()

        async def relay() -> None:
            nonlocal until
            try:
                while time.monotonic() < until and (shards := [n for n in self._due if n not in in_hand][:_TOGETHER]):
                    for shard in shards:
                        del self._due[shard]
                    in_hand.update(shards)
                    more = await self._relay_shards(shards)
                    in_hand.difference_update(shards)
                    self._due.update(dict.fromkeys(more))
            finally:
                until = 0.0  # for the others too: after a failure, and to begin what is due later all together

        lanes = (relay() for _ in range(1 if careful else _SIDE_BY_SIDE))
        for outcome in await asyncio.gather(*lanes, return_exceptions=True):
            if outcome is not None:
                raise outcome
        return bool(self._due)

    async def _look(self) -> list[int]:
        async with self._db.transaction() as tx:
            state = await tx.fetchrow(
                "SELECT (SELECT array_agg(DISTINCT shard) FROM (SELECT shard FROM outbox WHERE key <> ALL ($1)"
                "  ORDER BY id LIMIT $2) AS rows) AS shards,"
                " (SELECT count(*) FROM (SELECT FROM outbox LIMIT $2) AS rows) AS backlog, coalesce(extract(epoch FROM"
                " clock_timestamp() - (SELECT time FROM outbox ORDER BY id LIMIT 1)), 0) AS oldest",
                list(self._waiting_keys),
                _LOOK_ROWS,
            )
        assert state is not None
        metrics.child(BACKLOG, self._service).set(state["backlog"])
        metrics.child(OLDEST, self._service).set(float(state["oldest"]))
        return state["shards"] or []

    async def _relay_shards(self, shards: list[int]) -> set[int]:
        """Those that may have more: when some of their rows went."""
        async with self._db.transaction() as tx:
            free = await _lock(tx, self._service, shards)  # of the others another relay takes care
            messages = await _oldest(tx, free, list(self._waiting_keys), self._bus.batch) if free else []
            if not messages:
                return set()
            outcomes = await self._bus.publish(messages)
            sent = [message.row for message, fault in zip(messages, outcomes, strict=True) if fault is None]
            # As one text: of an array the driver looks at each element twice.
            await tx.execute(
                "DELETE FROM outbox WHERE id = ANY (string_to_array($1, ',')::bigint[])",
                ",".join(map(str, sent)),
            )
        metrics.child(RELAYED, self._service).inc(len(sent))
        for message, fault in zip(messages, outcomes, strict=True) if len(sent) < len(messages) else ():
            if fault is not None and message.key not in self._waiting_keys:
                self._waiting_keys[message.key] = time.monotonic() + _RETRY_SECONDS
                metrics.child(FAILED, self._service).inc()
                event = Envelope.from_message(message)
                log.warning("event_not_relayed", type=event.type, event_id=str(event.id), error=repr(fault))
        return set(free) if sent else set()


def shard_of(key: str) -> int:
    return zlib.crc32(key.encode()) % SHARDS


async def _lock(connection: Connection, service: str, shards: list[int]) -> list[int]:
    """Those of `shards` that no other relay has, locked for this transaction.

    The commit need not wait for the disk: a row whose deletion is lost goes out again, which consumers know of.
    """
    rows = await connection.fetch(
        "SELECT shard, set_config('synchronous_commit', 'off', true) FROM unnest($1::smallint[], $2::bigint[])"
        " AS wanted (shard, lock) WHERE pg_try_advisory_xact_lock(lock)",
        shards,
        [_lock_of(service, shard) for shard in shards],
    )
    return [row[0] for row in rows]


async def _oldest(connection: Connection, shards: list[int], except_keys: list[str], limit: int) -> list[Message]:
    """Of each shard up to `limit` rows, in order: as many as the bound on their bytes allows, and at least one.

    Sorted by the database, which so sends them at a stretch: rows that come in driblets cost the client more.
    """
    rows = await connection.fetch(
        "SELECT topic, key, data, record_headers, id"
        " FROM unnest($1::smallint[]) AS wanted (shard) CROSS JOIN LATERAL"
        " (SELECT oldest.*, sum(octet_length(data)) OVER (ORDER BY id ROWS UNBOUNDED PRECEDING) AS bytes FROM"
        "  (SELECT id, topic, key, data, record_headers FROM outbox WHERE outbox.shard = wanted.shard"
        "   AND key <> ALL ($2) ORDER BY id LIMIT $3) AS oldest) AS counted"
        " WHERE bytes - octet_length(data) < $4 ORDER BY id",
        shards,
        except_keys,
        limit,
        _BATCH_BYTES,
    )
    messages = list(starmap(Message, rows))
    if older := [n for n, message in enumerate(messages) if message.headers is None]:  # written by earlier code
        made = {message.row: message for message in await _made(connection, [messages[n].row for n in older])}
        for n in older:
            messages[n] = made[messages[n].row]
    return messages


async def _made(connection: Connection, ids: list[int]) -> list[Message]:
    """Messages of rows that have no headers of a record."""
    rows = await connection.fetch(
        "SELECT id, event_id, type, source, topic, key, time, data, headers FROM outbox WHERE id = ANY ($1)", ids
    )
    made: list[Message] = []
    for number, event_id, kind, source, topic, key, at, data, headers in rows:
        envelope = Envelope(event_id, kind, source, topic, key, at, data, msgspec.json.decode(headers))
        made.append(msgspec.structs.replace(envelope.to_message(), row=number))
    return made


@cache
def _lock_of(service: str, shard: int) -> int:
    """A 64-bit advisory lock of this service and shard: such locks are per database, which services share."""
    digest = hashlib.blake2b(f"outbox:{service}:{shard}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)
