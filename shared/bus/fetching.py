"""aiokafka's consumer, for which records are read by `shared.records`: their headers stay encoded until somebody looks.

aiokafka has no place for that, so its functions that name the classes are given ours under these names; the functions
themselves are as they came, and other consumers of the process keep them (docs/adr/0043). A version that names them
otherwise fails the tests.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.consumer import fetcher

from shared.records import Fetched, FetchedBatches, encode_headers


def _renamed(function: Any, **names: Any) -> Callable[..., Any]:
    """The same function, to whom these global names mean something else."""
    return FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__)


class _PartitionRecords(fetcher.PartitionRecords):  # type: ignore[misc]
    def __init__(self, tp: TopicPartition, records: FetchedBatches, *rest: Any) -> None:
        records.place = tp
        super().__init__(tp, records, *rest)

    def _consumer_record(self, tp: TopicPartition, record: Any) -> Fetched:
        if type(record) is Fetched:
            return record
        headers = encode_headers(record.headers)
        return Fetched(tp.topic, tp.partition, record.offset, record.timestamp, record.key, record.value, headers)


class _Fetcher(fetcher.Fetcher):  # type: ignore[misc]
    _proc_fetch_request = _renamed(
        fetcher.Fetcher._proc_fetch_request, MemoryRecords=FetchedBatches, PartitionRecords=_PartitionRecords
    )


class FetchingConsumer(AIOKafkaConsumer):  # type: ignore[misc]
    """Hands out `Fetched` in the place of `ConsumerRecord`; it takes no deserializers."""

    start = _renamed(AIOKafkaConsumer.start, Fetcher=_Fetcher)
