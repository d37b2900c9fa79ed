"""What the services declare: the events they publish and consume, and the tables that say who handles them."""

import importlib
import inspect
from pathlib import Path
from typing import Any

from shared.consumer import On
from shared.events import Event

ROOT = Path(__file__).parents[2]
SERVICES = ROOT / "services"


def _declared(module: str, name: str) -> list[tuple[str, type[Event]]]:
    """(service, event) of every service that has such a module."""
    found = []
    for path in sorted(SERVICES.glob(f"*/{module}.py")):
        service = path.parent.name
        events = getattr(importlib.import_module(f"services.{service}.{module}"), name)
        found += [(service, event) for event in events]
    return found


PRODUCED = _declared("events", "PRODUCES")
CONSUMED = _declared("consumed", "CONSUMES")


class _Anything:
    """Has every method, so that a topic table can be made without its service."""

    def __getattr__(self, _name: str) -> Any:
        return _Anything()


def handled(service: str) -> list[type[Event]]:
    """The events in the topic table of the service."""
    consumers = importlib.import_module(f"services.{service}.consumers").consumers
    table: list[On[Any]] = consumers(*(_Anything() for _ in inspect.signature(consumers).parameters))
    return [line.event for line in table]
