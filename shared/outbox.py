"""The transactional outbox: an event is written with the change it tells of, and relayed to the bus afterwards.

`await outbox.add(tx, event)` inserts a row while the transaction holds the aggregate's lock, so row ids of one key are
in order. The relay, in every API process, takes those shards of the keys that may have rows, each under a
transaction-level advisory lock (safe behind PgBouncer; two relays never split one key), hands the rows on in order and
deletes those the bus has. It remembers no position, so a transaction that commits late is not passed over. It is woken
at commit; polling is the safety net. A key whose event fails waits alone. While the bus is away it is tried at growing
intervals.
"""

import asyncio
import hashlib
import time
import zlib
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from functools import cache, partial
from itertools import starmap
from typing import Self

import msgspec

from shared import metrics
from shared.database import Cursor, Database, Transaction
from shared.events import Bus, Envelope, Event, Message
from shared.logs import get_logger

log = get_logger()

SHARDS = 16
_TRANSACTION_ROWS = 20_000  # so many may go out again after a crash
_SMALL_BYTES = 2048
_BATCH_BYTES = 4 * 1024 * 1024  # of the data of events that are larger
_POLL_SECONDS = 1.0
_TAKEN_SECONDS = 0.05
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
        self._due: set[int] = set()  # shards that may have rows
        self._taken: set[int] = set()  # of those, the ones that another relay had

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
        self._due.update(shards)
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
                async with asyncio.timeout(self._pause(look_at)):
                    await self._woken.wait()
            self._woken.clear()
            look = stopping or bool(refused) or time.monotonic() >= look_at
            if look:
                look_at = time.monotonic() + _POLL_SECONDS
            try:
                more = await self.sweep(look=look)
                if more:
                    self._woken.set()
                refused = 0
            except Exception as error:  # noqa: BLE001 - a relay that ends in silence is the worst of failures
                refused += 1
                log.warning("relay_failed", relay=self._service, error=repr(error))
                if stopping:
                    return
            else:
                if stopping and not more:
                    return

    def _pause(self, look_at: float) -> float:
        """For how long nothing need be done unless woken."""
        if self._stopping.is_set():
            return 0.0
        return min(max(0.0, look_at - time.monotonic()), _TAKEN_SECONDS if self._taken else _POLL_SECONDS)

    async def sweep(self, *, look: bool = True) -> bool:
        """Relay what is due, in one transaction of a second or so, and say whether more is.

        `look`: all shards that have rows are due. Raises `Unavailable` when the bus or the database is away.
        """
        now = time.monotonic()
        self._waiting_keys = {key: until for key, until in self._waiting_keys.items() if until > now}
        if look:
            self._due.update(await self._look())
        wanted, self._due, self._taken = self._due | self._taken, set(), set()
        if not wanted:
            return False
        async with self._db.transaction() as tx:
            free = await _lock(tx, self._service, wanted)
            self._taken = wanted - free
            fault = await self._relay(tx, free) if free else None
        if fault is not None:
            raise fault
        return bool(self._due)

    async def _relay(self, tx: Transaction, shards: set[int]) -> Exception | None:
        """While one batch is sent, the one before it is deleted and the next is read.

        A failure of the bus is returned, so that what it has taken before is deleted.
        """
        backlog = await Backlog.opened(tx, shards, self._waiting_keys, self._bus.batch, self._let_wait)
        until = time.monotonic() + _POLL_SECONDS
        relayed = 0
        sent: list[int] = []
        batch = await backlog.read()
        while batch:
            relayed += len(batch)
            if self._waiting_keys:  # of what was read before they failed
                batch = [message for message in batch if message.key not in self._waiting_keys]
            last = relayed >= _TRANSACTION_ROWS or time.monotonic() >= until
            outcomes, following = await asyncio.gather(
                self._bus.publish(batch), _turn(tx, sent, None if last else backlog), return_exceptions=True
            )
            if isinstance(following, BaseException):
                raise following
            if isinstance(outcomes, Exception):
                return outcomes
            if isinstance(outcomes, BaseException):
                raise outcomes
            sent = self._sent(batch, outcomes)
            if last:
                self._due |= shards
            batch = following
        await _delete(tx, sent)
        return None

    def _sent(self, messages: list[Message], outcomes: list[Exception | None]) -> list[int]:
        """The rows that the bus has. The keys of the others wait."""
        sent = [message.row for message, fault in zip(messages, outcomes, strict=True) if fault is None]
        metrics.child(RELAYED, self._service).inc(len(sent))
        for message, fault in zip(messages, outcomes, strict=True) if len(sent) < len(messages) else ():
            if fault is not None:
                self._let_wait(message.topic, message.key, fault)
        return sent

    def _let_wait(self, topic: str, key: str, fault: Exception) -> None:
        if key not in self._waiting_keys:
            self._waiting_keys[key] = time.monotonic() + _RETRY_SECONDS
            metrics.child(FAILED, self._service).inc()
            log.warning("event_not_relayed", topic=topic, key=key, error=repr(fault))

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


LetWait = Callable[[str, str, Exception], None]  # topic and key of an event that is not to be sent, and why


class Backlog:
    """The rows of some shards as a transaction found them, in order, a batch at a time.

    One look at the table for all batches, so rows that were read are not passed again. And what commits meanwhile is
    not seen: else an event could be met whose key has an earlier one that was passed over.
    """

    def __init__(self, tx: Transaction, cursor: Cursor, limit: int, let_wait: LetWait) -> None:
        self._tx = tx
        self._cursor = cursor
        self._limit = limit
        self._let_wait = let_wait
        self._rest: list[Message] = []

    @classmethod
    async def opened(
        cls, tx: Transaction, shards: Collection[int], except_keys: Collection[str], limit: int, let_wait: LetWait
    ) -> Self:
        """`let_wait` is told of the rows that are no messages and are left out; later ones of their keys are not."""
        cursor = await tx.cursor(_BACKLOG, list(shards), list(except_keys), _SMALL_BYTES)
        return cls(tx, cursor, limit, let_wait)

    async def read(self) -> list[Message]:
        """The next ones; none when there are no more."""
        while messages := self._rest or list(starmap(Message, await self._cursor.fetch(self._limit))):
            complete, self._rest = await _completed(self._tx, messages, self._let_wait)
            if complete:
                return complete
        return []


# In the order of the primary key, so that each page is met once.
_BACKLOG = """
    SELECT topic, key, CASE WHEN octet_length(data) <= $3 THEN data END AS data,
        CASE WHEN octet_length(data) <= $3 THEN record_headers END AS record_headers, id
    FROM outbox WHERE shard = ANY ($1::smallint[]) AND key <> ALL ($2) ORDER BY id
"""


def shard_of(key: str) -> int:
    return zlib.crc32(key.encode()) % SHARDS


async def _lock(tx: Transaction, service: str, shards: Collection[int]) -> set[int]:
    """Those of `shards` that no other relay has, locked for this transaction.

    The commit need not wait for the disk: a row whose deletion is lost goes out again, which consumers know of. And the
    rows are not to be sorted, all of them before the first is seen: their index has them in order.
    """
    rows = await tx.fetch(
        "SELECT shard, set_config('synchronous_commit', 'off', true), set_config('enable_sort', 'off', true)"
        " FROM unnest($1::smallint[], $2::bigint[]) AS wanted (shard, lock) WHERE pg_try_advisory_xact_lock(lock)",
        shards,
        [_lock_of(service, shard) for shard in shards],
    )
    return {row[0] for row in rows}


async def _turn(tx: Transaction, sent: list[int], backlog: Backlog | None) -> list[Message]:
    """Delete what was sent and read what is next."""
    await _delete(tx, sent)
    return await backlog.read() if backlog is not None else []


async def _delete(tx: Transaction, ids: list[int]) -> None:
    if ids:  # as one text: of an array the driver looks at each element twice
        await tx.execute(
            "DELETE FROM outbox WHERE id = ANY (string_to_array($1, ',')::bigint[])", ",".join(map(str, ids))
        )


async def _completed(
    tx: Transaction, messages: list[Message], let_wait: LetWait
) -> tuple[list[Message], list[Message]]:
    """The first of `messages`, with what was not read of them at first, and the rest.

    That is the data of large ones, of which as many are read as the bound on bytes allows, and at least one; and rows
    written by earlier code have no headers of a record.
    """
    missing = [message.row for message in messages if message.headers is None]
    if not missing:
        return messages, []
    rows = await tx.fetch(_WHOLE, missing, _BATCH_BYTES)
    made: dict[int, Message] = {}
    for number, event_id, kind, source, topic, key, at, data, headers in rows:
        try:
            envelope = Envelope(event_id, kind, source, topic, key, at, data, msgspec.json.decode(headers))
            made[number] = msgspec.structs.replace(envelope.to_message(), row=number)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the rows of other keys are to go on
            let_wait(topic, key, error)
    last = rows[-1][0] if 0 < len(rows) < len(missing) else messages[-1].row
    left_out = set(missing) - made.keys()  # up to `last`: somebody deleted them, or they are no messages
    complete = [made.get(m.row, m) for m in messages if m.row <= last and m.row not in left_out]
    return complete, [message for message in messages if message.row > last]


_WHOLE = """
    SELECT id, event_id, type, source, topic, key, time, data, headers
    FROM (SELECT id, event_id, type, source, topic, key, time, data, headers,
              sum(octet_length(data)) OVER (ORDER BY id ROWS UNBOUNDED PRECEDING) AS bytes
          FROM outbox WHERE id = ANY ($1)) AS counted
    WHERE bytes - octet_length(data) < $2 ORDER BY id
"""


@cache
def _lock_of(service: str, shard: int) -> int:
    """A 64-bit advisory lock of this service and shard: such locks are per database, which services share."""
    digest = hashlib.blake2b(f"outbox:{service}:{shard}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)
