"""Events: facts in the past tense, versioned and immutable, in CloudEvents 1.0 (binary mode).

A service declares what it publishes in its `events.py`; who consumes one declares its own view with the fields it needs
(services import nothing from one another). What holds the two together are the JSON Schemas under
`services/*/schemas/`, checked by `tests/contract`.
"""

import builtins
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache, lru_cache
from typing import Any, ClassVar, Protocol, TypeVar
from uuid import UUID

import msgspec
from asyncpg.pgproto import pgproto

from shared import consistency, tracing
from shared.clock import Clock, SystemClock
from shared.ids import new_id
from shared.records import Fetched, decode_headers, sized, varint

E = TypeVar("E", bound="Event")

TRACEPARENT = "traceparent"
CONSISTENCY = "consistencytoken"  # CloudEvents extension attributes are lower case letters and digits only
SPEC_VERSION = "1.0"
_PREFIX = "ce_"
_SPEC_VERSION = SPEC_VERSION.encode()
_encoder = msgspec.json.Encoder()


class Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Base of all events. `KEY` names the field with the id of the aggregate: events of one aggregate stay in order."""

    TYPE: ClassVar[str]
    TOPIC: ClassVar[str]
    KEY: ClassVar[str]

    def key(self) -> str:
        """Raises `ValueError` when it is too long for one."""
        key = str(getattr(self, self.KEY))
        if len(key) > _LONGEST_KEY // 4:
            raise ValueError(f"{self.TYPE} with a key of {len(key)} characters")
        return key


class InvalidEnvelope(Exception):
    """The bytes from the broker are not one of our events."""


class Envelope(msgspec.Struct, frozen=True, gc=False):
    """An event on its way: CloudEvents attributes, and the JSON of the event as `data`."""

    id: UUID
    type: str
    source: str
    topic: str
    key: str
    time: datetime
    data: bytes
    headers: Mapping[str, str] = {}
    origin: str = ""
    """Where a broker had it: `topic/partition/offset`."""

    @classmethod
    def wrap(cls, event: Event, source: str, clock: Clock | None = None) -> "Envelope":
        """`event` as it leaves now, with the trace and the consistency token of the work in hand."""
        return cls.wrap_all([event], source, clock)[0]

    @classmethod
    def wrap_all(cls, events: Iterable[Event], source: str, clock: Clock | None = None) -> "list[Envelope]":
        headers = {TRACEPARENT: tracing.traceparent(), CONSISTENCY: consistency.current().token()}
        given = {name: value for name, value in headers.items() if value}
        now = (clock or SystemClock()).now()
        return [
            cls(new_id(), event.TYPE, source, event.TOPIC, event.key(), now, _encoder.encode(event), given)
            for event in events
        ]

    def decode(self, view: builtins.type[E]) -> E:
        """The event as `view` sees it. Raises `msgspec.DecodeError` when it does not fit."""
        try:
            event: E = _decoder(view).decode(self.data)
        except (UnicodeDecodeError, RecursionError) as error:  # which msgspec raises besides
            raise msgspec.DecodeError(str(error)) from None
        return event

    def to_message(self) -> "Message":
        """As a broker takes it."""
        key = self.key.encode()
        headers = [
            _before_id(len(self.headers)),
            sized(str(self.id).encode()),
            _of_type(self.type, self.source),
            sized(_encoder.encode(self.time)[1:-1]),  # `isoformat` takes several times as long
            _SUBJECT,
            sized(key),
            _CONTENT_TYPE,
        ]
        for name, value in self.headers.items():
            headers.append(sized((name if name == TRACEPARENT else _PREFIX + name).encode()))
            headers.append(sized(value.encode()))
        return Message(self.topic, self.key, self.data, b"".join(headers))

    @classmethod
    def from_message(cls, message: "Message") -> "Envelope":
        return cls._read(message.topic, message.data, decode_headers(message.headers), "")

    @classmethod
    def from_record(cls, record: Fetched) -> "Envelope":
        """Raises `InvalidEnvelope` when required attributes are missing or wrong."""
        try:
            headers = record.headers
        except ValueError as error:
            raise InvalidEnvelope(f"its headers: {error}") from error
        return cls._read(record.topic, record.value or b"", headers, origin(record))

    @classmethod
    def _read(cls, topic: str, data: bytes, headers: Sequence[tuple[str, bytes]], origin: str) -> "Envelope":
        try:
            found = dict(reversed(headers))  # the first of a name, as in a glance
            found.pop("content-type", None)
            if found.pop("ce_specversion") != _SPEC_VERSION:
                raise InvalidEnvelope("another specversion")
            return cls(
                pgproto.UUID(found.pop("ce_id").decode()),  # a `UUID` read in a tenth of the time
                _text(found.pop("ce_type")),
                _text(found.pop("ce_source")),
                topic,
                _kept(found.pop("ce_subject")),
                _time(found.pop("ce_time")),
                data,
                _extensions(found) if found else {},
                origin,
            )
        except (KeyError, ValueError, AttributeError, TypeError, OverflowError) as error:
            raise InvalidEnvelope(f"{type(error).__name__}: {error}") from error


def glance(records: Iterable[Fetched]) -> list[tuple[bytes, bytes] | None]:
    """Id and type of each, as bytes, and `None` for what is no event: all that a batch needs to know, for an `Envelope`
    takes longer to make than all the rest. Read where our relay puts them, else by name.
    """
    glances: list[tuple[bytes, bytes] | None] = []
    constant, end, kind = b"", _CONSTANT_AT, b""  # as of the record before: most are of the same type
    for record in records:
        encoded = record.encoded
        if encoded[_CONSTANT_AT:end] != constant or not constant:
            end = encoded.find(_TIME, _CONSTANT_AT, _CONSTANT_AT + _LONGEST_CONSTANT) + len(_TIME)
            constant = encoded[_CONSTANT_AT:end]  # empty where there is none, for then `end` is before it
            kind = _type_in(constant)
        if kind and encoded[1:_ID_AT] == _ID and len(encoded) > end:
            subject_at = end + 1 + (encoded[end] >> 1)  # behind the time, whose length is one byte
            if encoded[subject_at : subject_at + len(_SUBJECT)] == _SUBJECT:
                glances.append((encoded[_ID_AT:_CONSTANT_AT], kind))
                continue
        try:
            envelope = Envelope.from_record(record)
        except InvalidEnvelope:
            glances.append(None)
        else:
            glances.append((str(envelope.id).encode(), envelope.type.encode()))
    return glances


class Message(msgspec.Struct, frozen=True, gc=False):
    """An event as a broker takes it; the outbox keeps it so."""

    topic: str
    key: str
    data: bytes
    headers: bytes
    """Encoded as in a Kafka record."""
    row: int = 0
    """Of the outbox."""


_ID = sized(b"ce_id") + varint(36)
_ID_AT = 1 + len(_ID)
_CONSTANT_AT = _ID_AT + 36
_LONGEST_CONSTANT = 512
_TIME = sized(b"ce_time")
_SUBJECT = sized(b"ce_subject")
_CONTENT_TYPE = sized(b"content-type") + sized(b"application/json")


@cache
def _before_id(extensions: int) -> bytes:
    return varint(7 + extensions) + sized(b"ce_id")


@lru_cache(maxsize=1024)
def _of_type(kind: str, source: str) -> bytes:
    """The headers that are the same for all events of a type, and the name of the next."""
    same = (("ce_type", kind.encode()), ("ce_source", source.encode()), ("ce_specversion", _SPEC_VERSION))
    return b"".join(sized(name.encode()) + sized(value) for name, value in same) + _TIME


@lru_cache(maxsize=1024)
def _type_in(constant: bytes) -> bytes:
    """The type for which `_of_type` made these bytes; empty if it did not."""
    with suppress(ValueError):
        (_, kind), (_, source), _ = decode_headers(varint(3) + constant.removesuffix(_TIME))
        if _of_type(_text(kind), _text(source)) == constant:
            return kind
    return b""


def _extensions(found: Mapping[str, bytes]) -> dict[str, str]:
    return {
        name if name == TRACEPARENT else name[len(_PREFIX) :]: value.decode()
        for name, value in found.items()
        if name == TRACEPARENT or name.startswith(_PREFIX)
    }


def _kept(value: bytes) -> str:
    """Of a header, as text that PostgreSQL can keep, in an index too. Raises `ValueError`."""
    if len(value) > _LONGEST_KEY or b"\0" in value:
        raise ValueError("longer than 1,000 bytes, or with a NUL")
    return value.decode()


_LONGEST_KEY = 1000  # bytes
_text = lru_cache(maxsize=1024)(_kept)  # of a header that has few values


def _time(value: bytes) -> datetime:
    """With an offset, and in a year that UTC has too. Raises `ValueError` and `OverflowError`."""
    time = datetime.fromisoformat(value.decode())
    if time.utcoffset() is None:
        raise ValueError("a time without its offset")
    time.astimezone(UTC)
    return time


@cache
def _decoder(view: builtins.type[E]) -> "msgspec.json.Decoder[E]":
    return msgspec.json.Decoder(view)


class Bus(Protocol):
    """Where relayed events go: Kafka, or handlers of the same process (`BUS=inline`)."""

    batch: int
    """How many events it takes at a time; the relay's transaction is open meanwhile."""

    async def publish(self, messages: list[Message]) -> list[Exception | None]:
        """Hand the messages on, in order for each key; the outcome of each, `None` where it is safe.

        When one fails, later ones of its key are not handed on and fail too. Takes a bounded time. Raises `Unavailable`
        when the bus as a whole is away; some may have been handed on then.
        """
        ...


def json_schema(event: type[Event]) -> dict[str, Any]:
    """The JSON Schema (2020-12) of the event's `data`, with its type and topic."""
    schemas, components = msgspec.json.schema_components([event], ref_template="#/$defs/{name}")
    root = dict(components.pop(event.__name__))
    document: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:tenfold:event:{event.TYPE}",
        **root,
        "x-topic": event.TOPIC,
        "x-key": event.KEY,
    }
    if components:
        document["$defs"] = components
    assert schemas
    return document


def origin(record: Fetched) -> str:
    return f"{record.topic}/{record.partition}/{record.offset}"


def in_order_of_key(messages: Iterable[Message]) -> dict[str, list[int]]:
    """Positions of the messages of each key, in order."""
    lanes: dict[str, list[int]] = {}
    for position, message in enumerate(messages):
        lanes.setdefault(message.key, []).append(position)
    return lanes
