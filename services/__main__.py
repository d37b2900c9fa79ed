"""`python -m services [run|migrate]`: every service in one process, as on a single server.

Each listens on its own port (`USERS_PORT`, ...); `BUS=inline` hands events on without a broker.
"""

import sys

from services.gateway.app import SERVICE as GATEWAY
from services.media.app import SERVICE as MEDIA
from services.notifier.app import SERVICE as NOTIFIER
from services.users.app import SERVICE as USERS
from shared.runner import EXIT_CONFIGURATION, run, run_migrations

# The gateway comes last: its door opens when the others listen.
SERVICES = (USERS, MEDIA, NOTIFIER, GATEWAY)


def main(arguments: list[str]) -> int:
    match arguments:
        case [] | ["run"]:
            return run(
                [(service, role) for service in SERVICES for role in ("api", "worker") if role in service.roles()]
            )
        case ["migrate"]:
            return run_migrations(SERVICES)
    print("usage: python -m services [run|migrate]", file=sys.stderr)  # noqa: T201
    return EXIT_CONFIGURATION


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
