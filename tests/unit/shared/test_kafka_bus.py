"""What becomes of the events that the relay hands over, with a broker that answers what a test lets it answer."""

import asyncio
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import aiokafka
import pytest
import structlog
from aiokafka.admin import NewTopic
from aiokafka.errors import MessageSizeTooLargeError, TopicAuthorizationFailedError, UnknownTopicOrPartitionError
from aiokafka.record.default_records import DefaultRecordBatch

from shared.bus import kafka, member
from shared.bus.kafka import KafkaBus
from shared.errors import Unavailable
from shared.events import Message
from shared.health import Health
from shared.records import RecordBatch, encode_headers
from shared.settings import DataSettings
from shared.testing import Ticks


class Broker:
    """Also the producer and the administrator; a batch takes it `seconds` of its own time."""

    def __init__(self, partitions: int = 1) -> None:
        self.partitions = partitions
        self.ticks = Ticks()
        self.seconds = 0.0
        self.until = 0.0
        self.hanging: set[int] = set()
        self.asked: list[int] = []
        self.refused: set[bytes] = set()
        self.taken: list[bytes] = []
        self.codes: dict[str, int] = {}  # why a topic cannot be made
        self.topics: set[str] = set()

    async def create_topics(self, topics: list[NewTopic]) -> Any:
        self.topics |= {topic.name for topic in topics} - self.codes.keys()
        return SimpleNamespace(topic_errors=[(topic.name, self.codes.get(topic.name, 0), None) for topic in topics])

    async def partitions_for(self, topic: str) -> set[int]:
        if topic not in self.topics:
            raise UnknownTopicOrPartitionError(topic)
        return set(range(self.partitions))

    async def send_batch(self, batch: RecordBatch, _topic: str, *, partition: int) -> asyncio.Future[None]:
        self.asked.append(partition)
        self.ticks.move(self.seconds)
        if self.ticks() > self.until:
            raise TimeoutError
        answer = asyncio.get_running_loop().create_future()
        values = [record.value or b"" for record in DefaultRecordBatch(bytes(batch._build()))]
        if partition in self.hanging:
            return answer
        if self.refused & set(values):
            answer.set_exception(MessageSizeTooLargeError())
        else:
            self.taken += values
            answer.set_result(None)
        return answer

    async def start(self) -> None:
        pass

    stop = close = start


class Bus(KafkaBus):
    def __init__(self, broker: Broker) -> None:
        super().__init__(DataSettings(database_url="postgresql://"), Health())
        self._broker = broker

    async def publish(self, messages: list[Message]) -> list[Exception | None]:
        self._broker.until = self._broker.ticks() + kafka._PUBLISH_SECONDS
        return await super().publish(messages)

    async def _ready_producer(self, *, counting: bool) -> Any:
        return self._broker


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    broker = Broker()
    monkeypatch.setattr(kafka, "time", SimpleNamespace(monotonic=broker.ticks))
    monkeypatch.setattr(kafka, "AIOKafkaAdminClient", lambda **_: broker)
    return broker


def message(number: int, topic: str = "things") -> Message:
    return Message(topic, f"key-{number}", b"%d" % number, encode_headers([]))


async def test_more_suspects_than_there_is_time_for_go_a_part_at_a_time(broker: Broker) -> None:
    bus = Bus(broker)
    broker.refused, broker.seconds = {b"7"}, 1.0
    left = [message(number) for number in range(20)] + [message(19)]
    assert all(await bus.publish(left))
    for _ in range(5):
        outcomes = await bus.publish(left)
        late = [m for m, fault in zip(left, outcomes, strict=True) if isinstance(fault, Unavailable)]
        left = [m for m, fault in zip(left, outcomes, strict=True) if fault is not None]
        assert {m.key for m in late} <= bus._suspects
    assert left == [message(7)]
    assert bus._suspects == {"key-7"}
    assert broker.taken == [b"%d" % number for number in range(20) if number != 7] + [b"19"]


async def test_a_partition_without_an_answer_stops_its_own_events_only(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka, "_PUBLISH_SECONDS", 0.5)
    bus = Bus(broker)
    broker.partitions, broker.hanging = 6, {1}
    there = [message(number) for number in range(100)]
    outcomes = await bus.publish(there)
    left = [m for m, fault in zip(there, outcomes, strict=True) if fault is not None]
    assert 0 < len(left) < 100
    assert sorted(broker.taken) == sorted(m.data for m in there if m not in left)

    broker.asked.clear()  # it is let be for a while
    new = [message(number) for number in range(100, 150)]
    assert None in await bus.publish([*left, *new])
    assert 1 not in broker.asked

    broker.ticks.move(kafka._HANGING_SECONDS + 1)
    broker.hanging.clear()
    assert not any(await bus.publish(left))
    assert {m.data for m in there} <= set(broker.taken)
    assert len(broker.taken) == len(set(broker.taken))


async def test_when_no_partition_answers_the_broker_is_away(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka, "_PUBLISH_SECONDS", 0.1)
    bus = Bus(broker)
    broker.hanging = {0}
    with pytest.raises(Unavailable):
        await bus.publish([message(1)])
    broker.hanging.clear()
    monkeypatch.setattr(kafka, "_PUBLISH_SECONDS", 10.0)
    assert await bus.publish([message(1)]) == [None]


async def test_a_topic_that_cannot_be_made_stops_its_own_events_only(broker: Broker) -> None:
    bus = Bus(broker)
    broker.codes = {"others": TopicAuthorizationFailedError.errno}
    messages = [message(1), message(2, "others"), message(3)]
    for _ in range(2):
        first, second, third = await bus.publish(messages)
        assert first is third is None
        assert isinstance(second, TopicAuthorizationFailedError)
    broker.codes.clear()
    assert not any(await bus.publish(messages))


async def test_who_consumes_from_a_topic_that_cannot_be_made_is_told(broker: Broker) -> None:
    broker.codes = {"others": TopicAuthorizationFailedError.errno}
    asked = asyncio.Event()

    async def ensure(topics: set[str]) -> dict[str, Exception]:
        asked.set()
        return await Bus(broker).ensure(topics)

    consumer: Any = SimpleNamespace(topics=["others"], group="group")
    telling = member.Member(DataSettings(database_url="postgresql://"), consumer, 1, ensure)
    with structlog.testing.capture_logs() as logs:
        task = asyncio.create_task(telling.run())
        await asyncio.wait_for(asked.wait(), 10)
        telling.stop()
        await asyncio.wait_for(task, 10)
    assert "TopicAuthorizationFailedError" in logs[0]["error"]


async def test_a_topic_that_was_deleted_is_made_again(broker: Broker) -> None:
    bus = Bus(broker)
    assert await bus.publish([message(1)]) == [None]
    broker.topics.clear()
    with pytest.raises(Unavailable):
        await bus.publish([message(2)])
    assert await bus.publish([message(2)]) == [None]


async def test_of_a_producer_that_hangs_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "CLOSE_SECONDS", 0.1)
    producer = aiokafka.AIOKafkaProducer(bootstrap_servers="127.0.0.1:1")

    async def send() -> None:
        with suppress(asyncio.CancelledError):  # as aiokafka's does
            await asyncio.Event().wait()

    sender = producer._sender._sender_task = asyncio.create_task(send())
    closed = asyncio.Event()

    async def close() -> None:
        closed.set()

    monkeypatch.setattr(producer._message_accumulator, "close", asyncio.Event().wait)  # a batch that nobody takes
    monkeypatch.setattr(producer.client, "close", close)
    await kafka._close(producer)
    assert sender.done()
    assert closed.is_set()
