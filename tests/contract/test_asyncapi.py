"""docs/asyncapi.yaml says what the services publish and consume, and what is on the wire fits it."""

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import jsonschema
import msgspec
import pytest
import yaml

from shared.events import Envelope, Event
from shared.records import decode_headers
from tests.contract import asyncapi
from tests.contract.declared import CONSUMED, PRODUCED, handled


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(asyncapi.PATH.read_text())
    return found


def test_the_committed_document_is_that_of_the_code() -> None:
    assert asyncapi.PATH.read_text() == asyncapi.rendered(), "run `python -m tests.contract.asyncapi`"


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    references = list(found_references(document))
    assert references
    for reference in references:
        target: Any = document
        for step in reference.removeprefix("#/").split("/"):
            target = target[step]


def found_references(node: Any) -> Iterator[str]:
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from found_references(value)
    if isinstance(node, dict) and "$ref" in node:
        yield node["$ref"]


def test_who_sends_and_receives_what(document: dict[str, Any]) -> None:
    said = {
        (name.split(".")[0], operation["action"], message["$ref"].rpartition("/")[2])
        for name, operation in document["operations"].items()
        for message in operation["messages"]
    }
    assert said == {(s, "send", e.TYPE) for s, e in PRODUCED} | {(s, "receive", e.TYPE) for s, e in CONSUMED}


@pytest.mark.parametrize("service", sorted({service for service, _ in CONSUMED}))
def test_what_is_declared_as_consumed_is_handled(service: str) -> None:
    assert sorted(e.TYPE for e in handled(service)) == sorted(e.TYPE for s, e in CONSUMED if s == service)


@pytest.mark.parametrize(("service", "event"), PRODUCED, ids=lambda p: getattr(p, "TYPE", p))
def test_what_is_on_the_wire_fits(document: dict[str, Any], service: str, event: type[Event]) -> None:
    # A publisher's defaults and zero values are enough: payloads of all kinds meet the same schema in test_events.
    example = msgspec.convert({name: zero(t) for name, t in fields(event).items()}, event, strict=False)
    sent = Envelope.wrap(example, service).to_message()
    message = document["components"]["messages"][event.TYPE]
    context = {"components": document["components"]}
    headers = {name: raw.decode() for name, raw in decode_headers(sent.headers)}
    jsonschema.validate(headers, {**message["headers"], **context})
    jsonschema.validate(msgspec.json.decode(sent.data), {**message["payload"], **context})
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({}, {**message["headers"], **context})


def fields(event: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.encode_name: field.type for field in msgspec.structs.fields(event) if field.required}


def zero(type_: Any) -> Any:
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        return {name: zero(t) for name, t in fields(type_).items()}
    schema = msgspec.json.schema(type_)
    if type_ is UUID:
        return "0190b7a0-0000-7000-8000-000000000001"
    if "enum" in schema:
        return schema["enum"][0]
    return {"string": "2030-01-01T00:00:00Z", "integer": 0, "number": 0, "boolean": False, "array": []}.get(
        schema.get("type", "")
    )
