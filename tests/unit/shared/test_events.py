from collections.abc import Sequence
from datetime import UTC, datetime
from typing import ClassVar
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import consistency
from shared.consumer.parking import unreadable
from shared.events import Envelope, Event, InvalidEnvelope, glance, in_order_of_key, json_schema
from shared.ids import new_id
from shared.records import Fetched, decode_headers, encode_headers
from shared.testing import FixedClock


class Renamed(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "thing.renamed.v1"
    TOPIC: ClassVar = "things.events"
    KEY: ClassVar = "thing_id"

    thing_id: UUID
    name: str


def fetched(headers: Sequence[tuple[str, bytes]], value: bytes = b"{}", key: bytes | None = None) -> Fetched:
    return Fetched("things.events", 3, 14, 0, key, value, encode_headers(headers))


def as_record(envelope: Envelope) -> Fetched:
    message = envelope.to_message()
    return Fetched(message.topic, 3, 14, 0, message.key.encode(), message.data, message.headers)


def sent_headers() -> list[tuple[str, bytes]]:
    return as_record(Envelope.wrap(Renamed(thing_id=new_id(), name="a"), "things")).headers


def test_an_event_comes_through_kafka_as_it_was() -> None:
    event = Renamed(thing_id=new_id(), name="ü")
    with consistency.tracked("abc-1-10"):
        sent = Envelope.wrap(event, "things", FixedClock(datetime(2030, 1, 2, tzinfo=UTC)))
    received = Envelope.from_record(as_record(sent))
    assert received == msgspec.structs.replace(sent, origin="things.events/3/14")
    assert received.decode(Renamed) == event
    assert received.key == str(event.thing_id)
    assert received.headers["consistencytoken"] == "abc-1-10"
    assert Envelope.from_message(sent.to_message()) == sent


def test_headers_are_those_of_cloudevents() -> None:
    message = Envelope.wrap(Renamed(thing_id=new_id(), name="a"), "things").to_message()
    found = {name: value.decode() for name, value in decode_headers(message.headers)}
    assert found["ce_specversion"] == "1.0"
    assert found["ce_type"] == "thing.renamed.v1"
    assert found["ce_source"] == "things"
    assert found["content-type"] == "application/json"
    assert UUID(found["ce_id"]).version == 7


@given(
    st.lists(st.tuples(st.sampled_from(["ce_id", "ce_type", "ce_specversion", "ce_time", "x"]), st.binary(max_size=20)))
)
def test_foreign_records_are_refused_by_one_error(headers: list[tuple[str, bytes]]) -> None:
    with pytest.raises(InvalidEnvelope):
        Envelope.from_record(fetched(headers))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ce_time", b"2026-01-01T00:00:00"),
        ("ce_time", b"0001-01-01T00:00:00+14:00"),
        ("ce_time", b"9999-12-31T23:59:59-14:00"),
        ("ce_source", b"a\0b"),
        ("ce_subject", b"a\0b"),
        ("ce_subject", b"k" * 1001),
        ("ce_type", b"t" * 1001),
        ("ce_id", b"no uuid"),
    ],
)
def test_what_the_database_cannot_keep_is_no_event(name: str, value: bytes) -> None:
    headers = [(key, value if key == name else given) for key, given in sent_headers()]
    with pytest.raises(InvalidEnvelope):
        Envelope.from_record(fetched(headers))


def test_nobody_publishes_an_event_with_a_key_that_is_refused() -> None:
    class Long(Renamed, frozen=True, kw_only=True):
        KEY: ClassVar = "name"

    with pytest.raises(ValueError, match="a key of 251 characters"):
        Envelope.wrap(Long(thing_id=new_id(), name="k" * 251), "things")
    record = as_record(Envelope.wrap(Long(thing_id=new_id(), name="\U0001f511" * 250), "things"))
    assert len(Envelope.from_record(record).key) == 250


def seen(record: Fetched) -> tuple[bytes, bytes] | None:
    """What an envelope has that a glance sees."""
    try:
        envelope = Envelope.from_record(record)
    except InvalidEnvelope:
        return None
    return str(envelope.id).encode(), envelope.type.encode()


@given(st.permutations(range(7)))
def test_a_glance_sees_what_the_envelope_has(order: list[int]) -> None:
    headers = sent_headers()
    record = fetched([headers[n] for n in order])
    assert glance([record, fetched(headers)]) == [seen(record), seen(fetched(headers))]
    assert seen(record) is not None


def test_a_glance_tells_one_type_from_the_next() -> None:
    class Made(Renamed, frozen=True, kw_only=True):
        TYPE: ClassVar = "thing.made.v1"

    events = [kind(thing_id=new_id(), name="a") for kind in (Renamed, Made, Made, Renamed)]
    envelopes = [*Envelope.wrap_all(events, "things"), Envelope.wrap(events[0], "ce_time")]
    expected = [(str(envelope.id).encode(), envelope.type.encode()) for envelope in envelopes]
    assert glance(map(as_record, envelopes)) == expected


@given(st.data())
def test_a_glance_is_never_wrong_about_a_record_that_is_not_ours(data: st.DataObject) -> None:
    headers = sent_headers()
    for _ in range(data.draw(st.integers(1, 2))):
        match data.draw(st.integers(0, 2)), data.draw(st.integers(0, len(headers) - 1)):
            case 0, n:
                del headers[n]
            case 1, n:
                headers[n] = (headers[n][0], data.draw(st.binary(max_size=200)))
            case _, n:
                again = data.draw(st.sampled_from(["ce_id", "ce_type", "ce_time", "ce_subject", "x"]))
                headers.insert(n, (again, data.draw(st.sampled_from([b"x", *dict(headers).values()]))))
    record = fetched(headers)
    found = glance([record])[0]
    # What it does not look at may be wrong: a bad id is refused by the batch's statement, and nothing needs the time.
    assert found == seen(record) or (found is not None and found[1] == dict(reversed(headers))["ce_type"])


@pytest.mark.parametrize("lost", range(6))
def test_a_glance_refuses_what_the_envelope_does(lost: int) -> None:
    headers = sent_headers()
    assert glance([fetched(headers[:lost] + headers[lost + 1 :])]) == [None]


def test_a_glance_refuses_another_version() -> None:
    headers = sent_headers()
    headers[3] = ("ce_specversion", b"2.0")
    assert glance([fetched(headers)]) == [None]


@given(st.binary(max_size=60) | st.just(b"\xff" * 100_000))
def test_headers_that_nobody_can_read_are_no_event(encoded: bytes) -> None:
    record = Fetched("things.events", 3, 14, 0, b"k", b"{}", encoded)
    with pytest.raises(InvalidEnvelope):
        Envelope.from_record(record)
    assert glance([record]) == [None]
    assert unreadable(record, "things.events/3/14").key == "k"


@pytest.mark.parametrize(("timestamp", "year"), [(10**15, 1970), (-(10**15), 1970), (2**63 - 1, 1970), (10**12, 2001)])
def test_a_record_that_is_no_event_is_buried_whenever_it_says_that_it_was_sent(timestamp: int, year: int) -> None:
    record = Fetched("things.events", 3, 14, timestamp, None, None, b"\0")
    assert unreadable(record, "things.events/3/14").time.year == year


def test_a_view_takes_what_it_needs_and_ignores_the_rest() -> None:
    class NameOnly(Event, frozen=True, kw_only=True):
        TYPE: ClassVar = "thing.renamed.v1"
        TOPIC: ClassVar = "things.events"
        KEY: ClassVar = "name"
        name: str

    envelope = Envelope.wrap(Renamed(thing_id=new_id(), name="a"), "things")
    assert envelope.decode(NameOnly).name == "a"


def test_a_view_that_does_not_fit_is_a_decode_error() -> None:
    class Other(Event, frozen=True, kw_only=True):
        TYPE: ClassVar = "thing.renamed.v1"
        TOPIC: ClassVar = "things.events"
        KEY: ClassVar = "size"
        size: int

    with pytest.raises(msgspec.DecodeError):
        Envelope.wrap(Renamed(thing_id=new_id(), name="a"), "things").decode(Other)


@pytest.mark.parametrize("data", [b'{"name": "\xff"}', b'{"more": ' + b"[" * 100_000, b"", b"{"])
def test_data_that_nobody_can_read_is_a_decode_error(data: bytes) -> None:
    envelope = Envelope.wrap(Renamed(thing_id=new_id(), name="a"), "things")
    with pytest.raises(msgspec.DecodeError):
        msgspec.structs.replace(envelope, data=data).decode(Renamed)


def test_lanes_keep_the_order_of_each_key() -> None:
    one, two = new_id(), new_id()
    events = [Renamed(thing_id=i, name=n) for i, n in ((one, "a"), (two, "b"), (one, "c"))]
    messages = [envelope.to_message() for envelope in Envelope.wrap_all(events, "things")]
    assert list(in_order_of_key(messages).values()) == [[0, 2], [1]]


def test_the_schema_names_type_topic_and_fields() -> None:
    schema = json_schema(Renamed)
    assert schema["$id"] == "urn:tenfold:event:thing.renamed.v1"
    assert schema["x-topic"] == "things.events"
    assert sorted(schema["required"]) == ["name", "thing_id"]
