"""`python -m services [run|migrate]`: every service in one process, as on a single server.

Each listens on its own port (`USERS_PORT`, ...); `BUS=inline` hands events on without a broker.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from shared.runner import EXIT_CONFIGURATION, Service, run, run_migrations


def discovered() -> list[Service[Any]]:
    """Every folder with an `app.py`; the gateway last, since its door opens when the others listen."""
    names = {path.parent.name for path in Path(__file__).parent.glob("*/app.py")}
    ordered = sorted(names, key=lambda name: (name == "gateway", name))
    return [import_module(f"services.{name}.app").SERVICE for name in ordered]


def main(arguments: list[str]) -> int:
    match arguments:
        case [] | ["run"]:
            return run(
                [(service, role) for service in discovered() for role in ("api", "worker") if role in service.roles()]
            )
        case ["migrate"]:
            return run_migrations(discovered())
    print("usage: python -m services [run|migrate]", file=sys.stderr)  # noqa: T201
    return EXIT_CONFIGURATION


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
