"""The server that takes writes: found among the hosts of `DATABASE_URL`, and found again after a failover."""

import asyncio
import re
import time
from collections import deque
from typing import Any

import asyncpg

from shared.consistency import Position
from shared.database.pool import FAILURES, cut
from shared.database.server import GONE, Server
from shared.errors import Unavailable
from shared.logs import get_logger
from shared.settings import DataSettings

log = get_logger()

_HOST_SECONDS = 1.0
_WATCH_SECONDS = 0.25
_ANSWER_SECONDS = 1.0
_SAMPLES = 200
# Past every real position: reads go to the primary until a later write says where they may go again.
_NEVER = 2**63
# The timeline is in the name of the segment that is being written; the control file learns of a new one only later.
_STATE = """
    SELECT (SELECT system_identifier FROM pg_control_system()) AS cluster, lsn::text AS lsn,
           substr(pg_walfile_name(lsn), 1, 8) AS timeline
      FROM (SELECT CASE WHEN NOT pg_is_in_recovery() THEN pg_current_wal_insert_lsn() END AS lsn) AS now
     WHERE lsn IS NOT NULL
"""
_RECORD_TIMELINE = "INSERT INTO timelines (timeline) VALUES ($1) ON CONFLICT DO NOTHING"


class Primary(Server):
    """The hosts are walked here, since the driver stops at one that is starting up. A server that is in recovery, or is
    on an older timeline than one seen before (a primary that was replaced and does not know it), is passed over."""

    def __init__(self, service: str, settings: DataSettings) -> None:
        self.cluster = ""
        self.position = Position(0, 0)
        self._hosts = hosts(settings.database_url)
        self._preferred = 0
        self._current = 0
        # When the log was first seen to be how far: what a replica's lag is told by.
        self._samples: deque[tuple[float, int]] = deque(maxlen=_SAMPLES)
        self._sample_seconds = settings.database_replica_max_lag_seconds / 50
        super().__init__("primary", service, settings)

    @property
    def has_several_hosts(self) -> bool:
        return len(self._hosts) > 1

    async def note(self, connection: Any) -> Position:
        """Where the log stands now; raises `ReadOnlySQLTransactionError` when this is no primary any more."""
        row = await connection.fetchrow(_STATE)
        if row is None:
            raise asyncpg.ReadOnlySQLTransactionError("this server is in recovery")
        self.cluster = self.cluster or base36(row["cluster"])
        position = Position(int(row["timeline"], 16), parse_lsn(row["lsn"]))
        if position.timeline > self.position.timeline:
            self._samples.clear()
        self.position = max(position, self.position)
        now = time.monotonic()
        if not self._samples or now - self._samples[-1][0] >= self._sample_seconds:
            self._samples.append((now, position.lsn))
        return position

    def unreached(self) -> Position:
        """A position that no replica reaches before the caller's next write."""
        return Position(self.position.timeline, _NEVER)

    def lag(self, replayed: int) -> float:
        """For how many seconds the log has been past `replayed`, by this process's clock; 0 while it has not been."""
        return next((time.monotonic() - at for at, lsn in self._samples if lsn > replayed), 0.0)

    async def watch(self) -> None:
        """Keep `position` fresh, tell the replicas of a new timeline, and leave a primary that hangs or was demoted;
        for ever."""
        recorded = 0
        while True:
            try:
                recorded = await self.run(self._look, recorded)
            except Unavailable:
                pass  # exhausted or away: the next connection is looked for on every host
            except Exception as error:  # noqa: BLE001 - nobody else looks at it
                log.warning("primary_hangs", error=type(error).__name__)
                self.pool.expire()
            await asyncio.sleep(_WATCH_SECONDS)

    async def _look(self, connection: Any, recorded: int) -> int:
        async with asyncio.timeout(_ANSWER_SECONDS):
            timeline = (await self.note(connection)).timeline
            if timeline > recorded:
                await connection.execute(_RECORD_TIMELINE, timeline)
            return timeline

    async def connect(self) -> Any:
        failure: BaseException | None = None
        first = self._preferred
        for n in range(len(self._hosts)):
            host = (first + n) % len(self._hosts)
            try:
                connection = await self._connect_to(host)
            except BaseException as error:
                # Also when the caller's patience ends here: the next one begins with the next host.
                if self._preferred == host:
                    self._preferred = (host + 1) % len(self._hosts)
                if not isinstance(error, FAILURES):
                    raise
                failure = error if n == 0 or not isinstance(error, GONE) else failure
            else:
                self._preferred = host
                if host != self._current:
                    self._current = host
                    log.warning("primary_moved", host=host)
                    self.pool.expire()
                return connection
        assert failure is not None
        raise failure

    async def _connect_to(self, host: int) -> Any:
        options = self._options | ({"timeout": _HOST_SECONDS} if self.has_several_hosts else {})
        connection = await asyncpg.connect(self._hosts[host], **options)
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                position = await self.note(connection)
            if position.timeline < self.position.timeline:
                raise asyncpg.ReadOnlySQLTransactionError("this primary was replaced")
        except BaseException:
            await cut(connection)
            raise
        return connection


def hosts(url: str) -> list[str]:
    """`postgresql://user@a,b:5433/db` as one URL a host."""
    # Not by `urlsplit`, which knows one host only.
    found = re.fullmatch(r"([^/]*//(?:[^/?#]*@)?)([^/?#]*)(.*)", url)
    if found is None:
        raise ValueError("it is no URL of a database")
    before, places, after = found.groups()
    return [before + place + after for place in places.split(",")]


def parse_lsn(text: str) -> int:
    """`16/B374D848` as a number."""
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def base36(number: int) -> str:
    digits = ""
    number &= 2**64 - 1
    while number:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits or "0"
