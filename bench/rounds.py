"""Contenders in alternating rounds, so that what else the machine does hits all of them alike."""

import asyncio
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shared import consistency

TASKS = 64
ROUNDS = 5
SECONDS = 1.0


@dataclass(frozen=True)
class Round:
    """`cpu` in microseconds an operation, of this process; `None` where another process did the work."""

    per_second: float
    cpu: float | None


@dataclass
class Result:
    rounds: list[Round] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        return statistics.median(r.per_second for r in self.rounds)

    @property
    def cpu(self) -> float | None:
        spent = [r.cpu for r in self.rounds if r.cpu is not None]
        return statistics.median(spent) if spent else None


Contender = Callable[[], Awaitable[Round]]


def tasks(operation: Callable[[], Awaitable[object]], number: int = TASKS) -> Contender:
    """So many tasks that each do `operation` again and again."""

    async def run() -> Round:
        done = 0
        until = time.perf_counter() + SECONDS

        async def repeat() -> None:
            nonlocal done
            with consistency.tracked(None):
                while time.perf_counter() < until:
                    await operation()
                    done += 1

        started, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(repeat() for _ in range(number)))
        return Round(done / (time.perf_counter() - started), (time.process_time() - cpu) / done * 1e6)

    return run


def pgbench(program: Path, url: str, clients: int, *arguments: str) -> Contender:
    async def run() -> Round:
        command = (str(program), "-n", "-M", "prepared", "-j", "1", "-c", str(clients), "-T", "2", *arguments, url)
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        output, errors = await asyncio.wait_for(process.communicate(), 60)
        found = re.search(rb"tps = ([0-9.]+)", output)
        if not found:
            raise RuntimeError((output + errors).decode())
        return Round(float(found[1]), None)

    return run


async def compare(contenders: Mapping[str, Contender]) -> dict[str, Result]:
    results = {name: Result() for name in contenders}
    for contender in contenders.values():
        await contender()  # connections, statements and caches are warm afterwards
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            results[name].rounds.append(await contender())
    return results


def ratio(results: Mapping[str, Result], of: str, to: str) -> float:
    """The median of the rounds' ratios, for the two of a round ran next to each other."""
    pairs = zip(results[of].rounds, results[to].rounds, strict=True)
    return statistics.median(a.per_second / b.per_second for a, b in pairs)


@dataclass(frozen=True)
class Goal:
    of: str
    to: str
    at_least: float


def table(title: str, results: Mapping[str, Result], goals: Sequence[Goal]) -> str:
    lines = [f"## {title}", "", "| contender | per second | CPU us each |", "|---|---:|---:|"]
    for name, result in results.items():
        cpu = "" if result.cpu is None else f"{result.cpu:.1f}"
        lines.append(f"| {name} | {result.per_second:,.0f} | {cpu} |")
    lines += ["", "| ratio | reached | goal | |", "|---|---:|---:|---|"]
    for goal in goals:
        if goal.of not in results or goal.to not in results:
            continue
        reached = ratio(results, goal.of, goal.to)
        verdict = "reached" if reached >= goal.at_least else "missed"
        lines.append(f"| {goal.of} / {goal.to} | {reached:.2f} | {goal.at_least:.2f} | {verdict} |")
    return "\n".join(lines) + "\n"
