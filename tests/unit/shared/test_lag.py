from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition

from shared.bus.lag import LAG, Lag
from shared.settings import DataSettings

PLACE = TopicPartition("things", 0)


class Broker:
    """Also both of the clients that ask it."""

    def __init__(self, start: int, committed: int | None) -> None:
        self._start = start
        self._committed = {} if committed is None else {PLACE: SimpleNamespace(offset=committed)}

    def assignment(self) -> set[TopicPartition]:
        return {PLACE}

    def pause(self, *_partitions: TopicPartition) -> None:
        pass

    async def beginning_offsets(self, partitions: set[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, self._start)

    async def end_offsets(self, partitions: set[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, 500)

    async def list_consumer_group_offsets(self, _group: str) -> dict[TopicPartition, Any]:
        return self._committed


@pytest.mark.parametrize(
    ("start", "committed", "behind"),
    [
        (0, 100, 400),
        (200, None, 300),
        (200, -1, 300),
        (200, 100, 300),  # a part of it fell out of retention
        (500, 100, 0),  # all of it did
        (0, 500, 0),
    ],
)
async def test_a_group_is_behind_what_is_there_to_be_read(start: int, committed: int | None, behind: int) -> None:
    lag = Lag("group", ["things"], DataSettings(database_url="postgresql://"))
    lag._reader = lag._admin = Broker(start, committed)
    assert await lag.measure() == {PLACE: behind}
    assert LAG.labels("things", "group")._value.get() == behind
