"""How far a group is behind, asked of the broker: a consumer that is stuck does not know."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiokafka
from aiokafka.errors import KafkaError

from shared import metrics
from shared.logs import get_logger
from shared.settings import DataSettings

log = get_logger()

_ASK_SECONDS = 5.0

LAG = metrics.Gauge("tenfold_consumer_lag", "Events that the group has not committed", ("topic", "group"))


class Lag:
    def __init__(self, group: str, topics: Sequence[str], settings: DataSettings) -> None:
        self._group = group
        self._topics = topics
        self._settings = settings
        self._client: Any = None

    @classmethod
    @asynccontextmanager
    async def opened(cls, group: str, topics: Sequence[str], settings: DataSettings) -> "AsyncIterator[Lag]":
        lag = cls(group, topics, settings)
        try:
            yield lag
        finally:
            await lag._drop()

    async def measure(self) -> dict[Any, int]:
        """Events by partition that the group has not committed, also kept as a metric; empty when nobody answers."""
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                found = await self._ask()
        except (TimeoutError, OSError, KafkaError) as error:
            log.warning("lag_unknown", group=self._group, error=repr(error))
            await self._drop()
            return {}
        for topic in self._topics:
            total = sum(behind for partition, behind in found.items() if partition.topic == topic)
            metrics.child(LAG, topic, self._group).set(total)
        return found

    async def _ask(self) -> dict[Any, int]:
        if self._client is None:
            # In the group by name only, to ask for its offsets: it subscribes to nothing and does not join.
            self._client = aiokafka.AIOKafkaConsumer(
                bootstrap_servers=list(self._settings.kafka_bootstrap), group_id=self._group, enable_auto_commit=False
            )
            await self._client.start()
        await self._client.topics()
        partitions = [
            aiokafka.TopicPartition(topic, number)
            for topic in self._topics
            for number in self._client.partitions_for_topic(topic) or ()
        ]
        ends = await self._client.end_offsets(partitions)
        committed = {partition: await self._client.committed(partition) for partition in partitions}
        fresh = [partition for partition, offset in committed.items() if offset is None]
        starts = await self._client.beginning_offsets(fresh) if fresh else {}
        return {p: max(0, ends[p] - (committed[p] if committed[p] is not None else starts[p])) for p in partitions}

    async def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with suppress(TimeoutError, OSError, KafkaError):
                async with asyncio.timeout(_ASK_SECONDS):
                    await client.stop()
