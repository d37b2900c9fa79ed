"""A Kafka-protocol broker: sending what the relay hands over, and membership of consumer groups."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import lru_cache

import aiokafka
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    BrokerResponseError,
    InvalidProducerEpoch,
    InvalidProducerIdMapping,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    OutOfOrderSequenceNumber,
    UnknownProducerId,
    for_code,
)
from aiokafka.partitioner import murmur2

from shared.bus.member import CLOSE_SECONDS, Member, stopped
from shared.consumer import Consumer
from shared.errors import Unavailable
from shared.events import Message
from shared.health import Health
from shared.logs import get_logger
from shared.records import Record, RecordBatch, sized
from shared.settings import DataSettings

log = get_logger()

_PUBLISH_SECONDS = 10.0
_HANGING_SECONDS = 20.0  # for so long nothing is sent to a partition that gave no answer: it may have no leader
_BATCH_BYTES = 512 * 1024
_LARGEST_BYTES = 1_000_000  # a broker takes 1 MiB unless told otherwise, key and headers included
_TOPIC_EXISTS = 36
# Not an answer to what was sent: this producer's count of it and the broker's have come apart.
_SEQUENCE_LOST = (OutOfOrderSequenceNumber, InvalidProducerEpoch, InvalidProducerIdMapping, UnknownProducerId)


@lru_cache(maxsize=2**14)
def _placed(key: str) -> tuple[int, bytes]:
    """The hash by which every Kafka client places a key, and the key as in a record. Remembered, for the client's hash
    is Python, and dearer than all the rest."""
    encoded = key.encode()
    return int(murmur2(encoded)) & 0x7FFFFFFF, sized(encoded)


class KafkaBus:
    """Producer and consumers on a Kafka-protocol broker. Open it with `KafkaBus.opened`."""

    batch = 4000

    def __init__(self, settings: DataSettings, health: Health) -> None:
        self._settings = settings
        self._health = health
        self._producers: dict[bool, aiokafka.AIOKafkaProducer] = {}
        self._producer_lock = asyncio.Lock()
        self._suspects: set[str] = set()  # keys of batches that the broker refused
        self._hanging: dict[tuple[str, int], float] = {}  # partitions, and until when they are let be
        self._topics: set[str] = set()

    @classmethod
    @asynccontextmanager
    async def opened(cls, settings: DataSettings, health: Health) -> "AsyncIterator[KafkaBus]":
        """The broker need not be there: events wait in the outbox until it is."""
        bus = cls(settings, health)
        try:
            yield bus
        finally:
            await bus._drop_producers()

    async def publish(self, messages: list[Message]) -> list[Exception | None]:
        """What partitions acknowledge stands though others give no answer. Raises `Unavailable` when none does."""
        outcomes: list[Exception | None] = [Unavailable("no answer")] * len(messages)
        try:
            async with asyncio.timeout(_PUBLISH_SECONDS):
                topics = {message.topic for message in messages}
                faults = await self.ensure(topics)
                for position, message in enumerate(messages) if faults else ():
                    outcomes[position] = faults.get(message.topic, outcomes[position])
                await self._send_all(messages, topics - faults.keys(), outcomes)
        except (TimeoutError, OSError, KafkaError) as error:
            # A producer that lost its broker may hang or answer OutOfOrderSequence for ever: make it anew.
            await self._drop_producers()
            self._topics.clear()  # one may have been deleted
            if None not in outcomes:
                self._hanging.clear()
                raise Unavailable("the broker is away") from error
            log.warning("not_all_answered", hanging=[f"{topic}/{number}" for topic, number in self._hanging])
        return outcomes

    async def _send_all(self, messages: list[Message], topics: set[str], outcomes: list[Exception | None]) -> None:
        """Batches for each partition, side by side; suspects one by one, by a producer that does not count them."""
        producer = await self._ready_producer(counting=True)
        places = {topic: [list[Record]() for _ in await producer.partitions_for(topic)] for topic in topics}
        suspects: dict[tuple[str, int], list[Record]] = {}
        too_large: dict[str, Exception] = {}
        now = time.monotonic()
        self._hanging = {place: until for place, until in self._hanging.items() if until > now}
        for position, message in enumerate(messages):
            key, data = message.key, message.data
            if (partitions := places.get(message.topic)) is None:
                continue
            if len(data) > _LARGEST_BYTES or key in too_large:
                outcomes[position] = too_large.setdefault(key, MessageSizeTooLargeError(f"{len(data)} bytes"))
                continue
            digest, encoded = _placed(key)
            partition = digest % len(partitions)
            if self._hanging and (message.topic, partition) in self._hanging:
                continue
            if key in self._suspects:
                inside = suspects.setdefault((message.topic, partition), [])
            else:
                inside = partitions[partition]
            inside.append((encoded, data, message.headers, position))
        answers = await asyncio.gather(
            *(
                self._send(producer, topic, partition, records, messages, outcomes)
                for topic, partitions in places.items()
                for partition, records in enumerate(partitions)
                if records
            ),
            *(self._send_one_by_one(*place, records, messages, outcomes) for place, records in suspects.items()),
            return_exceptions=True,  # the others go on
        )
        for answer in answers:
            if answer is not None:
                raise answer

    async def _send(
        self,
        producer: aiokafka.AIOKafkaProducer,
        topic: str,
        partition: int,
        records: list[Record],
        messages: list[Message],
        outcomes: list[Exception | None],
    ) -> None:
        """The events of one partition: each batch after the one before it is acknowledged, and none after a refusal."""
        while records:
            batch = RecordBatch(records, _BATCH_BYTES)
            refusal = await self._refusal(producer, batch, topic, partition)
            if refusal is not None:
                break
            for record in records[: batch.record_count()]:
                outcomes[record[-1]] = None
            records = records[batch.record_count() :]
        else:
            return
        # One event of the batch is at fault, and which is found one by one. The broker goes on waiting for the sequence
        # numbers of what it refused; those of a new producer begin anew.
        inside = records[: batch.record_count()]
        log.warning("batch_refused", topic=topic, events=len(inside), error=repr(refusal))
        self._suspects.update(messages[position].key for *_, position in inside)
        await self._drop_producers()
        for *_, position in records:
            outcomes[position] = refusal

    async def _send_one_by_one(
        self,
        topic: str,
        partition: int,
        records: list[Record],
        messages: list[Message],
        outcomes: list[Exception | None],
    ) -> None:
        """A refusal stops its key only; a key that meets none is no suspect any more.

        For half of the time there is: past all of it nobody would learn what the broker has, and all would go again.
        """
        producer = await self._ready_producer(counting=False)
        refused: dict[str, Exception | None] = {}
        until = time.monotonic() + _PUBLISH_SECONDS / 2
        for record in records:
            position = record[-1]
            key = messages[position].key
            if time.monotonic() > until:
                refused[key] = Unavailable("its turn comes later")
            elif refused.get(key) is None:
                batch = RecordBatch([record], _BATCH_BYTES)
                refused[key] = await self._refusal(producer, batch, topic, partition)
            outcomes[position] = refused[key]
        self._suspects.difference_update(key for key, refusal in refused.items() if refusal is None)

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

    async def ensure(self, topics: set[str]) -> dict[str, Exception]:
        """Make those of `topics` that are not there. Answers why some cannot be made."""
        missing = topics - self._topics
        if not missing:
            return {}
        admin = AIOKafkaAdminClient(bootstrap_servers=list(self._settings.kafka_bootstrap))
        try:
            await admin.start()
            response = await admin.create_topics(
                [
                    NewTopic(topic, self._settings.kafka_partitions, self._settings.kafka_replication)
                    for topic in sorted(missing)
                ]
            )
            faults = {
                topic: for_code(code)(topic)
                for topic, code, *_ in response.topic_errors
                if code not in (0, _TOPIC_EXISTS)
            }
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await admin.close()
        self._topics |= missing - faults.keys()
        return faults

    async def _ready_producer(self, *, counting: bool) -> aiokafka.AIOKafkaProducer:
        """`counting`: with the sequence numbers by which the broker knows what it has already (idempotence)."""
        async with self._producer_lock:
            if counting not in self._producers:
                producer = aiokafka.AIOKafkaProducer(
                    bootstrap_servers=list(self._settings.kafka_bootstrap),
                    acks="all",
                    enable_idempotence=counting and self._settings.kafka_idempotence,
                    request_timeout_ms=int(_PUBLISH_SECONDS * 1000),
                )
                try:
                    await producer.start()
                except BaseException:
                    await _close(producer)
                    raise
                self._producers[counting] = producer
            return self._producers[counting]

    async def _drop_producers(self) -> None:
        producers, self._producers = self._producers, {}
        await asyncio.gather(*(_close(producer) for producer in producers.values()))

    async def _refusal(
        self, producer: aiokafka.AIOKafkaProducer, batch: RecordBatch, topic: str, partition: int
    ) -> Exception | None:
        """Send, and wait for the broker's answer. Raises when there is none, or none that holds."""
        try:
            await (await producer.send_batch(batch, topic, partition=partition))
        except (asyncio.CancelledError, KafkaTimeoutError):
            self._hanging[topic, partition] = time.monotonic() + _HANGING_SECONDS
            raise
        except BrokerResponseError as error:
            if error.retriable or isinstance(error, _SEQUENCE_LOST):
                raise
            refusal: Exception = error
            return refusal
        return None


async def _close(producer: aiokafka.AIOKafkaProducer) -> None:
    """Also of what hangs nothing stays: `stop` waits for what is not sent yet, and does nothing when called again."""
    if not await stopped(producer.stop):
        await asyncio.gather(stopped(producer._sender.close), stopped(producer.client.close))
