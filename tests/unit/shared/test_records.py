"""Batches as aiokafka itself reads them, and as it would have written them."""

from aiokafka.record.default_records import DefaultRecordBatch
from hypothesis import given
from hypothesis import strategies as st

from shared.records import RecordBatch, decode_headers, encode_headers, sized

_headers = st.lists(st.tuples(st.text(max_size=10), st.binary(max_size=300)), max_size=9)
_records = st.lists(st.tuples(st.binary(max_size=200), st.binary(max_size=9000), _headers), min_size=1, max_size=20)


def read(batch: RecordBatch) -> list[tuple[bytes, bytes, list[tuple[str, bytes]]]]:
    found = DefaultRecordBatch(bytes(batch._build()))
    assert found.validate_crc()
    records = list(found)
    assert [record.offset for record in records] == list(range(batch.record_count()))
    return [(record.key, record.value, record.headers) for record in records]


@given(_records)
def test_aiokafka_reads_what_is_written(records: list[tuple[bytes, bytes, list[tuple[str, bytes]]]]) -> None:
    given = [(sized(key), value, encode_headers(headers), n) for n, (key, value, headers) in enumerate(records)]
    assert read(RecordBatch(given, 10**9)) == records


@given(_headers)
def test_headers_are_read_as_they_were_written(headers: list[tuple[str, bytes]]) -> None:
    assert decode_headers(encode_headers(headers)) == headers


def test_a_batch_ends_at_its_limit_and_has_one_record_at_least() -> None:
    records = [(sized(b"k"), b"x" * size, encode_headers([]), 0) for size in (5000, 400, 400, 400)]
    assert RecordBatch(records, 1000).record_count() == 1
    batch = RecordBatch(records[1:], 1000)
    assert batch.record_count() == 2
    assert len(batch._build()) <= 1000 + 61  # the header comes on top


def test_the_producer_s_state_is_in_the_batch_and_a_second_attempt_sends_the_same() -> None:
    batch = RecordBatch([(sized(b"k"), b"v", encode_headers([]), 0)], 1000)
    batch._set_producer_state(7, 3, 42)
    first = batch._build()
    found = DefaultRecordBatch(bytes(first))
    assert (found.producer_id, found.producer_epoch, found.base_sequence) == (7, 3, 42)
    assert batch._build() is first
