"""How far a group is behind, asked of the broker: a consumer that is stuck does not know."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiokafka
from aiokafka.admin import AIOKafkaAdminClient
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
        self._reader: Any = None
        self._admin: Any = None

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
        if self._admin is None:
            servers = list(self._settings.kafka_bootstrap)
            # Outside the group; paused, for it is there to ask and not to read.
            self._reader = aiokafka.AIOKafkaConsumer(*self._topics, bootstrap_servers=servers)
            await self._reader.start()
            self._admin = AIOKafkaAdminClient(bootstrap_servers=servers)
            await self._admin.start()
        partitions = self._reader.assignment()
        self._reader.pause(*partitions)
        ends = await self._reader.end_offsets(partitions)
        found = await self._admin.list_consumer_group_offsets(self._group)
        committed = {p: found[p].offset for p in partitions if p in found and found[p].offset >= 0}
        # What fell out of retention before it was read is not there to be read: nobody is behind it.
        starts = await self._reader.beginning_offsets(partitions)
        return {p: max(0, ends[p] - max(committed.get(p, 0), starts[p])) for p in partitions}

    async def _drop(self) -> None:
        clients = [self._reader and self._reader.stop, self._admin and self._admin.close]
        self._reader = self._admin = None
        for stop in clients:
            if stop is not None:
                with suppress(TimeoutError, OSError, KafkaError):
                    async with asyncio.timeout(_ASK_SECONDS):
                        await stop()
