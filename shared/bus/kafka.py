"""A Kafka-protocol broker: sending what the relay hands over, and membership of consumer groups."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from typing import Any

import aiokafka
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, for_code
from aiokafka.partitioner import murmur2

from shared.bus.member import CLOSE_SECONDS, Member, stopped
from shared.consumer import Consumer
from shared.errors import Unavailable
from shared.events import Envelope
from shared.health import Health
from shared.logs import get_logger
from shared.settings import DataSettings

log = get_logger()

_PUBLISH_SECONDS = 10.0
_BATCH_BYTES = 256 * 1024
_TOPIC_EXISTS = 36


@lru_cache(maxsize=2**14)
def _hash(key: bytes) -> int:
    return int(murmur2(key)) & 0x7FFFFFFF


def _partition(key: bytes, partitions: list[int], _available: list[int]) -> int:
    """As every Kafka client does it. The client's own hash is Python, and half of what sending costs."""
    return partitions[_hash(key) % len(partitions)]


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
                await self.ensure({envelope.topic for envelope in envelopes})
                producer = await self._ready_producer()
                return await self._send_all(producer, envelopes)
        except (TimeoutError, OSError, KafkaError) as error:
            # A producer that lost its broker may hang or answer OutOfOrderSequence for ever: make it anew.
            await self._drop_producer()
            raise Unavailable("the broker is away") from error

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

    @asynccontextmanager
    async def consuming(self, consumer: Consumer, concurrency: int) -> AsyncIterator[None]:
        """Feed `consumer` from its topics, at most `concurrency` events at a time, one at a time for each key."""
        member = Member(self._settings, consumer, concurrency, self.ensure)
        self._health.add(f"{consumer.group}-consumer", member.check)
        task = asyncio.create_task(member.run(), name=f"{consumer.group}-consumer")
        always = asyncio.Event()
        always.set()
        try:
            async with consumer.retrying(always, self._settings.shutdown_seconds):
                yield
        finally:
            if member.stop():
                await asyncio.wait([task], timeout=self._settings.shutdown_seconds)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def ensure(self, topics: set[str]) -> None:
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
                async with asyncio.timeout(CLOSE_SECONDS):
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
                    max_batch_size=_BATCH_BYTES,
                    partitioner=_partition,
                )
                try:
                    await producer.start()
                except BaseException:
                    await stopped(producer.stop)
                    raise
                self._producer = producer
            return self._producer

    async def _drop_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await stopped(producer.stop)
