"""aiokafka's consumer, for which records are read by `shared.records`: their headers stay encoded until somebody looks.

aiokafka has no place for that, so its functions that name the classes are given ours under these names (the functions
themselves are as they came, and other consumers of the process keep them). Should they one day have others, records are
read as slowly as everybody's, and a test says so. See docs/adr/0043.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.consumer import fetcher

from shared.records import Fetched, FetchedBatches


def _with(function: Any, **names: Any) -> Callable[..., Any]:
    """The same function, to whom these global names mean something else."""
    return FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__)


class _PartitionRecords(fetcher.PartitionRecords):  # type: ignore[misc]
    def _consumer_record(self, tp: Any, record: Any) -> Any:
        if type(record) is not Fetched:
            return super()._consumer_record(tp, record)
        record.topic, record.partition = tp
        return record


class _Fetcher(fetcher.Fetcher):  # type: ignore[misc]
    _proc_fetch_request = _with(
        fetcher.Fetcher._proc_fetch_request, MemoryRecords=FetchedBatches, PartitionRecords=_PartitionRecords
    )


class FetchingConsumer(AIOKafkaConsumer):  # type: ignore[misc]
    """Returns `Fetched` in the place of `ConsumerRecord`, but for batches that are compressed or of a transaction."""

    start = _with(AIOKafkaConsumer.start, Fetcher=_Fetcher)
