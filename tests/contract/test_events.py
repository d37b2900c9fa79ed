"""The contract between who publishes an event and who consumes it: the committed JSON Schemas.

`python -m tests.contract.test_events` writes the schemas anew, for new events and compatible changes.
"""

import importlib
import json
from pathlib import Path
from typing import Any, get_type_hints
from uuid import UUID

import jsonschema
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.events import Event, json_schema

SERVICES = Path(__file__).parents[2] / "services"


def declared(module: str, name: str) -> list[tuple[str, type[Event]]]:
    """(service, event) of every service that has such a module."""
    found = []
    for path in sorted(SERVICES.glob(f"*/{module}.py")):
        service = path.parent.name
        events = getattr(importlib.import_module(f"services.{service}.{module}"), name)
        found += [(service, event) for event in events]
    return found


PRODUCED = declared("events", "PRODUCES")
CONSUMED = declared("consumed", "CONSUMES")


def path_of(service: str, event: type[Event]) -> Path:
    return SERVICES / service / "schemas" / f"{event.TYPE}.json"


def rendered(event: type[Event]) -> str:
    return json.dumps(json_schema(event), indent=2, sort_keys=True) + "\n"


def incompatibilities(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What a consumer of `old` would miss in `new`: a field removed, retyped or no longer always there."""
    faults = []
    for name, schema in old["properties"].items():
        if name not in new["properties"]:
            faults.append(f"{name} was removed")
        elif schema != new["properties"][name]:
            faults.append(f"{name} was retyped")
        elif name in old.get("required", ()) and name not in new.get("required", ()):
            faults.append(f"{name} is not always there any more")
    return faults


def test_services_publish_and_consume() -> None:
    assert {service for service, _ in PRODUCED} >= {"users", "media"}
    assert {service for service, _ in CONSUMED} >= {"media", "notifier"}


@pytest.mark.parametrize(("service", "event"), PRODUCED, ids=lambda p: getattr(p, "TYPE", p))
def test_the_committed_schema_is_that_of_the_code(service: str, event: type[Event]) -> None:
    committed = json.loads(path_of(service, event).read_text())
    assert incompatibilities(committed, json_schema(event)) == []
    assert path_of(service, event).read_text() == rendered(event), "run `python -m tests.contract.test_events`"
    assert event.TYPE.rsplit(".", 1)[1].startswith("v")
    assert event.KEY in get_type_hints(event)


def test_every_committed_schema_has_its_event() -> None:
    assert sorted(SERVICES.glob("*/schemas/*.json")) == sorted(path_of(s, e) for s, e in PRODUCED)


@pytest.mark.parametrize(("service", "view"), CONSUMED, ids=lambda p: getattr(p, "TYPE", p))
def test_a_consumer_s_view_takes_whatever_is_published(service: str, view: type[Event]) -> None:
    publishers = [event for _, event in PRODUCED if event.TYPE == view.TYPE]
    assert len(publishers) == 1, f"{view.TYPE} has {len(publishers)} publishers"
    assert (publishers[0].TOPIC, publishers[0].KEY) == (view.TOPIC, view.KEY)

    @settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow], deadline=None)
    @given(st.builds(publishers[0], **strategies(publishers[0])))
    def check(event: Event) -> None:
        encoded = msgspec.json.encode(event)
        jsonschema.validate(json.loads(encoded), json_schema(publishers[0]))
        seen = msgspec.json.decode(encoded, type=view)
        assert seen.key() == event.key()

    check()


def strategies(event: type[Event]) -> dict[str, st.SearchStrategy[Any]]:
    """Hypothesis' own `builds` with JSON's limits: text without lone surrogates, whole numbers of 53 bits."""
    special: dict[Any, st.SearchStrategy[Any]] = {
        str: st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        int: st.integers(0, 2**53),
        UUID: st.uuids(),
    }
    hints = get_type_hints(event)
    return {name: special[hints[name]] for name in event.__struct_fields__ if hints[name] in special}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"properties": {}, "required": []}, "a was removed"),
        ({"properties": {"a": {"type": "integer"}}, "required": ["a"]}, "a was retyped"),
        ({"properties": {"a": {"type": "string"}}, "required": []}, "a is not always there any more"),
    ],
)
def test_the_check_finds_incompatible_changes(change: dict[str, Any], fault: str) -> None:
    assert incompatibilities({"properties": {"a": {"type": "string"}}, "required": ["a"]}, change) == [fault]


def test_a_new_field_is_compatible() -> None:
    old = {"properties": {"a": {"type": "string"}}, "required": ["a"]}
    new = {"properties": {"a": {"type": "string"}, "b": {"type": "string"}}, "required": ["a", "b"]}
    assert incompatibilities(old, new) == []


if __name__ == "__main__":
    for owner, published in PRODUCED:
        path_of(owner, published).parent.mkdir(exist_ok=True)
        path_of(owner, published).write_text(rendered(published))
