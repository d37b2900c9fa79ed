"""Reading topics again from their beginning, outside of any group, to rebuild what is derived from events."""

import asyncio
from collections.abc import AsyncIterator, Iterable

from aiokafka.errors import KafkaError

from shared.bus.fetching import FetchingConsumer
from shared.bus.member import stopped
from shared.errors import Unavailable
from shared.events import Envelope, InvalidEnvelope
from shared.logs import get_logger
from shared.records import Fetched
from shared.settings import DataSettings

log = get_logger()

_START_SECONDS = 30.0
_SILENCE_SECONDS = 30.0
_POLL_MS = 500


async def replay(topics: Iterable[str], settings: DataSettings, batch: int) -> AsyncIterator[list[Envelope]]:
    """What the topics hold at the start, in the order of each key, at most `batch` at a time. What is no event is
    passed over. Raises `Unavailable` when the broker is away or falls silent."""
    kafka = FetchingConsumer(
        *topics,
        bootstrap_servers=list(settings.kafka_bootstrap),
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    try:
        async with asyncio.timeout(_START_SECONDS):
            await kafka.start()
            ends = await kafka.end_offsets(kafka.assignment())
        while [partition for partition, end in ends.items() if await _position(kafka, partition) < end]:
            async with asyncio.timeout(_SILENCE_SECONDS):
                while not (found := await kafka.getmany(timeout_ms=_POLL_MS, max_records=batch)):
                    pass
            yield [envelope for records in found.values() for record in records if (envelope := _envelope(record))]
    except (TimeoutError, OSError, KafkaError) as error:
        raise Unavailable("the broker is away") from error
    finally:
        await stopped(kafka.stop)


async def _position(kafka: FetchingConsumer, partition: object) -> int:
    async with asyncio.timeout(_SILENCE_SECONDS):
        position: int = await kafka.position(partition)
        return position


def _envelope(record: Fetched) -> Envelope | None:
    try:
        return Envelope.from_record(record)
    except InvalidEnvelope as error:
        log.warning("record_passed_over", reason=str(error))
        return None
