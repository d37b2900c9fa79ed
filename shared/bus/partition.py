"""What a member has in hand of a partition, and up to where it is done."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence

from shared.records import Fetched

# Of a partition with this much in hand nothing is fetched; so it has at most one more fetch on top.
_IN_HAND = 3000
_IN_HAND_BYTES = 8 * 1024 * 1024


class Progress:
    """Which offsets of a partition are in hand, and up to where all are done."""

    def __init__(self) -> None:
        self._in_hand: deque[int] = deque()
        self._done: set[int] = set()
        self.position: int | None = None
        """The offset to commit: all before it are done. `None` while nothing is."""

    def __len__(self) -> int:
        return len(self._in_hand)

    def take(self, offsets: Iterable[int]) -> None:
        self._in_hand.extend(offsets)

    def finish(self, offsets: Iterable[int]) -> None:
        in_hand, done = self._in_hand, self._done
        done.update(offsets)
        while in_hand and in_hand[0] in done:
            first = in_hand.popleft()
            done.remove(first)
            self.position = first + 1


class Partition:
    """A partition while this member has it."""

    def __init__(self) -> None:
        self.progress = Progress()
        self.committed: int | None = None
        self.lanes: dict[bytes | None, deque[Fetched]] = {}
        self.queue: deque[Fetched] = deque()
        self.in_batches = False
        self.bytes_in_hand = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.closing = asyncio.Event()
        self.moved_at = time.monotonic()

    def take(self, records: Sequence[Fetched]) -> None:
        self.progress.take([record.offset for record in records])
        self.bytes_in_hand += _size(records)
        self.moved_at = time.monotonic()

    def finish(self, records: Sequence[Fetched]) -> None:
        self.progress.finish([record.offset for record in records])
        self.bytes_in_hand -= _size(records)
        self.moved_at = time.monotonic()

    def is_hungry(self) -> bool:
        return len(self.progress) < _IN_HAND and self.bytes_in_hand < _IN_HAND_BYTES


def _size(records: Iterable[Fetched]) -> int:
    return sum([len(record.value or b"") + len(record.encoded) for record in records])
