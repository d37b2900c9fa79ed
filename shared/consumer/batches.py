"""Many events of a topic in one transaction."""

import itertools
import operator
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from shared import metrics
from shared.consumer import parking
from shared.consumer.delivery import DURATION, HANDLED, On
from shared.database import Database
from shared.events import Envelope, Event, InvalidEnvelope
from shared.records import Fetched

INBOX_KEY = "inbox_pkey"


# An event of a batch: its position there, who handles it, its id, its record, and itself. A tuple, for there are many.
Item = tuple[int, On[Any], bytes, Fetched, Event]


async def handle(db: Database, group: str, items: Sequence[Item]) -> list[int]:
    """Give them their effect in one transaction, but for those whose key has a parked event; returns their positions.

    Raises `UniqueViolationError` of `INBOX_KEY`, with no effect, when any was handled before.
    """
    async with db.transaction() as tx:
        behind: list[int] = []
        if await parking.any_waits(tx, group):
            keys = {item[0]: _key(item) for item in items}
            waiting = {None} | await parking.waiting_keys(tx, group, {key for key in keys.values() if key is not None})
            behind = [position for position, on, *_ in items if on.ordered and keys[position] in waiting]
            items = [item for item in items if not (item[1].ordered and keys[item[0]] in waiting)]
        by_handler = _by_handler(items)
        for on, same in by_handler.items():
            # Not ON CONFLICT: that costs half as much again, and repeated events are rare. The ids are one text, for
            # of an array the driver looks at each element twice.
            await tx.execute(
                "INSERT INTO inbox (consumer, event_id) SELECT $1, unnest(string_to_array($2, ',')::uuid[])",
                on.consumer(group),
                _joined(same),
            )
        for on, run in itertools.groupby(items, operator.itemgetter(1)):
            assert on.batch is not None
            with metrics.child(DURATION, on.consumer(group), on.event.TYPE).time():
                await on.batch(tx, [item[4] for item in run])
    for on, same in by_handler.items():
        metrics.child(HANDLED, on.consumer(group), on.event.TYPE, "done").inc(len(same))
    return behind


async def without_repeated(db: Database, group: str, items: Sequence[Item]) -> list[Item]:
    """Those of `items` that the inbox does not have, each once."""
    fresh: dict[tuple[str, bytes], Item] = {}
    for item in items:
        _, on, id_, _, _ = item
        fresh.setdefault((on.event.TYPE, id_), item)
    async with db.transaction() as tx:
        for on, same in _by_handler(items).items():
            rows = await tx.fetch(
                "SELECT event_id::text FROM inbox WHERE consumer = $1"
                " AND event_id = ANY (string_to_array($2, ',')::uuid[])",
                on.consumer(group),
                _joined(same),
            )
            for row in rows:
                fresh.pop((on.event.TYPE, row["event_id"].encode()), None)
    for on, same in _by_handler(items).items():
        repeated = len(same) - sum(item[1] is on for item in fresh.values())
        metrics.child(HANDLED, on.consumer(group), on.event.TYPE, "repeated").inc(repeated)
    return list(fresh.values())


def _key(item: Item) -> str | None:
    """`None` when it cannot be said: then it is no event, which is found when it is handled by itself."""
    with suppress(InvalidEnvelope):
        return Envelope.from_record(item[3]).key
    return None


def _joined(items: Iterable[Item]) -> str:
    return b",".join([id_ for _, _, id_, _, _ in items]).decode()


def _by_handler(items: Iterable[Item]) -> dict[On[Any], list[Item]]:
    found: dict[On[Any], list[Item]] = {}
    for item in items:
        found.setdefault(item[1], []).append(item)
    return found
