"""The two buses: Kafka, and `BUS=inline`, which hands events to the handlers of this process.

Both take events from the same outbox and give them to the same `Consumer`, so moving from one to the other is
configuration. Inline delivers while the relay holds the row: what was not handled stays in the outbox.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import aiokafka
import msgspec
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import IllegalStateError, KafkaError, for_code

from shared.consumer import Consumer, delay
from shared.errors import Unavailable
from shared.events import Envelope, InvalidEnvelope, in_order_of_key
from shared.health import Health
from shared.logs import get_logger
from shared.settings import DataSettings

log = get_logger()

_PUBLISH_SECONDS = 10.0
_CLOSE_SECONDS = 5.0
_CONNECT_SECONDS = 10.0
_POLL_MS = 500
_TOPIC_EXISTS = 36
_REASON_LENGTH = 1000


class InlineBus:
    """Delivers in this process. `open_for_delivery` is called once every consumer is registered."""

    batch = 8  # a handler may take seconds

    def __init__(self) -> None:
        self._consumers: list[Consumer] = []
        self._open = asyncio.Event()

    @asynccontextmanager
    async def consuming(self, consumer: Consumer, _concurrency: int) -> AsyncIterator[None]:
        self._consumers.append(consumer)
        try:
            yield
        finally:
            self._consumers.remove(consumer)

    def open_for_delivery(self) -> None:
        self._open.set()

    def close_for_delivery(self) -> None:
        """From here on events stay in the outbox: their consumers are about to go."""
        self._open.clear()

    async def publish(self, envelopes: list[Envelope]) -> list[Exception | None]:
        outcomes: list[Exception | None] = [Unavailable("not delivering")] * len(envelopes)
        if self._open.is_set():
            lanes = in_order_of_key(envelopes).values()
            await asyncio.gather(*(self._deliver_lane(envelopes, lane, outcomes) for lane in lanes))
        return outcomes

    async def _deliver_lane(self, envelopes: list[Envelope], lane: list[int], outcomes: list[Exception | None]) -> None:
        for position in lane:
            try:
                for consumer in self._consumers:
                    await consumer.handle(envelopes[position])
            except Exception as error:  # noqa: BLE001 - the outcome is handed to the relay, which keeps the row
                outcomes[position] = error
                return
            outcomes[position] = None

    async def bury(self, consumer: Consumer, envelope: Envelope, reason: str) -> None:
        async with consumer.db.transaction() as tx:
            await tx.execute(
                "INSERT INTO dead_letters (consumer, event_id, type, reason, headers, data)"
                " VALUES ($1, $2, $3, $4, $5::text::jsonb, $6) ON CONFLICT DO NOTHING",
                consumer.group,
                envelope.id,
                envelope.type,
                reason[:_REASON_LENGTH],
                msgspec.json.encode(envelope.headers).decode(),
                envelope.data,
            )


class KafkaBus:
    """Producer and consumers on a Kafka-protocol broker. Open it with `KafkaBus.opened`."""

    batch = 500

    def __init__(self, settings: DataSettings, health: Health) -> None:
        self._settings = settings
        self._health = health
        self._producer: aiokafka.AIOKafkaProducer | None = None
        self._producer_lock = asyncio.Lock()
        self._topics: set[str] = set()

    @classmethod
    @asynccontextmanager
    async def opened(cls, settings: DataSettings, health: Health) -> "AsyncIterator[KafkaBus]":
        """The broker need not be there: events wait in the outbox until it is."""
        bus = cls(settings, health)
        try:
            yield bus
        finally:
            await bus._drop_producer()

    async def publish(self, envelopes: list[Envelope]) -> list[Exception | None]:
        try:
            async with asyncio.timeout(_PUBLISH_SECONDS):
                await self._ensure({envelope.topic for envelope in envelopes})
                producer = await self._ready_producer()
                return await self._send_all(producer, envelopes)
        except (TimeoutError, OSError, KafkaError) as error:
            # A producer that lost its broker may hang or answer OutOfOrderSequence for ever: make it anew.
            await self._drop_producer()
            return [error] * len(envelopes)

    @staticmethod
    async def _send_all(producer: aiokafka.AIOKafkaProducer, envelopes: list[Envelope]) -> list[Exception | None]:
        failed: dict[str, Exception] = {}
        sent: list[asyncio.Future[Any] | Exception] = []
        for envelope in envelopes:
            if envelope.key in failed:
                sent.append(failed[envelope.key])
                continue
            key, value, headers = envelope.to_record()
            try:
                sent.append(await producer.send(envelope.topic, value, key=key, headers=headers))
            except KafkaError as error:  # this one cannot go at all, say it is too large
                failed[envelope.key] = error
                sent.append(error)
        await producer.flush()
        acknowledged = await asyncio.gather(*(s for s in sent if isinstance(s, asyncio.Future)), return_exceptions=True)
        answers = iter(acknowledged)
        outcomes: list[Exception | None] = []
        for item in sent:
            answer = item if isinstance(item, Exception) else next(answers)
            outcomes.append(answer if isinstance(answer, Exception) else None)
        return outcomes

    async def bury(self, consumer: Consumer, envelope: Envelope, reason: str) -> None:
        key, value, headers = envelope.to_record()
        await self._bury_raw(f"{envelope.topic}.{consumer.group}.dead", key, value, headers, reason)

    async def _bury_raw(
        self, topic: str, key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes]], reason: str
    ) -> None:
        try:
            async with asyncio.timeout(_PUBLISH_SECONDS):
                await self._ensure({topic})
                producer = await self._ready_producer()
                why = ("reason", reason[:_REASON_LENGTH].encode())
                await producer.send_and_wait(topic, value, key=key, headers=[*headers, why])
        except (TimeoutError, OSError, KafkaError) as error:
            await self._drop_producer()
            raise Unavailable("the broker does not take dead letters") from error

    @asynccontextmanager
    async def consuming(self, consumer: Consumer, concurrency: int) -> AsyncIterator[None]:
        """Feed `consumer` from its topics, at most `concurrency` events at a time, one at a time for each key."""
        source = _KafkaSource(self, self._settings, consumer, concurrency)
        self._health.add(f"{consumer.group}-consumer", source.check)
        task = asyncio.create_task(source.run(), name=f"{consumer.group}-consumer")
        try:
            yield
        finally:
            if source.stop():
                await asyncio.wait([task], timeout=self._settings.shutdown_seconds)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _ensure(self, topics: set[str]) -> None:
        missing = topics - self._topics
        if not missing:
            return
        admin = AIOKafkaAdminClient(bootstrap_servers=list(self._settings.kafka_bootstrap))
        try:
            await admin.start()
            response = await admin.create_topics(
                [
                    NewTopic(topic, self._settings.kafka_partitions, self._settings.kafka_replication)
                    for topic in sorted(missing)
                ]
            )
            for topic, code, *_ in response.topic_errors:
                if code not in (0, _TOPIC_EXISTS):
                    raise for_code(code)(topic)
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await admin.close()
        self._topics |= missing

    async def _ready_producer(self) -> aiokafka.AIOKafkaProducer:
        async with self._producer_lock:
            if self._producer is None:
                producer = aiokafka.AIOKafkaProducer(
                    bootstrap_servers=list(self._settings.kafka_bootstrap),
                    acks="all",
                    enable_idempotence=self._settings.kafka_idempotence,
                    request_timeout_ms=int(_PUBLISH_SECONDS * 1000),
                )
                try:
                    await producer.start()
                except BaseException:
                    await _stop(producer.stop)
                    raise
                self._producer = producer
            return self._producer

    async def _drop_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await _stop(producer.stop)


class _KafkaSource:
    """One member of a consumer group: fetch, let the consumer handle, commit, again."""

    def __init__(self, bus: KafkaBus, settings: DataSettings, consumer: Consumer, concurrency: int) -> None:
        self._bus = bus
        self._settings = settings
        self._consumer = consumer
        self._concurrency = concurrency
        self._stopping = asyncio.Event()
        self._joined = False
        self._busy = False

    def stop(self) -> bool:
        """Fetch nothing more. True when events are in hand, which are to be finished and committed first."""
        self._stopping.set()
        return self._busy

    async def check(self) -> None:
        if not self._joined:
            raise Unavailable("not in the consumer group")

    async def run(self) -> None:
        attempt = 0
        while not self._stopping.is_set():
            try:
                attempt += 1
                async with asyncio.timeout(_CONNECT_SECONDS):
                    await self._bus._ensure(set(self._consumer.topics))
                await self._consume()
                attempt = 0
            except (TimeoutError, OSError, KafkaError, Unavailable) as error:
                log.warning("consumer_interrupted", consumer=self._consumer.group, error=repr(error))
                with suppress(TimeoutError):
                    async with asyncio.timeout(delay(min(attempt, 4))):
                        await self._stopping.wait()

    async def _consume(self) -> None:
        kafka = aiokafka.AIOKafkaConsumer(
            *self._consumer.topics,
            bootstrap_servers=list(self._settings.kafka_bootstrap),
            group_id=self._consumer.group,
            # A member that comes back under its name within the session takes its partitions over at once.
            group_instance_id=self._settings.kafka_instance_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=int(self._settings.kafka_session_timeout_seconds * 1000),
            heartbeat_interval_ms=int(self._settings.kafka_session_timeout_seconds * 1000 / 5),
            rebalance_timeout_ms=60_000,
            max_poll_interval_ms=300_000,
            fetch_max_wait_ms=_POLL_MS,
        )
        async with AsyncExitStack() as stack:
            stack.push_async_callback(_stop, kafka.stop)
            await kafka.start()
            stack.callback(setattr, self, "_joined", False)
            while not self._stopping.is_set():
                batches = await kafka.getmany(timeout_ms=_POLL_MS, max_records=self._concurrency * 4)
                self._joined = True
                if not batches:
                    continue
                self._busy = True
                try:
                    await self._handle_all([record for batch in batches.values() for record in batch])
                    offsets = {partition: batch[-1].offset + 1 for partition, batch in batches.items()}
                    with suppress(IllegalStateError):  # taken away: who has the partition now meets the inbox
                        await kafka.commit(offsets)
                finally:
                    self._busy = False

    async def _handle_all(self, records: list[Any]) -> None:
        lanes: dict[tuple[str, bytes | None], list[Any]] = {}
        for record in records:
            lanes.setdefault((record.topic, record.key), []).append(record)
        gate = asyncio.Semaphore(self._concurrency)

        async def handle(lane: list[Any]) -> None:
            async with gate:
                for record in lane:
                    await self._handle(record)

        async with asyncio.TaskGroup() as group:
            for lane in lanes.values():
                group.create_task(handle(lane))

    async def _handle(self, record: Any) -> None:
        for attempt in itertools.count(1):
            try:
                return await self._handle_or_bury(record)
            except Unavailable as error:
                # A part is down: waiting keeps the order and loses nothing. Stopping leaves the rest uncommitted.
                log.warning("event_waits", consumer=self._consumer.group, error=str(error))
                await asyncio.sleep(delay(min(attempt, 4)))
        return None

    async def _handle_or_bury(self, record: Any) -> None:
        try:
            envelope = Envelope.from_record(record)
        except InvalidEnvelope as error:
            log.error("event_buried", consumer=self._consumer.group, reason=str(error))
            topic = f"{record.topic}.{self._consumer.group}.dead"
            await self._bus._bury_raw(topic, record.key, record.value, list(record.headers), str(error))
        else:
            await self._consumer.handle(envelope)


async def _stop(stop: Callable[[], Any]) -> None:
    """Stopping can hang while the broker is away; what was not sent is in the outbox still."""
    with suppress(TimeoutError, OSError, KafkaError):
        async with asyncio.timeout(_CLOSE_SECONDS):
            await stop()
