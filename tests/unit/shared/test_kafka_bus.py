"""What becomes of the events that the relay hands over, with a broker that answers what a test lets it answer."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import MessageSizeTooLargeError
from aiokafka.record.default_records import DefaultRecordBatch

from shared.bus import kafka
from shared.bus.kafka import KafkaBus
from shared.errors import Unavailable
from shared.events import Message
from shared.health import Health
from shared.records import RecordBatch, encode_headers
from shared.settings import DataSettings
from shared.testing import Ticks

SECOND = 1.0


class Broker:
    """Also the producer; a batch takes it a second of its own time."""

    def __init__(self, partitions: int = 1) -> None:
        self.partitions = partitions
        self.ticks = Ticks()
        self.until = 0.0
        self.refused: set[bytes] = set()
        self.taken: list[bytes] = []

    async def partitions_for(self, _topic: str) -> set[int]:
        return set(range(self.partitions))

    async def send_batch(self, batch: RecordBatch, _topic: str, *, partition: int) -> asyncio.Future[None]:
        self.ticks.move(SECOND)
        if self.ticks() > self.until:
            raise TimeoutError
        answer = asyncio.get_running_loop().create_future()
        values = [record.value or b"" for record in DefaultRecordBatch(bytes(batch._build()))]
        if self.refused & set(values):
            answer.set_exception(MessageSizeTooLargeError())
        else:
            self.taken += values
            answer.set_result(None)
        return answer

    async def stop(self) -> None:
        pass


class Bus(KafkaBus):
    def __init__(self, broker: Broker) -> None:
        super().__init__(DataSettings(database_url="postgresql://"), Health())
        self._broker = broker

    async def publish(self, messages: list[Message]) -> list[Exception | None]:
        self._broker.until = self._broker.ticks() + kafka._PUBLISH_SECONDS
        return await super().publish(messages)

    async def ensure(self, topics: set[str]) -> None:
        pass

    async def _ready_producer(self, *, counting: bool) -> Any:
        return self._broker


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    broker = Broker()
    monkeypatch.setattr(kafka, "time", SimpleNamespace(monotonic=broker.ticks))
    return broker


def message(number: int, topic: str = "things") -> Message:
    return Message(topic, f"key-{number}", b"%d" % number, encode_headers([]))


async def test_more_suspects_than_there_is_time_for_go_a_part_at_a_time(broker: Broker) -> None:
    bus = Bus(broker)
    broker.refused = {b"7"}
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
