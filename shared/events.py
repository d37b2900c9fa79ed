"""Events: facts in the past tense, versioned and immutable, in CloudEvents 1.0 (binary mode).

A service declares what it publishes in its `events.py`; who consumes one declares its own view with the fields it needs
(services import nothing from one another). What holds the two together are the JSON Schemas under
`services/*/schemas/`, checked by `tests/contract`.
"""

import builtins
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, Protocol, TypeVar
from uuid import UUID

import msgspec

from shared import consistency, tracing
from shared.clock import Clock, SystemClock
from shared.ids import new_id

E = TypeVar("E", bound="Event")

SPEC_VERSION = "1.0"
TRACEPARENT = "traceparent"
CONSISTENCY = "consistencytoken"  # CloudEvents extension attributes are lower case letters and digits only
_PREFIX = "ce_"
_encoder = msgspec.json.Encoder()


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all events. `KEY` names the field with the id of the aggregate: events of one aggregate stay in order."""

    TYPE: ClassVar[str]
    TOPIC: ClassVar[str]
    KEY: ClassVar[str]

    def key(self) -> str:
        return str(getattr(self, self.KEY))


class InvalidEnvelope(Exception):
    """The bytes from the broker are not one of our events."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """An event on its way: CloudEvents attributes, and the JSON of the event as `data`."""

    id: UUID
    type: str
    source: str
    topic: str
    key: str
    time: datetime
    data: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    origin: str = field(default="", compare=False)
    """Where a broker had it: `topic/partition/offset`."""

    @classmethod
    def wrap(cls, event: Event, source: str, clock: Clock | None = None) -> "Envelope":
        """`event` as it leaves now, with the trace and the consistency token of the work in hand."""
        headers = {TRACEPARENT: tracing.traceparent(), CONSISTENCY: consistency.current().token()}
        return cls(
            id=new_id(),
            type=event.TYPE,
            source=source,
            topic=event.TOPIC,
            key=event.key(),
            time=(clock or SystemClock()).now(),
            data=_encoder.encode(event),
            headers={name: value for name, value in headers.items() if value},
        )

    def decode(self, view: builtins.type[E]) -> E:
        """The event as `view` sees it. Raises `msgspec.DecodeError` when it does not fit."""
        return msgspec.json.decode(self.data, type=view)

    def to_record(self) -> tuple[bytes, bytes, list[tuple[str, bytes]]]:
        """Key, value and headers for Kafka."""
        attributes = {
            "id": str(self.id),
            "type": self.type,
            "source": self.source,
            "specversion": SPEC_VERSION,
            "time": self.time.isoformat(),
            "subject": self.key,
            **{name: value for name, value in self.headers.items() if name != TRACEPARENT},
        }
        headers = [(f"{_PREFIX}{name}", value.encode()) for name, value in attributes.items()]
        headers.append(("content-type", b"application/json"))
        if parent := self.headers.get(TRACEPARENT):
            headers.append((TRACEPARENT, parent.encode()))
        return self.key.encode(), self.data, headers

    @classmethod
    def from_record(cls, record: Any) -> "Envelope":
        """Raises `InvalidEnvelope` when required attributes are missing or wrong."""
        try:
            found = {name: value.decode() for name, value in record.headers}
            attributes = {name.removeprefix(_PREFIX): v for name, v in found.items() if name.startswith(_PREFIX)}
            if attributes.pop("specversion") != SPEC_VERSION:
                raise InvalidEnvelope("another specversion")
            if TRACEPARENT in found:
                attributes[TRACEPARENT] = found[TRACEPARENT]
            return cls(
                id=UUID(attributes.pop("id")),
                type=attributes.pop("type"),
                source=attributes.pop("source"),
                topic=record.topic,
                key=attributes.pop("subject"),
                time=datetime.fromisoformat(attributes.pop("time")),
                data=record.value or b"",
                headers=attributes,
                origin=origin(record),
            )
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise InvalidEnvelope(f"{type(error).__name__}: {error}") from error


class Bus(Protocol):
    """Where relayed events go: Kafka, or handlers of the same process (`BUS=inline`)."""

    batch: int
    """How many events of a shard it takes at a time; the relay's transaction is open meanwhile."""

    async def publish(self, envelopes: list[Envelope]) -> list[Exception | None]:
        """Hand the envelopes on, in order for each key; the outcome of each, `None` where it is safe.

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


def origin(record: Any) -> str:
    return f"{record.topic}/{record.partition}/{record.offset}"


def in_order_of_key(envelopes: Iterable[Envelope]) -> dict[str, list[int]]:
    """Positions of the envelopes of each key, in order."""
    lanes: dict[str, list[int]] = {}
    for position, envelope in enumerate(envelopes):
        lanes.setdefault(envelope.key, []).append(position)
    return lanes
