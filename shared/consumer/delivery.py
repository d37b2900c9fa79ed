"""What a handler gets: one event, and the transaction in which it has its effect and is recorded as handled."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Generic

from shared import metrics
from shared.database import Connection, Database, Transaction
from shared.events import E, Envelope

HANDLED = metrics.Counter("tenfold_consumer_events_total", "Events by outcome", ("consumer", "type", "outcome"))
DURATION = metrics.Histogram(
    "tenfold_consumer_duration_seconds",
    "Time to handle an event, or a batch",
    ("consumer", "type"),
    buckets=metrics.DURATION_BUCKETS,
)


TIMEOUTS = metrics.Counter(
    "tenfold_consumer_timeouts_total", "Handlers that were cancelled since they took too long", ("consumer", "type")
)


class AlreadyHandled(Exception):
    pass


class Behind(Exception):
    """An earlier event of the key is parked."""


class Delivery(Generic[E]):
    """One event in the hands of one handler."""

    def __init__(self, event: E, envelope: Envelope, consumer: str, db: Database, behind: str | None) -> None:
        """`behind` is the group whose parked events of this key come first; `None` where nothing can."""
        self.event = event
        self.envelope = envelope
        self._consumer = consumer
        self._db = db
        self._behind = behind
        self.bound: asyncio.Timeout | None = None  # on the handler's time, while it runs

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While open the bound on the handler's time stands still: for who waits in a queue of the handler's own."""
        if self.bound is None or (deadline := self.bound.when()) is None:
            yield
            return
        now = asyncio.get_running_loop().time
        left = deadline - now()
        self.bound.reschedule(None)
        try:
            yield
        finally:
            self.bound.reschedule(now() + left)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """The transaction of the effect. Ends the handler at once if the event has had its effect already."""
        async with self._db.transaction() as tx:
            # One statement, so that the rare parked event costs the common case no round trip.
            done = await tx.execute(
                "INSERT INTO inbox (consumer, event_id) SELECT $1, $2 WHERE NOT EXISTS (SELECT FROM parked_events"
                " WHERE ordered AND consumer = $3 AND topic = $4 AND key = $5) ON CONFLICT DO NOTHING",
                self._consumer,
                self.envelope.id,
                self._behind,
                self.envelope.topic,
                self.envelope.key,
            )
            if done == "INSERT 0 0":
                if await _is_handled(tx, self._consumer, self.envelope.id):
                    raise AlreadyHandled
                raise Behind
            yield tx

    async def stop_if_handled(self) -> None:
        """For handlers whose work is dear: end here if the effect is there already."""
        if await self._db.read(_is_handled, self._consumer, self.envelope.id):
            raise AlreadyHandled


async def _is_handled(connection: Connection, consumer: str, event_id: object) -> bool:
    row = await connection.fetchval("SELECT 1 FROM inbox WHERE consumer = $1 AND event_id = $2", consumer, event_id)
    return row is not None


@dataclass(frozen=True, eq=False)
class On(Generic[E]):
    """A line of a service's topic table: events of this type go to this method.

    `ordered`: while an event of a key waits for another round, later ones of the key wait behind it. `batch`, for
    effects that are statements only, gives many events their effect in the transaction it is handed; when it fails,
    they go to `handle` one by one.
    """

    event: type[E]
    handle: Callable[[Delivery[E]], Awaitable[None]]
    ordered: bool = True
    batch: Callable[[Transaction, Sequence[E]], Awaitable[None]] | None = None

    def consumer(self, group: str) -> str:
        """The name under which the inbox knows the handler, for two handlers of one event must not collide."""
        return f"{group}.{getattr(self.handle, '__name__', 'handler')}"
