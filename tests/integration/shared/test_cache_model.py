"""The cache against a model: replicas that lag, processes that crash, lost invalidations, a Redis that forgets.

A session reads and writes one row through any process, carrying its consistency token. What must hold (ADR 13):
it is never shown what is older than its own acknowledged write; and, as long as Redis remembers and answers, never what
is older than it was shown before, nor what is older than a write that Redis was told of before it asked.
"""

import asyncio
import secrets
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from shared import cache as under_test
from shared import consistency
from shared.cache import Cache, entry_name
from shared.consistency import Position
from shared.redis import Redis, RedisAway
from tests.backing import Backing

PROCESSES = st.integers(0, 2)
SESSIONS = st.integers(0, 2)
REPLICAS = st.integers(0, 1)
_sound_parse = under_test._parse


class Row(msgspec.Struct, frozen=True):
    version: int


class Reach:
    """One process's way to Redis, which can be cut."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self.cut = False
        self.failures = 0

    async def call(self, *command: Any) -> Any:
        if self.cut:
            self.failures += 1
            raise RedisAway("cut")
        return await self._redis.call(*command)


class Session:
    def __init__(self) -> None:
        self.token: str | None = None
        self.wrote = 0
        self.shown = 0


def machine(runner: asyncio.Runner, redis: Redis, violations: list[str]) -> type[RuleBasedStateMachine]:
    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.name = secrets.token_hex(6)
            self.lsn = 1  # of the primary, and the row's version, for every write is one of this row
            self.replayed = [1, 1]
            self.sessions = [Session() for _ in range(3)]
            self.reaches = [Reach(redis) for _ in range(3)]
            self.caches = [self.start(n) for n in range(3)]
            self.reading: list[tuple[asyncio.Task[None], asyncio.Event, int]] = []
            self.told = 0
            self.era = 0  # counted on when Redis forgets

        def start(self, process: int) -> Cache[Row]:
            reach: Any = self.reaches[process]
            return Cache(self.name, Row, lambda row: row.version, reach)

        def do(self, work: Any) -> Any:
            return runner.run(work)

        async def read(self, process: int, session: Session, replica: int, gate: asyncio.Event | None) -> None:
            async def load() -> Row:
                seen = self.replayed[replica]
                if seen < consistency.current().get("db").lsn:
                    seen = self.lsn  # the primary answers
                if gate is not None:
                    await gate.wait()
                return Row(seen)

            reach, era, failures = self.reaches[process], self.era, self.reaches[process].failures
            least, shown, told = session.wrote, session.shown, self.told
            with consistency.tracked(session.token):
                row = await self.caches[process].get("k", load)
            assert row is not None
            if row.version < least:
                violations.append("older than its own write")
            if reach.failures == failures and era == self.era:
                if row.version < shown:
                    violations.append("older than it was shown before")
                if row.version < told:
                    violations.append("older than a write that Redis was told of")
                session.shown = max(session.shown, row.version)

        @rule(process=PROCESSES, session=SESSIONS, replica=REPLICAS)
        def reads(self, process: int, session: int, replica: int) -> None:
            self.do(self.bounded(self.read(process, self.sessions[session], replica, None)))

        async def bounded(self, read: Any) -> None:
            """It may have joined a load that waits at its gate: then that goes on."""
            task = asyncio.create_task(read)
            for _ in range(2):
                done, _ = await asyncio.wait([task], timeout=0.02)
                if done:
                    break
                for _, gate, _ in self.reading:
                    gate.set()
            await task

        @rule(process=PROCESSES, session=SESSIONS, replica=REPLICAS)
        def starts_a_slow_read(self, process: int, session: int, replica: int) -> None:
            async def start() -> None:
                gate = asyncio.Event()
                task = asyncio.create_task(self.read(process, self.sessions[session], replica, gate))
                self.reading.append((task, gate, process))
                await redis.call("PING")  # its look-up has gone before
                await asyncio.sleep(0)

            self.do(start())

        @rule(which=st.integers(0, 9))
        def ends_a_slow_read(self, which: int) -> None:
            async def end() -> None:
                if not self.reading:
                    return
                task, gate, _ = self.reading[which % len(self.reading)]
                gate.set()
                await asyncio.wait([task], timeout=0.02)
                await self.reap()

            self.do(end())

        async def reap(self) -> None:
            for reading in [r for r in self.reading if r[0].done()]:
                self.reading.remove(reading)
                if not reading[0].cancelled():
                    reading[0].result()

        @rule(process=PROCESSES, session=SESSIONS, lost=st.booleans())
        def writes(self, process: int, session: int, lost: bool) -> None:
            async def write() -> None:
                self.lsn += 1
                with consistency.tracked(self.sessions[session].token) as positions:
                    positions.advance("db", Position(1, self.lsn))
                    was, self.reaches[process].cut = self.reaches[process].cut, lost or self.reaches[process].cut
                    await self.caches[process].invalidate("k", self.lsn)
                    if not self.reaches[process].cut:
                        self.told = self.lsn
                    self.reaches[process].cut = was
                    self.sessions[session].token = positions.token()
                self.sessions[session].wrote = self.lsn

            self.do(write())

        @rule(process=PROCESSES)
        def crashes_after_the_commit(self, process: int) -> None:
            async def crash() -> None:
                self.lsn += 1
                for task, gate, where in self.reading:
                    if where == process:
                        task.cancel()
                        gate.set()
                await asyncio.wait([task for task, _, _ in self.reading] or [asyncio.create_task(asyncio.sleep(0))],
                                   timeout=0.005)  # fmt: skip
                self.caches[process] = self.start(process)
                await self.reap()

            self.do(crash())

        @rule(process=PROCESSES)
        def its_own_event_arrives(self, process: int) -> None:
            async def event() -> None:
                with consistency.tracked(f"db-1-{self.lsn:x}"):
                    await self.caches[process].invalidate("k", self.lsn)
                if not self.reaches[process].cut:
                    self.told = self.lsn

            self.do(event())

        @rule(replica=REPLICAS, by=st.integers(1, 3))
        def a_replica_replays(self, replica: int, by: int) -> None:
            self.replayed[replica] = min(self.lsn, self.replayed[replica] + by)

        @rule()
        def redis_forgets(self) -> None:
            self.do(redis.call("DEL", entry_name(self.name, "k")))
            self.era += 1
            self.told = 0
            for session in self.sessions:
                session.shown = 0

        @rule(process=PROCESSES)
        def redis_is_cut_off_or_back(self, process: int) -> None:
            self.reaches[process].cut = not self.reaches[process].cut

        @rule()
        def the_entry_is_past_its_time(self) -> None:
            async def age() -> None:
                entry = await redis.call("GET", entry_name(self.name, "k"))
                if entry and entry.startswith(b"V"):
                    kind, version, _, rest = entry.split(b" ", 3)
                    await redis.call(
                        "SET", entry_name(self.name, "k"), b" ".join((kind, version, b"1", rest)), "KEEPTTL"
                    )

            self.do(age())

        @invariant()
        def nothing_is_older_than_it_may_be(self) -> None:
            self.do(self.reap())
            assert not violations

        def teardown(self) -> None:
            async def end() -> None:
                for _, gate, _ in self.reading:
                    gate.set()
                if self.reading:
                    await asyncio.wait([task for task, _, _ in self.reading], timeout=1)
                await self.reap()

            self.do(end())

    return Machine


def check(url: str, examples: int, violations: list[str]) -> None:
    with asyncio.Runner() as runner:
        opened = Redis.opened(url, call_seconds=5)  # time is no part of the model
        redis = runner.run(opened.__aenter__())
        try:
            run_state_machine_as_test(
                machine(runner, redis, violations),
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=40,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    phases=[Phase.generate],
                    print_blob=False,
                    report_multiple_bugs=False,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(opened.__aexit__(None, None, None))


def test_no_session_is_ever_taken_back_in_time(backing: Backing) -> None:
    check(backing.redis, 80, [])


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("part", "broken"),
    [
        ("_FILL", "redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])"),
        ("_BURY", "return"),
        ("_mark", lambda _entry: "!"),
        ("_parse", lambda raw: (found := _sound_parse(raw)) and found._replace(token="")),
        ("_LOADS", 1),
    ],
    ids=["fills unchecked", "no tombstones", "own writes unmarked", "tombstones without a token", "refused and shown"],
)
def test_the_model_finds_each_part_missing(
    backing: Backing, monkeypatch: pytest.MonkeyPatch, part: str, broken: object
) -> None:
    monkeypatch.setattr(under_test, part, broken)
    violations: list[str] = []
    with suppress(Exception):  # how the search ends when it has found something is of no interest
        # About 200 find it. How tasks meet is not the same on a busy machine, so more are allowed.
        check(backing.redis, 2000, violations)
    print(violations)
    assert violations
