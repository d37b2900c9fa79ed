"""The transactional outbox: an event is written with the change it tells of, and relayed to the bus afterwards.

`await outbox.add(tx, event)` inserts a row while the transaction holds the aggregate's lock, so row ids of one key are
in order. The relay, in every API process, takes one shard of the keys at a time under a transaction-level advisory lock
(safe behind PgBouncer; two relays never split one key), hands the rows on in order and deletes those the bus has. It
keeps no cursor, so a transaction that commits late is not passed over. It is woken at commit; polling is the safety
net. A key whose event fails waits alone.
"""

import asyncio
import hashlib
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import asyncpg
import msgspec

from shared import metrics
from shared.database import Connection, Database, Record, Transaction
from shared.errors import TenfoldError
from shared.events import Bus, Envelope, Event
from shared.logs import get_logger

log = get_logger()

SHARDS = 16
_PARALLEL_SHARDS = 4
_POLL_SECONDS = 1.0
_RETRY_SECONDS = 1.0
_DRAIN_SECONDS = 5.0
_COLUMNS = "id, topic, event_id, type, source, key, time, headers, data"

RELAYED = metrics.Counter("tenfold_outbox_relayed_total", "Events handed to the bus", ("service",))
FAILED = metrics.Counter("tenfold_outbox_failed_total", "Events the bus did not take", ("service",))
BACKLOG = metrics.Gauge("tenfold_outbox_backlog", "Rows waiting in the outbox", ("service",))
OLDEST = metrics.Gauge("tenfold_outbox_oldest_seconds", "Age of the oldest row", ("service",))


class Outbox:
    def __init__(self, service: str, relay: "Relay") -> None:
        self._service = service
        self._relay = relay

    async def add(self, tx: Transaction, *events: Event) -> None:
        """Publish `events` if and when `tx` commits."""
        for event in events:
            envelope = Envelope.wrap(event, source=self._service)
            await tx.execute(
                "INSERT INTO outbox (shard, topic, event_id, type, source, key, headers, data)"
                " VALUES ($1, $2, $3, $4, $5, $6, $7::text::jsonb, $8)",
                shard_of(envelope.key),
                envelope.topic,
                envelope.id,
                envelope.type,
                envelope.source,
                envelope.key,
                msgspec.json.encode(envelope.headers).decode(),
                envelope.data,
            )
        tx.after_commit(self._relay.wake)


class Relay:
    """Moves rows from the outbox to the bus until closed. Open it with `Relay.opened`."""

    def __init__(self, service: str, db: Database, bus: Bus) -> None:
        self._service = service
        self._db = db
        self._bus = bus
        self._woken = asyncio.Event()
        self._stopping = False
        self._waiting_keys: dict[str, float] = {}

    @classmethod
    @asynccontextmanager
    async def opened(cls, service: str, db: Database, bus: Bus) -> "AsyncIterator[Relay]":
        """Relay while open; at the end, what is committed is still relayed, for at most a few seconds."""
        relay = cls(service, db, bus)
        task = asyncio.create_task(relay._run(), name=f"{service}-relay")
        try:
            yield relay
        finally:
            relay._stopping = True
            relay.wake()
            await asyncio.wait([task], timeout=_DRAIN_SECONDS)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def wake(self) -> None:
        self._woken.set()

    async def _run(self) -> None:
        while True:
            stopping = self._stopping
            with suppress(TimeoutError):
                async with asyncio.timeout(0 if stopping else _POLL_SECONDS):
                    await self._woken.wait()
            self._woken.clear()
            try:
                while await self.sweep():
                    pass
            except (TenfoldError, asyncpg.PostgresError) as error:
                log.warning("relay_failed", relay=self._service, error=str(error))
                if not stopping:
                    await asyncio.sleep(_RETRY_SECONDS)
            if stopping:
                return

    async def sweep(self) -> bool:
        """Relay what is there, once through the shards. True when there may be more to do at once."""
        now = time.monotonic()
        self._waiting_keys = {key: until for key, until in self._waiting_keys.items() if until > now}
        async with self._db.transaction() as tx:
            state = await tx.fetchrow(
                "SELECT array_agg(DISTINCT shard) AS shards, count(*) AS backlog,"
                " coalesce(extract(epoch FROM clock_timestamp() - min(time)), 0) AS oldest"
                "  FROM (SELECT shard, time FROM outbox WHERE key <> ALL ($1) ORDER BY id LIMIT 10000) AS rows",
                list(self._waiting_keys),
            )
        assert state is not None
        metrics.child(BACKLOG, self._service).set(state["backlog"])
        metrics.child(OLDEST, self._service).set(float(state["oldest"]))
        gate = asyncio.Semaphore(_PARALLEL_SHARDS)

        async def relay(shard: int) -> bool:
            async with gate:
                return await self._relay_shard(shard)

        return any(await asyncio.gather(*(relay(shard) for shard in state["shards"] or ())))

    async def _relay_shard(self, shard: int) -> bool:
        """True when some rows went and more may follow."""
        async with self._db.transaction() as tx:
            if not await tx.fetchval("SELECT pg_try_advisory_xact_lock($1)", _lock(self._service, shard)):
                return False  # another relay has it
            rows = await _oldest(tx, shard, list(self._waiting_keys), self._bus.batch)
            if not rows:
                return False
            outcomes = await self._bus.publish([_envelope(row) for row in rows])
            sent = [row["id"] for row, fault in zip(rows, outcomes, strict=True) if fault is None]
            await tx.execute("DELETE FROM outbox WHERE id = ANY ($1)", sent)
        metrics.child(RELAYED, self._service).inc(len(sent))
        for row, fault in zip(rows, outcomes, strict=True):
            if fault is not None and row["key"] not in self._waiting_keys:
                self._waiting_keys[row["key"]] = time.monotonic() + _RETRY_SECONDS
                metrics.child(FAILED, self._service).inc()
                log.warning("event_not_relayed", type=row["type"], event_id=str(row["event_id"]), error=repr(fault))
        return bool(sent)


def shard_of(key: str) -> int:
    return zlib.crc32(key.encode()) % SHARDS


async def _oldest(connection: Connection, shard: int, except_keys: list[str], limit: int) -> list[Record]:
    return await connection.fetch(
        f"SELECT {_COLUMNS} FROM outbox WHERE shard = $1 AND key <> ALL ($2) ORDER BY id LIMIT $3",  # noqa: S608
        shard,
        except_keys,
        limit,
    )


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
    )


def _lock(service: str, shard: int) -> int:
    """A 64-bit advisory lock of this service and shard: such locks are per database, which services share."""
    digest = hashlib.blake2b(f"outbox:{service}:{shard}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)
