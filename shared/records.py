"""Kafka's record format, version 2, as far as the relay needs it: headers encoded once, and batches put together.

An event's headers are encoded when it is written to the outbox. So the relay copies bytes, where building each record
anew (aiokafka's `BatchBuilder.append`) would be more than half of its work.
"""

import struct
import time
from collections.abc import Iterable

from aiokafka.record.util import calc_crc32c

_SMALL = 4096
_LENGTH_BYTES = 5  # at most, of a record's length
_AFTER_CRC = struct.Struct(
    ">hiqqqhii"
)  # attributes, last offset, first and last time, producer, epoch, sequence, count
_BEFORE = struct.Struct(">qiibI")  # offset, length, leader epoch, version, CRC


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


def decode_headers(encoded: bytes) -> list[tuple[str, bytes]]:
    """What stands behind the value of a record."""
    count, at = _number(encoded, 0)
    headers: list[tuple[str, bytes]] = []
    for _ in range(count):
        size, at = _number(encoded, at)
        name, at = encoded[at : at + size].decode(), at + size
        size, at = _number(encoded, at)
        headers.append((name, encoded[at : at + size]))
        at += size
    return headers


def _number(encoded: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = encoded[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number >> 1, at
        shift += 7


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
            self._encoded = _BEFORE.pack(0, len(body) + 9, -1, 2, calc_crc32c(body)) + body
            self._parts = []
        return self._encoded
