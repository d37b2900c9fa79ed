"""The AsyncAPI 3 document of all services, from what they declare. `python -m tests.contract.asyncapi` writes it."""

import importlib
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import yaml

from shared import events
from shared.events import Event
from tests.contract.declared import CONSUMED, PRODUCED, ROOT

PATH: Path = ROOT / "docs" / "asyncapi.yaml"
_SCHEMA = "#/components/schemas/{name}"
# CloudEvents 1.0 in Kafka's binary mode; `shared.events.Envelope` writes them.
_HEADERS = {
    "type": "object",
    "required": ["ce_id", "ce_type", "ce_source", "ce_specversion", "ce_time", "ce_subject", "content-type"],
    "properties": {
        "ce_id": {"type": "string", "format": "uuid", "description": "The same however often it is delivered"},
        "ce_type": {"type": "string"},
        "ce_source": {"type": "string", "description": "The service that published it"},
        "ce_specversion": {"const": events.SPEC_VERSION},
        "ce_time": {"type": "string", "format": "date-time"},
        "ce_subject": {"type": "string", "description": "The id of the aggregate, as the record's key"},
        f"ce_{events.CONSISTENCY}": {"type": "string", "description": "What who reads the publisher's data must see"},
        "content-type": {"const": "application/json"},
        events.TRACEPARENT: {"type": "string", "description": "W3C Trace Context of the work that published it"},
    },
}


def document() -> dict[str, Any]:
    """One channel a topic, one message an event, an operation for each service that sends or receives on a channel."""
    channels: dict[str, Any] = {}
    messages: dict[str, Any] = {}
    schemas: dict[str, Any] = {"CloudEvent": _HEADERS}
    for _, event in PRODUCED:
        channel = channels.setdefault(event.TOPIC, {"address": event.TOPIC, "messages": {}})
        channel["messages"][event.TYPE] = {"$ref": f"#/components/messages/{event.TYPE}"}
        messages[event.TYPE] = _message(event)
        schemas |= _schemas(event)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Tenfold events",
            "version": "1",
            "description": "Delivered at least once, in order for each key. Ignore fields you do not know.",
        },
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": {**_operations("send", PRODUCED), **_operations("receive", CONSUMED)},
        "components": {"messages": messages, "schemas": schemas},
    }


def _message(event: type[Event]) -> dict[str, Any]:
    told = (event.__doc__ or "").strip()
    return {
        "name": event.TYPE,
        "title": event.__name__,
        **({"summary": " ".join(told.split())} if told and not told.startswith(f"{event.__name__}(") else {}),
        "headers": {
            "allOf": [{"$ref": _SCHEMA.format(name="CloudEvent")}, {"properties": {"ce_type": {"const": event.TYPE}}}]
        },
        "payload": {"$ref": _SCHEMA.format(name=event.TYPE)},
        "bindings": {"kafka": {"key": {"type": "string", "description": f"`{event.KEY}`"}, "bindingVersion": "0.5.0"}},
    }


def _schemas(event: type[Event]) -> dict[str, Any]:
    """The event's own under its type, nested ones under `<type>.<name>`: names of two services do not collide."""
    _, components = msgspec.json.schema_components([event], ref_template=_SCHEMA.format(name=event.TYPE + ".{name}"))
    return {event.TYPE if name == event.__name__ else f"{event.TYPE}.{name}": s for name, s in components.items()}


def _operations(action: str, declared: list[tuple[str, type[Event]]]) -> dict[str, Any]:
    operations = {}
    for (service, topic), found in groupby(sorted(declared, key=_place), key=_place):
        told = importlib.import_module(f"services.{service}").__doc__ or service
        operations[f"{service}.{action}.{topic}"] = {
            "action": action,
            "title": f"{service} {action}s {topic}",
            "summary": told.strip().splitlines()[0],
            "channel": {"$ref": f"#/channels/{topic}"},
            "messages": [{"$ref": f"#/channels/{topic}/messages/{event.TYPE}"} for _, event in found],
        }
    return operations


def _place(declared: tuple[str, type[Event]]) -> tuple[str, str]:
    return declared[0], declared[1].TOPIC


def rendered() -> str:
    text: str = yaml.dump(document(), Dumper=_Plain, sort_keys=False, width=120, allow_unicode=True)
    return f"# Written by `python -m tests.contract.asyncapi` from what the services declare.\n{text}"


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


if __name__ == "__main__":
    PATH.write_text(rendered())
