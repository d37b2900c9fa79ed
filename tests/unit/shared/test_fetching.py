"""What was fetched, read by us, as aiokafka itself reads it."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from aiokafka import TopicPartition
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.legacy_records import LegacyRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import calc_crc32c
from hypothesis import given
from hypothesis import strategies as st

from shared.bus.fetching import FetchingConsumer, _Fetcher, _PartitionRecords
from shared.records import Fetched, FetchedBatch, FetchedBatches

TP = TopicPartition("things.events", 3)
PLAIN, GZIP = 0, 1
APPEND_TIME = 8
_LENGTH_AT, _LENGTH_END, _CRC_AT, _CRC_FROM, _RECORDS_AT = 8, 12, 17, 21, 61

Headers = list[tuple[str, bytes | None]]


class Written(NamedTuple):
    """A record of a batch; `gap` offsets before it were compacted away."""

    gap: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers


_bytes = st.none() | st.binary(max_size=100) | st.integers(8150, 8250).map(bytes) | st.integers(60, 70).map(bytes)
_written = st.builds(
    Written,
    st.sampled_from([0, 0, 0, 1, 60, 9000]),
    st.integers(0, 2**42),
    _bytes,
    _bytes,
    st.lists(st.tuples(st.text(max_size=5), st.none() | st.binary(max_size=80)), max_size=4),
)
_batches = st.lists(
    st.tuples(st.lists(_written, min_size=1, max_size=8), st.sampled_from([PLAIN, PLAIN, GZIP]), st.booleans()),
    min_size=1,
    max_size=4,
)


def encoded(records: Sequence[Written], base: int, codec: int = PLAIN, *, transactional: bool = False) -> bytes:
    builder = DefaultRecordBatchBuilder(2, codec, transactional, 7 if transactional else -1, -1, -1, 10**9)
    offset = -1
    for record in records:
        offset += 1 + record.gap
        builder.append(offset, record.timestamp, record.key, record.value, record.headers)
    data = bytearray(builder.build())
    data[:8] = base.to_bytes(8, "big")
    return bytes(data)


def number(zigzag: int) -> bytes:
    """As in a record, with its sign in its lowest bit."""
    return bytes([zigzag]) if zigzag < 128 else bytes([zigzag & 127 | 128, zigzag >> 7])


def resealed(data: bytearray) -> bytes:
    """With the checksum of what it is now."""
    data[_CRC_AT:_CRC_FROM] = calc_crc32c(bytes(data[_CRC_FROM:])).to_bytes(4, "big")
    return bytes(data)


def read(data: bytes, records: Any, partition_records: Any, offset: int) -> tuple[list[Any], int]:
    """What comes out of it, and where the next fetch begins."""
    found = partition_records(TP, records(data), [], offset, None, None, True, fetcher.READ_COMMITTED)
    return list(found), found.next_fetch_offset


def ours(data: bytes, offset: int = 0) -> tuple[list[Any], int]:
    return read(data, FetchedBatches, _PartitionRecords, offset)


def theirs(data: bytes, offset: int = 0) -> tuple[list[Any], int]:
    return read(data, MemoryRecords, fetcher.PartitionRecords, offset)


def said(record: Any) -> tuple[Any, ...]:
    headers = [(name, value or b"") for name, value in record.headers]
    return record.topic, record.partition, record.offset, record.timestamp, record.key, record.value, headers


@given(_batches, st.integers(0, 30), st.integers(0, 200), st.booleans())
def test_it_is_read_as_by_aiokafka(
    batches: list[tuple[list[Written], int, bool]], offset: int, cut: int, append_time: bool
) -> None:
    data, base = b"", 0
    for records, codec, transactional in batches:
        batch = bytearray(encoded(records, base, codec, transactional=transactional))
        if append_time:
            batch[22] |= APPEND_TIME
        data += resealed(batch)
        base += sum(1 + record.gap for record in records)
    data = data[: len(data) - cut]  # the last batch may be there in part only
    assert FetchedBatches(data).has_next() == MemoryRecords(data).has_next()
    (found, next_offset), (expected, expected_offset) = ours(data, offset), theirs(data, offset)
    assert [said(record) for record in found] == [said(record) for record in expected]
    assert next_offset == expected_offset


def test_the_older_version_is_read_too() -> None:
    builder = LegacyRecordBatchBuilder(1, PLAIN, 10**6)
    builder.append(0, timestamp=5, key=b"k", value=b"v")
    data = bytes(builder.build())
    assert [said(record) for record in ours(data)[0]] == [said(record) for record in theirs(data)[0]]
    assert ours(data)[0] == [Fetched("things.events", 3, 0, 5, b"k", b"v", b"\0")]


def test_only_what_is_plain_is_read_by_us() -> None:
    record = Written(0, 5, b"k", b"v", [("a", b"b")])
    for batch in (encoded([record], 0, GZIP), encoded([record], 0, transactional=True)):
        assert not isinstance(FetchedBatches(batch).next_batch(), FetchedBatch)
    assert isinstance(FetchedBatches(encoded([record], 0)).next_batch(), FetchedBatch)


@pytest.mark.parametrize("size", [1, 3, 1999])
def test_every_size_below_0_is_that_of_null(size: int) -> None:
    """As other clients write it; `size` with its sign in the lowest bit."""
    body = b"\0\0\0" + number(size) + number(size) + b"\0"
    data = bytearray(encoded([Written(0, 5, None, None, [])], 0)[:_RECORDS_AT] + number(len(body) << 1) + body)
    data[_LENGTH_AT:_LENGTH_END] = (len(data) - _LENGTH_END).to_bytes(4, "big")
    ((record,), _), ((expected,), _) = ours(resealed(data)), theirs(resealed(data))
    assert said(record) == said(expected)
    assert (record.key, record.value) == (None, None)


def test_bytes_that_changed_are_refused() -> None:
    data = bytearray(encoded([Written(0, 5, b"k", b"v", [])], 0))
    data[-3] ^= 1
    with pytest.raises(CorruptRecordException):
        ours(bytes(data))


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_with_another_number_of_records_is_refused(count: int) -> None:
    data = bytearray(encoded([Written(0, 5, b"k", b"v", [])] * 2, 0))
    data[57:61] = count.to_bytes(4, "big")
    with pytest.raises(CorruptRecordException):
        ours(resealed(data))


@pytest.mark.parametrize("record", [b"\x80" * 100_000, b"\xff\xff", b""])
def test_a_record_of_nonsense_is_refused(record: bytes) -> None:
    data = bytearray(encoded([Written(0, 5, b"k", b"v", [])], 0)[:_RECORDS_AT] + record)
    data[_LENGTH_AT:_LENGTH_END] = (len(data) - _LENGTH_END).to_bytes(4, "big")
    with pytest.raises(CorruptRecordException):
        ours(resealed(data))


@pytest.mark.parametrize("length", [-13, -12, -1, 0, 13])
def test_a_batch_too_short_for_one_is_refused(length: int) -> None:
    with pytest.raises(CorruptRecordException):
        ours(bytes(8) + length.to_bytes(4, "big", signed=True) + bytes(100))


def test_headers_nobody_can_read_concern_their_record_only() -> None:
    data = bytearray(encoded([Written(0, 5, b"k", b"v", [("name", b"")]), Written(0, 5, b"k", b"w", [])], 0))
    data[data.index(b"name")] = 0xFF
    (bad, good), _ = ours(resealed(data))
    with pytest.raises(ValueError, match="utf-8"):
        _ = bad.headers
    assert (good.value, good.headers) == (b"w", [])


def test_aiokafka_takes_our_classes() -> None:
    functions: tuple[Any, ...] = (FetchingConsumer.start, _Fetcher._proc_fetch_request)
    for function, names in zip(functions, ({"Fetcher"}, {"MemoryRecords", "PartitionRecords"}), strict=True):
        assert names <= set(function.__code__.co_names)
        assert inspect.iscoroutinefunction(function)
    assert (fetcher.MemoryRecords, fetcher.Fetcher) == (MemoryRecords, _Fetcher.__mro__[1])  # as they were
