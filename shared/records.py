"""Kafka's record format, version 2: batches put together and read with their headers left encoded.

An event's headers are encoded when it is written to the outbox. So the relay copies bytes, where building each record
anew (aiokafka's `BatchBuilder.append`) would be more than half of its work; and who reads a batch looks at most headers
only when it has to, where decoding all of them for each record is two thirds of aiokafka's.
"""

import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
from aiokafka.errors import CorruptRecordException
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import calc_crc32c

_SMALL = 4096
_LENGTH_BYTES = 5  # at most, of a record's length
_MOST_BITS = 70
_NO_VALUE = b"\x01"
_AFTER_CRC = struct.Struct(
    ">hiqqqhii"
)  # attributes, last offset, first and last time, producer, epoch, sequence, count
_BEFORE = struct.Struct(">qiibI")  # offset, length, leader epoch, version, CRC
_HEAD_BYTES = _BEFORE.size + _AFTER_CRC.size
_SMALLEST_BYTES = 26  # of a batch, in the oldest version
_LENGTH_AT, _LENGTH_END = 8, 12  # in every version; it is of what follows
_VERSION_AT = 16
_VERSION = 2
_ATTRIBUTES_AT = _BEFORE.size + 1
_APPEND_TIME = 8  # the broker's, of the whole batch


def varint(number: int) -> bytes:
    """Of a number that is not negative, as records have them: zigzag, seven bits a byte."""
    number <<= 1
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


_VARINTS = [varint(number) for number in range(_SMALL)]
_DELTAS = [b"\0\0" + encoded for encoded in _VARINTS]  # no attributes, the batch's time, and the offset in the batch


def sized(data: bytes) -> bytes:
    """`data` after its length."""
    size = len(data)
    return (_VARINTS[size] if size < _SMALL else varint(size)) + data


def encode_headers(headers: Sequence[tuple[str, bytes | None]]) -> bytes:
    """As they stand behind the value of a record."""
    parts = [varint(len(headers))]
    for name, value in headers:
        parts += (sized(name.encode()), _NO_VALUE if value is None else sized(value))
    return b"".join(parts)


def decode_headers(encoded: bytes) -> list[tuple[str, bytes]]:
    """The same again, but that a value that is null is empty. Raises `ValueError`."""
    headers: list[tuple[str, bytes]] = []
    try:
        count, at = _zigzag(encoded, 0)
        for _ in range(count >> 1):
            size, at = _zigzag(encoded, at)
            end = at + (size >> 1)
            name = encoded[at:end].decode()
            size, at = _zigzag(encoded, end)
            end = at if size & 1 else at + (size >> 1)
            headers.append((name, encoded[at:end]))
            at = end
    except IndexError:
        at = -1
    if at != len(encoded):
        raise ValueError("the headers end elsewhere than their record")
    return headers


def _zigzag(encoded: bytes, at: int) -> tuple[int, int]:
    """The number there, with its sign in its lowest bit, and where it ends. Raises `ValueError` past 64 bits."""
    number = shift = 0
    while shift < _MOST_BITS:
        byte = encoded[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
    raise ValueError("a number that does not end")


# A key after its length (`sized`), a value, encoded headers, and whatever number who sends it knows it by.
Record = tuple[bytes, bytes, bytes, int]


class RecordBatch:
    """Records for one partition, in the place of aiokafka's `BatchBuilder`: with the methods its sender calls."""

    def __init__(self, records: Iterable[Record], limit: int) -> None:
        """Of as many of the first `records` as fit in `limit` bytes; of one at least."""
        self._producer = (-1, -1, -1)
        self._encoded = b""
        self._parts: list[bytes] = []
        size = 0
        for delta, (key, value, headers, _) in zip(_DELTAS, records, strict=False):
            length = len(value)
            before = _VARINTS[length] if length < _SMALL else varint(length)
            length += len(delta) + len(key) + len(before) + len(headers)
            size += length + _LENGTH_BYTES
            if size > limit and self._parts:
                break
            self._parts += (_VARINTS[length] if length < _SMALL else varint(length), delta, key, before, value, headers)
        self._count = len(self._parts) // 6

    def record_count(self) -> int:
        return self._count

    def closed(self) -> bool:
        return True

    def _set_producer_state(self, producer_id: int, producer_epoch: int, base_sequence: int) -> None:
        self._producer = producer_id, producer_epoch, base_sequence

    def _build(self) -> bytes:
        if not self._encoded:
            now = int(time.time() * 1000)
            fields = _AFTER_CRC.pack(0, self._count - 1, now, now, *self._producer, self._count)
            body = b"".join([fields, *self._parts])
            self._encoded = _BEFORE.pack(0, len(body) + 9, -1, _VERSION, calc_crc32c(body)) + body
            self._parts = []
        return self._encoded


class Fetched(msgspec.Struct, gc=False):
    """A record that was read, with what is used here of aiokafka's `ConsumerRecord`."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    """Milliseconds."""
    key: bytes | None
    value: bytes | None
    encoded: bytes
    """Its headers."""

    @property
    def headers(self) -> list[tuple[str, bytes]]:
        """Raises `ValueError`."""
        return decode_headers(self.encoded)


class FetchedBatches:
    """What was fetched of a partition, in the place of aiokafka's `MemoryRecords`.

    Batches that are compressed, of a transaction, or of an older version are read by aiokafka.
    """

    def __init__(self, data: bytes) -> None:
        self.place = ("", -1)  # topic and partition, of which `MemoryRecords` are not told
        self._data = data
        self._at = 0

    def size_in_bytes(self) -> int:
        return len(self._data)

    def has_next(self) -> bool:
        """Whether another one is there whole: the broker cuts off the last one where the answer is full."""
        return self._at + _LENGTH_END <= len(self._data) and self._end() <= len(self._data)

    def next_batch(self) -> Any:
        """Raises `CorruptRecordException`."""
        data = self._data[self._at : self._end()]
        if len(data) < _SMALLEST_BYTES:
            raise CorruptRecordException(f"a batch of {len(data)} bytes")
        self._at += len(data)
        if len(data) >= _HEAD_BYTES and data[_VERSION_AT] == _VERSION and not data[_ATTRIBUTES_AT] & ~_APPEND_TIME:
            return FetchedBatch(data, self.place)
        return MemoryRecords(data).next_batch()

    def _end(self) -> int:
        length = self._data[self._at + _LENGTH_AT : self._at + _LENGTH_END]
        return self._at + _LENGTH_END + int.from_bytes(length, signed=True)


class FetchedBatch:
    """In the place of aiokafka's `DefaultRecordBatch`."""

    is_control_batch = False
    is_transactional = False

    def __init__(self, data: bytes, place: tuple[str, int]) -> None:
        self._data = data
        self._place = place
        self.base_offset, _, _, _, self._crc = _BEFORE.unpack_from(data)
        attributes, last, first_time, last_time, self.producer_id, _, _, self._count = _AFTER_CRC.unpack_from(
            data, _BEFORE.size
        )
        self.next_offset = self.base_offset + last + 1
        self._time, self._own_times = (last_time, 0) if attributes & _APPEND_TIME else (first_time, 1)

    def validate_crc(self) -> bool:
        return bool(calc_crc32c(memoryview(self._data)[_BEFORE.size :]) == self._crc)

    def __iter__(self) -> Iterator[Fetched]:
        data, at, base, time, own_times = self._data, _HEAD_BYTES, self.base_offset, self._time, self._own_times
        topic, partition = self._place
        try:
            for _ in range(self._count):
                # Most numbers take a byte or two; a call for each would take longer than all the rest. Their sign is
                # their lowest bit: a size below 0 is that of null.
                if (size := data[at]) < 128:
                    at += 1
                elif (more := data[at + 1]) < 128:
                    size, at = size & 127 | more << 7, at + 2
                else:
                    size, at = _zigzag(data, at)
                end = at + (size >> 1)
                at += 1  # attributes, of which there are none yet
                if (delta := data[at]) < 128:
                    at += 1
                else:
                    delta, at = _zigzag(data, at)
                timestamp = time + (delta >> 1 ^ -(delta & 1)) * own_times
                if (delta := data[at]) < 128:
                    at += 1
                elif (more := data[at + 1]) < 128:
                    delta, at = delta & 127 | more << 7, at + 2
                else:
                    delta, at = _zigzag(data, at)
                key = value = None
                if (size := data[at]) < 128:
                    at += 1
                else:
                    size, at = _zigzag(data, at)
                if not size & 1:
                    key = data[at : at + (size >> 1)]
                    at += size >> 1
                if (size := data[at]) < 128:
                    at += 1
                elif (more := data[at + 1]) < 128:
                    size, at = size & 127 | more << 7, at + 2
                else:
                    size, at = _zigzag(data, at)
                if not size & 1:
                    value = data[at : at + (size >> 1)]
                    at += size >> 1
                yield Fetched(topic, partition, base + (delta >> 1), timestamp, key, value, data[at:end])
                at = end
        except (IndexError, ValueError):
            at = -1
        if at != len(data):
            raise CorruptRecordException(f"a batch of {self._count} records ends elsewhere than its last one")
