"""Consuming events: delivered at least once, effective exactly once.

A service lists what it handles in `consumers.py`: `On(UserRegistered, service.welcome)`. A handler does its slow work,
then opens `async with delivery.transaction() as tx:`, which records the event in the inbox in the very transaction of
the effect; had it been handled before, the handler ends there and the delivery counts as done. The offset is committed
after that.

A handler that fails is tried again at once a few times; then the event is parked (`parking`) and has another round
after each of the service's retry delays; then it is a dead letter, with reason, stack and origin. Later events of its
key wait behind it unless the handler says that order does not matter. What is down (`Unavailable`) is waited for; a
member of a group does so for a minute, then the event waits parked, so that it stops its key only. A handler that takes
too long is cancelled, and its event parked at once.

    delivery.py   what a handler gets, and the lines of the topic table
    batches.py    many events in one transaction
    parking.py    where events wait that could not be handled: parked, or dead
    __main__.py   looking at dead letters and redriving them
"""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import asyncpg
import msgspec
import structlog

from shared import consistency, metrics, tracing
from shared.consumer import batches, parking
from shared.consumer.batches import Item
from shared.consumer.delivery import DURATION, HANDLED, TIMEOUTS, AlreadyHandled, Behind, Delivery, On
from shared.consumer.parking import Fault, Parked
from shared.database import Database
from shared.errors import Unavailable
from shared.events import CONSISTENCY, Envelope, Event, glance
from shared.logs import get_logger
from shared.records import Fetched
from shared.sweeping import sweep

__all__ = ["AlreadyHandled", "Consumer", "Delivery", "On", "clean_up", "clean_up_failed", "delay"]

log = get_logger()

ATTEMPTS = 4
RETRY_DELAYS_SECONDS = (10.0, 60.0, 600.0)
HANDLER_SECONDS = 120.0
_FIRST_DELAY_SECONDS = 0.1
_LONGEST_DELAY_SECONDS = 5.0
_RETRY_POLL_SECONDS = 1.0
_RETRY_BATCH = 8
_LEASE_SECONDS = 300.0
_DOWN_SECONDS = 5.0
_BURIED_AT_ONCE = 1000
_DEAD_KEPT = "90 days"
_KEPT = "30 days"  # well past the broker's retention


class HandlerTimeout(Exception):
    """It took too long, and would take as long again: not one of the attempts close together, but a failure at once."""


class Consumer:
    """The handlers of one consumer group and what happens to each event; the buses feed it."""

    def __init__(
        self,
        group: str,
        table: Iterable[On[Any]],
        db: Database,
        retry_delays: Sequence[float] = RETRY_DELAYS_SECONDS,
        handler_seconds: float = HANDLER_SECONDS,
    ) -> None:
        """`retry_delays` in seconds: a round for each, before the event is a dead letter. A handler, or a batch, that
        takes longer than `handler_seconds` is cancelled, and has failed."""
        self.group = group
        self.db = db
        self._table = {on.event.TYPE: on for on in table}
        self._decoders = {
            kind.encode(): (on, msgspec.json.Decoder(on.event).decode) for kind, on in self._table.items()
        }
        self._retry_delays = retry_delays
        self._handler_seconds = handler_seconds
        self._to_retry = asyncio.Event()
        self.topics = sorted({on.event.TOPIC for on in self._table.values()})
        self.takes_batches = all(on.batch for on in self._table.values())

    async def handle(self, envelope: Envelope, *, patient: bool = True) -> None:
        """Give the event its effect, once; park it if that cannot be now. Raises `Unavailable` when a part is down.

        Not `patient`: when a part is down for this event it is parked too, no round counted, so that others pass it. It
        raises still when the database is what is down, or when the service has no rounds.
        """
        on = self._table.get(envelope.type)
        if on is None:
            return
        with self._observed(on, envelope):
            try:
                outcome = await self._attempt(on, envelope, self.group if on.ordered else None)
            except Behind:
                outcome = await self._park(on, envelope)
            except Unavailable as error:
                if patient or not self._retry_delays:
                    raise
                outcome = await self._park(on, envelope, Fault.of(error, 0), _DOWN_SECONDS)
            except Exception as error:  # noqa: BLE001 - whatever a handler raises is the event's fault
                fault = Fault.of(error, _attempts(error))
                if self._retry_delays and not isinstance(error, msgspec.DecodeError):
                    outcome = await self._park(on, envelope, fault, self._retry_delays[0])
                else:
                    outcome = await self._bury(envelope, on.ordered, fault)
            metrics.child(HANDLED, on.consumer(self.group), envelope.type, outcome).inc()

    async def handle_batch(self, records: Sequence[Fetched]) -> list[int]:
        """Give many records of a topic their effect in one transaction; those handled before have theirs already.

        Returns the positions of those to be handled one by one: all of them when a handler fails, else those that are
        no event, do not fit their type or have a parked event of their key before them. Raises `Unavailable` when a
        part is down.
        """
        items: list[Item] = []
        apart: list[int] = []
        for position, (record, glanced) in enumerate(zip(records, glance(records), strict=True)):
            if glanced is None:
                apart.append(position)
            elif (found := self._decoders.get(glanced[1])) is not None:
                on, decode = found
                try:
                    items.append((position, on, glanced[0], record, decode(record.value or b"")))
                except (ValueError, RecursionError):  # as in `Envelope.decode`
                    apart.append(position)
        try:
            async with asyncio.timeout(self._handler_seconds):
                behind = await self._handle_items(items)
        except Unavailable:
            raise
        except Exception as error:  # noqa: BLE001 - one by one each event's own fault is found
            log.info("batch_taken_apart", consumer=self.group, events=len(records), error=repr(error))
            return list(range(len(records)))
        return sorted(apart + behind)

    async def _handle_items(self, items: list[Item]) -> list[int]:
        try:
            return await batches.handle(self.db, self.group, items)
        except asyncpg.UniqueViolationError as error:
            if error.constraint_name != batches.INBOX_KEY:
                raise
        # Delivered again, after a rebalance or by a relay that died before it deleted them.
        items = await batches.without_repeated(self.db, self.group, items)
        return await batches.handle(self.db, self.group, items)

    async def bury_unreadable(self, record: Fetched, origin: str, reason: str) -> None:
        """Keep bytes of the broker that are not one of our events. Raises `Unavailable` when the database is down."""
        await self._bury(parking.unreadable(record, origin), False, Fault(reason))

    @asynccontextmanager
    async def retrying(self, ready: asyncio.Event, stop_seconds: float) -> AsyncIterator[None]:
        """Give parked events their rounds while open and `ready`; what is in hand at the end may finish for a while."""
        stopping = asyncio.Event()
        task = asyncio.create_task(self._keep_retrying(ready, stopping), name=f"{self.group}-retries")
        try:
            yield
        finally:
            stopping.set()
            self._to_retry.set()
            await asyncio.wait([task], timeout=stop_seconds)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _keep_retrying(self, ready: asyncio.Event, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_POLL_SECONDS):
                    await self._to_retry.wait()
            self._to_retry.clear()
            try:
                while ready.is_set() and not stopping.is_set() and await self.retry_due():
                    pass
            except Exception as error:  # noqa: BLE001 - rounds that end in silence are events that wait for ever
                log.warning("retries_wait", consumer=self.group, error=repr(error))

    async def retry_due(self) -> int:
        """Give the parked events that are due, the oldest of each key, another round; returns how many.

        What could not be kept of a round is logged; its event is due again when the lease ends.
        """
        async with self.db.transaction() as tx:
            found = await parking.claim(tx, self.group, _RETRY_BATCH, _LEASE_SECONDS)
        outcomes = await asyncio.gather(*(self._retry(parked) for parked in found), return_exceptions=True)
        for parked, outcome in zip(found, outcomes, strict=True):
            if outcome is not None:
                event_id = str(parked.envelope.id)
                log.warning("round_lost", consumer=self.group, event_id=event_id, error=repr(outcome))
        return len(found)

    async def _retry(self, parked: Parked) -> None:
        envelope = parked.envelope
        on = self._table.get(envelope.type)
        outcome = "unknown"
        fault: Fault | None = None
        if on is not None:
            with self._observed(on, envelope):
                try:
                    outcome = await self._attempt(on, envelope, behind=None)
                except Unavailable:
                    async with self.db.transaction() as tx:
                        await parking.wait_again(tx, parked, _DOWN_SECONDS)
                    return
                except Exception as error:  # noqa: BLE001 - whatever a handler raises is the event's fault
                    fault = Fault.of(error, _attempts(error))
        async with self.db.transaction() as tx:
            if fault is not None and parked.rounds < len(self._retry_delays):
                outcome = "parked"
                await parking.wait_again(tx, parked, self._retry_delays[parked.rounds], fault)
            else:
                if fault is not None:
                    outcome = "dead"
                    total = Fault(fault.reason, fault.stack, parked.attempts + fault.attempts)
                    await parking.bury(tx, self.group, envelope, parked.ordered, total)
                    log.error("event_buried", consumer=self.group, event_id=str(envelope.id), reason=fault.reason)
                await parking.release(tx, parked)
        if on is not None:
            metrics.child(HANDLED, on.consumer(self.group), envelope.type, outcome).inc()

    async def _attempt(self, on: On[Any], envelope: Envelope, behind: str | None) -> str:
        """A few attempts close together, for blips; raises what the last one did."""
        event: Event = envelope.decode(on.event)
        for attempt in itertools.count(1):
            try:
                await self._run(on, Delivery(event, envelope, on.consumer(self.group), self.db, behind))
            except AlreadyHandled:
                return "repeated"
            except (Behind, HandlerTimeout):
                raise
            except Exception as error:
                if attempt == ATTEMPTS:
                    raise
                if not isinstance(error, Unavailable):
                    log.exception("event_failed", attempt=attempt, consumer=on.consumer(self.group))
            else:
                return "done"
            await asyncio.sleep(delay(attempt))
        raise AssertionError("unreachable")

    async def _run(self, on: On[Any], delivery: Delivery[Any]) -> None:
        try:
            async with asyncio.timeout(self._handler_seconds) as delivery.bound:
                await on.handle(delivery)
        except TimeoutError as error:
            if delivery.bound is None or not delivery.bound.expired():
                raise
            metrics.child(TIMEOUTS, on.consumer(self.group), on.event.TYPE).inc()
            raise HandlerTimeout(f"took longer than {self._handler_seconds:g} s") from error

    async def _park(self, on: On[Any], envelope: Envelope, fault: Fault | None = None, seconds: float = 0) -> str:
        async with self.db.transaction() as tx:
            await parking.park(tx, self.group, envelope, ordered=on.ordered, fault=fault, seconds=seconds)
        log.warning("event_parked", consumer=self.group, reason=fault.reason if fault else "order")
        return "parked"

    async def _bury(self, envelope: Envelope, ordered: bool, fault: Fault) -> str:
        async with self.db.transaction() as tx:
            await parking.bury(tx, self.group, envelope, ordered, fault)
        log.error("event_buried", consumer=self.group, event_id=str(envelope.id), reason=fault.reason)
        return "dead"

    @contextmanager
    def _observed(self, on: On[Any], envelope: Envelope) -> Iterator[None]:
        name = on.consumer(self.group)
        parent = tracing.extract(envelope.headers)
        with (
            structlog.contextvars.bound_contextvars(event_id=str(envelope.id), event_type=envelope.type),
            consistency.tracked(envelope.headers.get(CONSISTENCY)),
            tracing.span(f"process {envelope.topic}", kind=tracing.SpanKind.CONSUMER, parent=parent, consumer=name),
            metrics.child(DURATION, name, envelope.type).time(),
        ):
            yield


def _attempts(error: Exception) -> int:
    return 1 if isinstance(error, HandlerTimeout) else ATTEMPTS


async def clean_up(db: Database) -> int:
    """Forget events handled long before any broker would deliver them again; returns how many."""
    return await sweep(db, "inbox", "handled_at", _KEPT)


async def clean_up_failed(db: Database) -> int:
    """Bury parked events whose group is gone, and forget dead letters that nobody wanted; returns how many."""
    moved = 0
    while True:
        async with db.transaction() as tx:
            buried = await parking.bury_abandoned(tx, _BURIED_AT_ONCE)
        moved += buried
        if buried < _BURIED_AT_ONCE:
            return moved + await sweep(db, "dead_letters", "died_at", _DEAD_KEPT)


def delay(attempt: int) -> float:
    """Seconds to wait after the given attempt (1 is the first): exponential, with full jitter in its upper half."""
    longest: float = min(_FIRST_DELAY_SECONDS * 4 ** (attempt - 1), _LONGEST_DELAY_SECONDS)
    return longest * random.uniform(0.5, 1)  # noqa: S311 - spreading load, not secrets
