"""A streaming replica: how far it has replayed, and whether it may answer reads."""

import asyncio
from contextlib import suppress
from typing import Any

import asyncpg

from shared import metrics
from shared.consistency import Position
from shared.database.pool import cut
from shared.database.primary import Primary, base36, parse_lsn
from shared.database.server import Server
from shared.logs import get_logger
from shared.settings import DataSettings

log = get_logger()

_POLL_SECONDS = 0.25
_AWAY_SECONDS = 1.0
_HURRY_SECONDS = 0.01
_ANSWER_SECONDS = 1.0
# The timeline is read from what was replayed, before the position: it is never ahead of it.
_STATE = """
    SELECT (SELECT system_identifier FROM pg_control_system()) AS cluster,
           coalesce((SELECT max(timeline) FROM timelines), 0) AS timeline,
           pg_last_wal_replay_lsn()::text AS replayed
     WHERE pg_is_in_recovery()
"""

LAG = metrics.Gauge(
    "tenfold_database_replica_lag_seconds",
    "For how long the primary has been ahead of a replica",
    ("service", "replica"),
)
USABLE = metrics.Gauge("tenfold_database_replica_usable", "1 while a replica answers reads", ("service", "replica"))


class Replica(Server):
    """Out when it fails, does not answer, lags more than the settings allow, or is no replica any more; in again when
    it answers and has caught up to half of that, so that one at the limit does not flap."""

    def __init__(self, number: int, url: str, service: str, settings: DataSettings, primary: Primary) -> None:
        super().__init__(f"replica-{number}", service, settings)
        self.cluster = ""
        self.position = Position(0, 0)
        self.usable = False
        self.lag = 0.0
        self._url = url
        self._primary = primary
        self._max_lag = settings.database_replica_max_lag_seconds
        self._asked = asyncio.Event()
        self._lag_gauge = metrics.child(LAG, service, self.name)
        self._usable_gauge = metrics.child(USABLE, service, self.name)

    def ask(self) -> None:
        """Somebody needed more than was known here: look again at once."""
        self._asked.set()

    def take_out(self, reason: str) -> None:
        self._set_usable(False, reason)

    async def follow(self) -> None:
        """Keep `position` and `usable` fresh, for ever; on a connection of its own, since the pool may be busy."""
        connection: Any = None
        try:
            while True:
                try:
                    async with asyncio.timeout(_ANSWER_SECONDS):
                        connection = connection or await self.connect()
                        row = await connection.fetchrow(_STATE)
                    if row is None:
                        raise asyncpg.ObjectNotInPrerequisiteStateError("it is not a replica")
                    self._update(row)
                except Exception as error:  # noqa: BLE001 - one that nobody looks at must not stay usable
                    self._set_usable(False, type(error).__name__)
                    if connection is not None:
                        await cut(connection)
                    connection = None
                await self._pause()
        finally:
            if connection is not None:
                connection.terminate()

    def _update(self, row: Any) -> None:
        self.cluster = base36(row["cluster"])
        self.position = Position(row["timeline"], parse_lsn(row["replayed"]))
        self.lag = self._primary.lag(self.position.lsn)
        self._lag_gauge.set(self.lag)
        if self.lag > self._max_lag:
            self._set_usable(False, "lag")
        elif self.lag <= self._max_lag / 2:
            self._set_usable(True, "caught up")

    async def _pause(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_POLL_SECONDS if self.usable else _AWAY_SECONDS):
                await self._asked.wait()
                await asyncio.sleep(_HURRY_SECONDS)
        self._asked.clear()

    def _set_usable(self, usable: bool, reason: str) -> None:
        if usable != self.usable:
            log.info("replica_in" if usable else "replica_out", replica=self.name, reason=reason, lag=self.lag)
        self.usable = usable
        self._usable_gauge.set(usable)

    async def connect(self) -> Any:
        return await asyncpg.connect(self._url, **self._options)
