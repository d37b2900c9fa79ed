"""The contract between who publishes an event and who consumes it: the committed JSON Schemas.

`python -m tests.contract.test_events` writes the schemas anew, for new events and compatible changes.
"""

import json
import os
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any, get_type_hints
from uuid import UUID

import jsonschema
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.events import Event, json_schema
from tests.contract.compatibility import broken_since, incompatibilities
from tests.contract.declared import CONSUMED, PRODUCED, ROOT, SERVICES


def path_of(service: str, event: type[Event]) -> Path:
    return SERVICES / service / "schemas" / f"{event.TYPE}.json"


def rendered(event: type[Event]) -> str:
    return json.dumps(json_schema(event), indent=2, sort_keys=True) + "\n"


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


def test_nothing_breaks_what_was_committed_or_released() -> None:
    assert broken_since(ROOT) == {}


NESTED = {"type": "object", "properties": {"width": {"type": "integer"}}, "required": ["width"]}
OLD: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {"type": "string"},
        "kind": {"enum": ["x", "y"]},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "variants": {"type": "array", "items": {"$ref": "#/$defs/Variant"}},
    },
    "required": ["a", "variants"],
    "x-topic": "t",
    "$defs": {"Variant": NESTED},
}


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("properties", "a"), None, "a was removed"),
        (("properties", "a"), {"type": "integer"}, "a was retyped"),
        (("properties", "a"), {"anyOf": [{"type": "string"}, {"type": "null"}]}, "a was retyped"),
        (("properties", "maybe"), {"anyOf": [{"type": "string"}, {"type": "integer"}]}, "maybe was retyped"),
        (("properties", "kind"), {"enum": ["x", "y", "z"]}, "kind was retyped"),
        (("required",), ["variants"], "a is not always there any more"),
        (("x-topic",), "other", "the event was retyped"),
        (("properties", "variants"), {"type": "string"}, "variants was retyped"),
        (("$defs", "Variant", "properties"), {}, "variants[].width was removed"),
        (("$defs", "Variant", "properties", "width"), {"type": "string"}, "variants[].width was retyped"),
        (("$defs", "Variant", "required"), [], "variants[].width is not always there any more"),
    ],
)
def test_incompatible_changes_are_found(path: tuple[str, ...], value: Any, fault: str) -> None:
    assert incompatibilities(OLD, changed(path, value)) == [fault]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("properties", "b"), {"type": "string"}),
        (("$defs", "Variant", "properties", "b"), {"type": "string"}),
        (("properties", "maybe"), {"type": "string"}),
        (("properties", "kind"), {"enum": ["x"]}),
        (("required",), ["a", "variants", "maybe"]),
        (("title",), "Renamed"),
    ],
)
def test_compatible_changes_pass(path: tuple[str, ...], value: Any) -> None:
    assert incompatibilities(OLD, changed(path, value)) == []


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """`OLD` with `value` at `path`, or without what is there."""
    new = deepcopy(OLD)
    node = new
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    if value is None:
        del node[path[-1]]
    return new


def test_an_incompatible_change_is_found_though_the_schema_was_written_anew(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=Ann", "-c", "user.email=ann@example.org", "-c", "commit.gpgsign=false"]
        elsewhere = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a hook's
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, env=elsewhere, check=True, capture_output=True)

    path = tmp_path / "services" / "users" / "schemas" / "user.registered.v1.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(OLD))
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    git("tag", "v1")
    assert broken_since(tmp_path) == {}
    path.write_text(json.dumps(changed(("properties", "a"), None)))
    name = "services/users/schemas/user.registered.v1.json"
    broken = ["a was removed"]
    assert broken_since(tmp_path) == {f"HEAD:{name}": broken, f"v1:{name}": broken}
    git("commit", "--quiet", "--all", "--message", "two")
    assert broken_since(tmp_path) == {f"HEAD^:{name}": broken, f"v1:{name}": broken}
    path.unlink()
    assert broken_since(tmp_path)[f"v1:{name}"] == ["the event was removed"]


if __name__ == "__main__":
    for owner, published in PRODUCED:
        path_of(owner, published).parent.mkdir(exist_ok=True)
        path_of(owner, published).write_text(rendered(published))
