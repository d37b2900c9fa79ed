"""`python -m shared.consumer dead-letters list | show EVENT_ID | redrive EVENT_ID... | redrive --all`

Works on the service whose `DATABASE_URL` is set, whatever its bus. A redriven event is handled by that service's
running consumer, under its own id: redriven twice, it has one effect.
"""

import asyncio
import os
import sys
from uuid import UUID

import asyncpg

from shared.consumer import parking

_SHOWN = 1000
_CONNECT_SECONDS = 5.0


async def run(url: str, words: list[str]) -> int:
    """Do what `words` say; returns the exit status."""
    connection = await asyncpg.connect(url, timeout=_CONNECT_SECONDS)
    try:
        match words:
            case ["list"]:
                for row in await parking.dead_letters(connection, _SHOWN):
                    print(*(str(value) for value in row.values()), sep="\t")  # noqa: T201
            case ["show", event_id]:
                rows = await parking.dead_letter(connection, UUID(event_id))
                for row in rows:
                    for name, value in row.items():
                        print(f"{name}: {value}")  # noqa: T201
                return 0 if rows else 1
            case ["redrive", "--all"]:
                print(f"{await parking.redrive(connection, None)} redriven")  # noqa: T201
            case ["redrive", *event_ids] if event_ids:
                print(f"{await parking.redrive(connection, [UUID(e) for e in event_ids])} redriven")  # noqa: T201
            case _:
                print(__doc__, file=sys.stderr)  # noqa: T201
                return 2
    finally:
        await connection.close(timeout=_CONNECT_SECONDS)
    return 0


def main() -> int:
    match sys.argv[1:]:
        case ["dead-letters", *words] if url := os.environ.get("DATABASE_URL"):
            return asyncio.run(run(url, words))
    print(__doc__, file=sys.stderr)  # noqa: T201
    return 2


if __name__ == "__main__":
    sys.exit(main())
