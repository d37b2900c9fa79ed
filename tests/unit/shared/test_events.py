from collections.abc import Iterable
from datetime import UTC, datetime
from types import SimpleNamespace
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
from shared.records import Fetched, decode_headers, sized, varint
from shared.testing import FixedClock


class Renamed(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "thing.renamed.v1"
    TOPIC: ClassVar = "things.events"
    KEY: ClassVar = "thing_id"

    thing_id: UUID
    name: str


def as_record(envelope: Envelope) -> SimpleNamespace:
    message = envelope.to_message()
    headers = decode_headers(message.headers)
    return SimpleNamespace(topic=message.topic, partition=3, offset=14, value=message.data, headers=headers)


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
        Envelope.from_record(SimpleNamespace(topic="t", partition=0, offset=0, value=b"", headers=headers))


def fetched(headers: Iterable[tuple[str, bytes]], value: bytes = b"{}") -> Fetched:
    encoded = [sized(name.encode()) + sized(value) for name, value in headers]
    return Fetched(14, 0, b"k", value, varint(len(encoded)) + b"".join(encoded), "things.events", 3)


def seen(record: Fetched) -> tuple[bytes, bytes] | None:
    """What an envelope has that a glance sees."""
    try:
        envelope = Envelope.from_record(record)
    except InvalidEnvelope:
        return None
    return str(envelope.id).encode(), envelope.type.encode()


@given(st.permutations(range(7)))
def test_a_glance_sees_what_the_envelope_has(order: list[int]) -> None:
    headers = as_record(Envelope.wrap(Renamed(thing_id=new_id(), name="a"), "things")).headers
    record = fetched(headers[n] for n in order)
    assert glance([record, fetched(headers)]) == [seen(record), seen(fetched(headers))]
    assert seen(record) is not None


def test_a_glance_tells_one_type_from_the_next_and_reads_what_aiokafka_reads() -> None:
    class Made(Renamed, frozen=True, kw_only=True):
        TYPE: ClassVar = "thing.made.v1"

    events = [kind(thing_id=new_id(), name="a") for kind in (Renamed, Made, Made, Renamed)]
    envelopes = [*Envelope.wrap_all(events, "things"), Envelope.wrap(events[0], "ce_time")]
    expected = [(str(envelope.id).encode(), envelope.type.encode()) for envelope in envelopes]
    assert glance([fetched(as_record(envelope).headers) for envelope in envelopes]) == expected
    assert glance([as_record(envelope) for envelope in envelopes]) == expected


@given(st.data())
def test_a_glance_is_never_wrong_about_a_record_that_is_not_ours(data: st.DataObject) -> None:
    headers = as_record(Envelope.wrap(Renamed(thing_id=new_id(), name="a"), "things")).headers
    for _ in range(data.draw(st.integers(1, 2))):
        match data.draw(st.integers(0, 2)), data.draw(st.integers(0, len(headers) - 1)):
            case 0, n:
                del headers[n]
            case 1, n:
                headers[n] = (headers[n][0], data.draw(st.binary(max_size=200)))
            case _, n:
                headers.insert(n, (data.draw(st.sampled_from(["ce_time", "ce_subject", "x"])), b"x"))
    record = fetched(headers)
    found = glance([record])[0]
    # What it does not look at may be wrong: a bad id is refused by the batch's statement, and nothing needs the time.
    assert found == seen(record) or (found is not None and found[1] == dict(record.headers)["ce_type"])


@pytest.mark.parametrize("lost", range(6))
def test_a_glance_refuses_what_the_envelope_does(lost: int) -> None:
    headers = as_record(Envelope.wrap(Renamed(thing_id=new_id(), name="a"), "things")).headers
    assert glance([fetched(headers[:lost] + headers[lost + 1 :])]) == [None]


def test_a_glance_refuses_another_version() -> None:
    headers = as_record(Envelope.wrap(Renamed(thing_id=new_id(), name="a"), "things")).headers
    headers[3] = ("ce_specversion", b"2.0")
    assert glance([fetched(headers)]) == [None]


@given(st.binary(max_size=60))
def test_headers_that_nobody_can_read_are_no_event(encoded: bytes) -> None:
    record = Fetched(14, 0, b"k", b"{}", encoded, "things.events", 3)
    with pytest.raises(InvalidEnvelope):
        Envelope.from_record(record)
    assert glance([record]) == [None]
    assert unreadable(record, "things.events/3/14").key == "k"


def test_a_header_without_a_value_does_not_keep_a_record_from_its_burial() -> None:
    record = SimpleNamespace(topic="t", key=None, value=None, timestamp=0, headers=[("x", None)])
    assert unreadable(record, "t/0/0").headers == {"x": ""}


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
