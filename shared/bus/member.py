"""A member of a consumer group: fetch, let the consumer handle by key, commit what is done without a gap.

Each key is a lane: one event at a time, and keys side by side. A partition's offset is committed up to the first event
that is not done yet, so a slow key holds back no other, and a crash repeats events but loses none. From a partition
with enough in hand nothing is fetched. When partitions are taken away, or at the stop, what has begun is finished and
committed and the rest is left to the next owner.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from shared.bus.fetching import FetchingConsumer
from shared.bus.lag import Lag
from shared.bus.partition import Partition
from shared.consumer import Consumer, delay
from shared.errors import Unavailable
from shared.events import Envelope, InvalidEnvelope, origin
from shared.logs import get_logger
from shared.records import Fetched
from shared.settings import DataSettings

log = get_logger()

CLOSE_SECONDS = 5.0
_ENSURE_SECONDS = 10.0
_REBALANCE_SECONDS = 60.0
_POLL_MS = 500
_BUSY_POLL_MS = 20
_FETCH_WAIT_MS = 100  # a partition that ran dry meanwhile waits too, for the client has one fetch a broker under way
_COMMIT_SECONDS = 0.05
_BATCH = 2000
_FETCHED = 6000
_SMALL_BATCH = 16
_EVER_MS = 2**31 - 1
_LAG_SECONDS = 5.0
_PATIENCE_SECONDS = 60.0  # for one event, which may be all that is down: a statement that always takes too long


class Stalled(Exception):
    """The broker has events for this member, who has nothing in hand and gets none."""


class Member:
    def __init__(
        self,
        settings: DataSettings,
        consumer: Consumer,
        concurrency: int,
        ensure: Callable[[set[str]], Awaitable[Mapping[str, Exception]]],
    ) -> None:
        """`concurrency`: how many events are handled at a time. `ensure` makes topics that are not there,
        and answers why it cannot."""
        self._settings = settings
        self._consumer = consumer
        self._concurrency = concurrency
        self._ensure = ensure
        self._stopping = asyncio.Event()
        self._joined = False

    def stop(self) -> bool:
        """Fetch nothing more. True when there is a membership to end, with what is in hand finished and committed."""
        self._stopping.set()
        return self._joined

    async def check(self) -> None:
        if not self._joined:
            raise Unavailable("not in the consumer group")

    async def run(self) -> None:
        """Be a member until stopped; a membership that fails or stalls is followed by another."""
        attempt = 0
        while not self._stopping.is_set():
            try:
                attempt += 1
                async with asyncio.timeout(_ENSURE_SECONDS):
                    faults = await self._ensure(set(self._consumer.topics))
                for fault in faults.values():
                    raise fault
                async with AsyncExitStack() as stack:
                    kafka = self._client()
                    stack.push_async_callback(stopped, kafka.stop)
                    membership = _Membership(self._consumer, self._concurrency, kafka, self._settings)
                    kafka.subscribe(self._consumer.topics, listener=membership)
                    async with asyncio.timeout(_REBALANCE_SECONDS + CLOSE_SECONDS):
                        await kafka.start()
                    self._joined = True
                    stack.callback(setattr, self, "_joined", False)
                    attempt = 0
                    await membership.work(self._stopping)
            except Exception as error:  # noqa: BLE001 - a consumer that ends in silence is the worst of failures
                log.warning("consumer_interrupted", consumer=self._consumer.group, error=repr(error))
                with suppress(TimeoutError):
                    async with asyncio.timeout(delay(min(max(attempt, 1), 4))):
                        await self._stopping.wait()

    def _client(self) -> Any:
        session_ms = int(self._settings.kafka_session_timeout_seconds * 1000)
        return FetchingConsumer(
            bootstrap_servers=list(self._settings.kafka_bootstrap),
            group_id=self._consumer.group,
            # A member that comes back under its name within the session takes its partitions over at once.
            group_instance_id=self._settings.kafka_instance_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=session_ms,
            heartbeat_interval_ms=session_ms // 5,
            rebalance_timeout_ms=int(_REBALANCE_SECONDS * 1000),
            # It is not idle when it does not fetch: it has enough in hand, perhaps for as long as the database is away.
            max_poll_interval_ms=_EVER_MS,
            fetch_max_wait_ms=_FETCH_WAIT_MS,
        )


class _Membership(ConsumerRebalanceListener):  # type: ignore[misc]
    """From joining the group to leaving it."""

    def __init__(self, consumer: Consumer, concurrency: int, kafka: Any, settings: DataSettings) -> None:
        self._consumer = consumer
        self._kafka = kafka
        self._settings = settings
        self._gate = asyncio.Semaphore(concurrency)
        self._partitions: dict[Any, Partition] = {}
        self._progressed = asyncio.Event()  # for the commits
        self._finished = asyncio.Event()  # for the fetching
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def work(self, stopping: asyncio.Event) -> None:
        """Until `stopping`, or raise what ended it; in both cases what has begun is finished first."""
        parts = [
            asyncio.create_task(part) for part in (self._fetch(stopping), self._keep_committing(), self._keep_watch())
        ]
        try:
            ended, _ = await asyncio.wait([*parts, self._failed], return_when=asyncio.FIRST_COMPLETED)
            for part in ended:
                part.result()
        finally:
            for part in (*parts, self._failed):
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            await self._hand_back()

    # No lock is shared with the fetching: these are called by the client while it may wait in `getmany`.

    async def on_partitions_revoked(self, _revoked: Any) -> None:
        await self._hand_back()

    async def on_partitions_assigned(self, assigned: Any) -> None:
        self._partitions = {partition: Partition() for partition in assigned}
        log.info("partitions_assigned", consumer=self._consumer.group, partitions=len(self._partitions))

    async def _hand_back(self) -> None:
        """Finish what has begun, for a bounded time, and commit."""
        partitions, self._partitions = self._partitions, {}
        for partition in partitions.values():
            partition.closing.set()
        tasks = [task for partition in partitions.values() for task in partition.tasks]
        if tasks:
            try:
                await asyncio.wait(tasks, timeout=self._settings.shutdown_seconds)
            finally:
                for task in tasks:  # its transaction is undone: the next owner starts it anew
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._commit(partitions)

    async def _fetch(self, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            before = self._partitions
            # Not `pause`: of a paused partition the client throws away what it has fetched and not yet handed over.
            hungry = [key for key, partition in before.items() if partition.is_hungry()]
            if before and not hungry:
                await self._wait_for_progress()
                continue
            timeout = _POLL_MS if len(hungry) == len(before) else _BUSY_POLL_MS
            batches = await self._kafka.getmany(*hungry, timeout_ms=timeout, max_records=_FETCHED)
            if before is not self._partitions or not batches.keys() <= before.keys():
                await self._refetch(batches)  # a rebalance came between
                continue
            for key, records in batches.items():
                self._take(before[key], records)

    async def _wait_for_progress(self) -> None:
        self._finished.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(_POLL_MS / 1000):
                await self._finished.wait()

    async def _refetch(self, batches: Any) -> None:
        """Let what was fetched go and go back to what is committed; nothing since the rebalance is in hand yet."""
        for key in batches:
            if key in self._kafka.assignment():
                with suppress(IllegalStateError):
                    offset = await self._kafka.committed(key)
                    if offset is None:
                        await self._kafka.seek_to_beginning(key)
                    else:
                        self._kafka.seek(key, offset)

    def _take(self, partition: Partition, records: list[Fetched]) -> None:
        partition.take(records)
        if self._consumer.takes_batches:
            partition.queue.extend(records)
            if not partition.in_batches:
                partition.in_batches = True
                self._start(partition, self._run_batches(partition))
            return
        for record in records:
            if (lane := partition.lanes.get(record.key)) is None:
                partition.lanes[record.key] = lane = deque()
                self._start(partition, self._run_lane(partition, record.key, lane))
            lane.append(record)

    def _start(self, partition: Partition, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        partition.tasks.add(task)
        task.add_done_callback(partial(self._ended, partition))

    def _ended(self, partition: Partition, task: asyncio.Task[None]) -> None:
        partition.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._failed.done():
            self._failed.set_exception(error)

    async def _run_lane(self, partition: Partition, key: bytes | None, lane: deque[Fetched]) -> None:
        while lane:
            async with self._gate:
                if not await self._handle(partition, lane.popleft()):
                    return
        partition.lanes.pop(key, None)

    async def _run_batches(self, partition: Partition) -> None:
        limit = _BATCH
        while partition.queue and not partition.closing.is_set():
            records = [partition.queue.popleft() for _ in range(min(limit, len(partition.queue)))]
            async with self._gate:
                apart = await self._handle_batch(partition, records)
            if len(apart) == len(records) > _SMALL_BATCH:  # look for the one at fault in smaller ones
                partition.queue.extendleft(reversed(records))
                limit = max(_SMALL_BATCH, len(records) // 8)
                continue
            limit = min(limit * 2, _BATCH)
            lanes: dict[bytes | None, deque[Fetched]] = {}
            for record in apart:
                lanes.setdefault(record.key, deque()).append(record)
            await asyncio.gather(*(self._run_lane(partition, key, lane) for key, lane in lanes.items()))
        partition.in_batches = False

    async def _handle_batch(self, partition: Partition, records: list[Fetched]) -> list[Fetched]:
        """Returns those that are to be handled one by one; the others are done."""
        try:
            left = await self._consumer.handle_batch(records)
        except Unavailable:  # one by one they wait for what is down
            return records
        apart = [records[position] for position in left]
        if left:
            keep = set(left)
            records = [record for position, record in enumerate(records) if position not in keep]
        self._finish(partition, records)
        return apart

    async def _handle(self, partition: Partition, record: Fetched) -> bool:
        """False when the partition is given back before the event is done."""
        attempt = 0
        until = time.monotonic() + _PATIENCE_SECONDS
        while not partition.closing.is_set():
            attempt += 1
            try:
                await self._handle_or_bury(record, patient=time.monotonic() < until)
            except Exception as error:  # noqa: BLE001 - a part is down: waiting keeps the order and loses nothing
                log.warning("event_waits", consumer=self._consumer.group, error=repr(error))
                with suppress(TimeoutError):
                    async with asyncio.timeout(delay(min(attempt, 4))):
                        await partition.closing.wait()
            else:
                self._finish(partition, [record])
                return True
        return False

    async def _handle_or_bury(self, record: Fetched, *, patient: bool) -> None:
        try:
            envelope = Envelope.from_record(record)
        except InvalidEnvelope as error:
            await self._consumer.bury_unreadable(record, origin(record), str(error))
        else:
            await self._consumer.handle(envelope, patient=patient)

    def _finish(self, partition: Partition, records: list[Fetched]) -> None:
        partition.finish(records)
        self._progressed.set()
        self._finished.set()

    async def _keep_committing(self) -> None:
        while True:
            await self._progressed.wait()
            self._progressed.clear()
            if not await self._commit(self._partitions):
                self._progressed.set()
            await asyncio.sleep(_COMMIT_SECONDS)

    async def _commit(self, partitions: dict[Any, Partition]) -> bool:
        """False when it is to be tried again."""
        moved = {k: p.progress.position for k, p in partitions.items() if p.progress.position != p.committed}
        if not moved:
            return True
        try:
            await self._kafka.commit(moved)
        except (IllegalStateError, CommitFailedError):
            return True  # taken away: who has the partition now meets the inbox
        except KafkaError as error:
            log.warning("commit_failed", consumer=self._consumer.group, error=repr(error))
            return False
        for key, position in moved.items():
            partitions[key].committed = position
        return True

    async def _keep_watch(self) -> None:
        """Measure the lag, for ever; raise `Stalled` when there is some and nothing moves."""
        stall = self._settings.kafka_stall_seconds
        async with Lag.opened(self._consumer.group, self._consumer.topics, self._settings) as lag:
            while True:
                await asyncio.sleep(min(_LAG_SECONDS, stall / 4))
                behind = await lag.measure()
                now = time.monotonic()
                for key, partition in self._partitions.items():
                    if len(partition.progress) or not behind.get(key):
                        partition.moved_at = now
                    elif now - partition.moved_at > stall:
                        raise Stalled(f"{key.topic}/{key.partition}: {behind[key]} events wait")


async def stopped(stop: Callable[[], Awaitable[object]]) -> bool:
    """Stop a client. It can hang while the broker is away; what was not sent is in the outbox still. False then."""
    with suppress(TimeoutError, OSError, KafkaError):
        async with asyncio.timeout(CLOSE_SECONDS):
            await stop()
            return True
    return False
