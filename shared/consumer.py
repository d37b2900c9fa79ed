"""Consuming events: delivered at least once, effective exactly once.

A service lists what it handles in `consumers.py`: `On(UserRegistered, service.welcome)`. A handler does its slow work,
then opens `async with delivery.transaction() as tx:`, which records the event in the inbox in the very transaction of
the effect; had it been handled before, the handler ends there and the delivery counts as done. The offset is committed
after that. Failures are tried again with growing delays and then buried in the dead letters with the reason; what is
down (`Unavailable`) is waited for.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic

import msgspec
import structlog

from shared import consistency, metrics, tracing
from shared.database import Connection, Database, Transaction
from shared.errors import Unavailable
from shared.events import CONSISTENCY, Bus, E, Envelope, Event
from shared.logs import get_logger

log = get_logger()

ATTEMPTS = 4
_FIRST_DELAY_SECONDS = 0.1
_LONGEST_DELAY_SECONDS = 5.0
_KEPT = "30 days"  # well past the broker's retention

HANDLED = metrics.Counter("tenfold_consumer_events_total", "Events by outcome", ("consumer", "type", "outcome"))
DURATION = metrics.Histogram(
    "tenfold_consumer_duration_seconds",
    "Time to handle an event",
    ("consumer", "type"),
    buckets=metrics.DURATION_BUCKETS,
)


class AlreadyHandled(Exception):
    pass


class Delivery(Generic[E]):
    """One event in the hands of one handler."""

    def __init__(self, event: E, envelope: Envelope, consumer: str, db: Database) -> None:
        self.event = event
        self.envelope = envelope
        self._consumer = consumer
        self._db = db

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """The transaction of the effect. Ends the handler at once if the event has had its effect already."""
        async with self._db.transaction() as tx:
            done = await tx.execute(
                "INSERT INTO inbox (consumer, event_id) VALUES ($1, $2) ON CONFLICT DO NOTHING",
                self._consumer,
                self.envelope.id,
            )
            if done == "INSERT 0 0":
                raise AlreadyHandled
            yield tx

    async def stop_if_handled(self) -> None:
        """For handlers whose work is dear: end here if the effect is there already."""
        if await self._db.read(_is_handled, self._consumer, self.envelope.id):
            raise AlreadyHandled


async def _is_handled(connection: Connection, consumer: str, event_id: object) -> bool:
    row = await connection.fetchval("SELECT 1 FROM inbox WHERE consumer = $1 AND event_id = $2", consumer, event_id)
    return row is not None


@dataclass(frozen=True)
class On(Generic[E]):
    """A line of a service's topic table: events of this type go to this method."""

    event: type[E]
    handle: Callable[[Delivery[E]], Awaitable[None]]


class Consumer:
    """The handlers of one consumer group and what happens to each event; the buses feed it."""

    def __init__(self, group: str, table: Iterable[On[Any]], db: Database, bus: Bus) -> None:
        self.group = group
        self.db = db
        self._bus = bus
        self._table = {on.event.TYPE: on for on in table}
        self.topics = sorted({on.event.TOPIC for on in self._table.values()})

    async def handle(self, envelope: Envelope) -> None:
        """Give the event its effect, once; bury it if that cannot be. Raises `Unavailable` when a part is down."""
        on = self._table.get(envelope.type)
        if on is None:
            return
        name = f"{self.group}.{getattr(on.handle, '__name__', 'handler')}"
        bound = structlog.contextvars.bound_contextvars(event_id=str(envelope.id), event_type=envelope.type)
        parent = tracing.extract(envelope.headers)
        with (
            bound,
            consistency.tracked(envelope.headers.get(CONSISTENCY)),
            tracing.span(f"process {envelope.topic}", kind=tracing.SpanKind.CONSUMER, parent=parent, consumer=name),
            metrics.child(DURATION, name, envelope.type).time(),
        ):
            outcome = await self._until_done(on, name, envelope)
            metrics.child(HANDLED, name, envelope.type, outcome).inc()

    async def _until_done(self, on: On[Any], name: str, envelope: Envelope) -> str:
        try:
            event: Event = envelope.decode(on.event)
        except msgspec.DecodeError as error:
            await self._bury(envelope, f"undecodable: {error}")
            return "dead"
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await on.handle(Delivery(event, envelope, name, self.db))
            except AlreadyHandled:
                return "repeated"
            except Unavailable:
                if attempt == ATTEMPTS:
                    raise
            except Exception as error:
                log.exception("event_failed", attempt=attempt, consumer=name)
                if attempt == ATTEMPTS:
                    await self._bury(envelope, f"{type(error).__name__}: {error}")
                    return "dead"
            else:
                return "done"
            await asyncio.sleep(delay(attempt))
        raise AssertionError("unreachable")

    async def _bury(self, envelope: Envelope, reason: str) -> None:
        log.error("event_buried", consumer=self.group, reason=reason)
        await self._bus.bury(self, envelope, reason)


async def clean_up(db: Database) -> int:
    """Forget events handled long before any broker would deliver them again; returns how many."""
    async with db.transaction() as tx:
        status = await tx.execute(f"DELETE FROM inbox WHERE handled_at < now() - interval '{_KEPT}'")  # noqa: S608
    return int(status.split()[-1])


def delay(attempt: int) -> float:
    """Seconds to wait after the given attempt (1 is the first): exponential, with full jitter in its upper half."""
    longest: float = min(_FIRST_DELAY_SECONDS * 4 ** (attempt - 1), _LONGEST_DELAY_SECONDS)
    return longest * random.uniform(0.5, 1)  # noqa: S311 - spreading load, not secrets
