"""Child processes: start, readiness, report of death, restart, stop.

A child is a process group of its own, logs to a file of its own and ends with this process, whatever ends this one
(`launch.py`, `guard.py`). `Child.kill`, `pause` and `resume` are what the chaos tests do to it: a child ended that way
is not reported and not restarted. One that dies by itself is reported with its last log lines; then it is restarted
with growing delay, on the same port and data, or the stack has failed (`Supervisor.failure`): see `Spec.respawn`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).parent
Report = Callable[[str], None]
Stops = tuple[tuple[signal.Signals, float], ...]

_MAX_LOG_BYTES = 32 * 1024 * 1024
_LOG_CHECK_SECONDS = 30.0
_POLL_SECONDS = 0.03
_RESPAWN_FIRST, _RESPAWN_MAX = 0.5, 10.0
_STEADY_SECONDS = 30.0  # who has lived this long starts again with the first delay
_TAIL_LINES = 15


class StackError(Exception):
    """The stack cannot start or has failed; the text is for people and holds the last log lines."""


class ChildError(StackError):
    """A child did not start, or died."""

    def __init__(self, name: str, reason: str, tail: str) -> None:
        lines = "".join(f"\n    | {line}" for line in tail.splitlines()) or "\n    (it logged nothing)"
        super().__init__(f"{name} {reason}; its last log lines:{lines}")
        self.name = name
        self.tail = tail


@dataclass(frozen=True, kw_only=True)
class Spec:
    """How a child runs. `stop` are the signals to stop it with and how long to wait after each; SIGKILL ends the list.
    `death_signal` is what it gets when the supervisor dies. `user` is (uid, gid) to run as. `respawn` says whether it
    is started again when it dies by itself; by default, what the supervisor does."""

    name: str
    command: tuple[str, ...]
    ready: Callable[[], Awaitable[bool]]
    env: Mapping[str, str] | None = None
    cwd: Path = HERE.parent
    user: tuple[int, int] | None = None
    stop: Stops = ((signal.SIGTERM, 3.0),)
    death_signal: signal.Signals = signal.SIGKILL
    start_seconds: float = 30.0
    respawn: bool | None = None


class Child:
    """One process of the stack; made by `Supervisor.add`."""

    def __init__(self, spec: Spec, log: Path, supervisor: Supervisor) -> None:
        self.spec = spec
        self.log = log
        self.restarts = 0
        self._supervisor = supervisor
        self._process: subprocess.Popen[bytes] | None = None
        self._exited = asyncio.Event()
        self._exited.set()
        self._wanted = False
        self._ready = False
        self._paused = False
        self._log_start = 0
        self._started_at = 0.0
        self._respawn: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int:
        """The process id of the last start; raises `StackError` before the first."""
        if self._process is None:
            raise StackError(f"{self.name} was never started")
        return self._process.pid

    @property
    def running(self) -> bool:
        return not self._exited.is_set()

    @property
    def returncode(self) -> int | None:
        """The exit status (negative: the signal) of the last run, `None` while it runs or before it did."""
        return None if self._process is None or self.running else self._process.returncode

    def tail(self, lines: int = _TAIL_LINES) -> str:
        """The last log lines of the last start."""
        with contextlib.suppress(FileNotFoundError), self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(min(self._log_start, size), size - 16_384))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
        return ""

    async def start(self) -> None:
        """Start it and wait until it is ready. Raises `ChildError` when it ends before or is not ready in time."""
        if self.running:
            return
        self._wanted = True
        self._spawn()
        await self.wait_ready()

    async def wait_ready(self) -> None:
        """Wait until it answers; on failure it is stopped and `ChildError` raised."""
        deadline = time.monotonic() + self.spec.start_seconds
        while True:
            if not self.running:
                raise ChildError(self.name, f"ended at its start ({self._status()})", self.tail())
            with contextlib.suppress(OSError, TimeoutError):
                if await asyncio.wait_for(self.spec.ready(), max(0.01, min(5.0, deadline - time.monotonic()))):
                    self._ready = True
                    return
            if time.monotonic() > deadline:
                await self.stop()
                raise ChildError(self.name, f"was not ready within {self.spec.start_seconds:g} s", self.tail())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._exited.wait(), _POLL_SECONDS)

    async def stop(self) -> None:
        """Stop it in order, with SIGKILL at the end. Does nothing when it is not running."""
        self._wanted = False
        self._cancel_respawn()
        if self._paused:
            self.resume()
        for number, seconds in self.spec.stop:
            if not self.running:
                return
            self._signal(number)
            await self._wait(seconds)
        if self.running:
            self._supervisor.report(f"{self.name} did not stop in time: killed")
            await self.kill()

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal and wait until the process is gone (SIGKILL: with all of its group). It stays away until
        `start` or `restart`."""
        self._wanted = False
        self._cancel_respawn()
        if number == signal.SIGKILL:
            self.kill_now()
        else:
            self._signal(number)
        await self._exited.wait()
        self._paused = False

    def kill_now(self) -> None:
        """SIGKILL to the process group, without waiting."""
        self._wanted = False
        if self.running:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP to it and all its descendants: it hangs, its connections stay open."""
        self._paused = True
        self._signal_tree(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT to what `pause` stopped."""
        self._paused = False
        self._signal_tree(signal.SIGCONT)

    async def restart(self) -> None:
        """Stop and start again, on the same ports, and wait until ready."""
        await self.stop()
        self.restarts += 1
        await self.start()

    async def wait_exit(self) -> int:
        """Wait until it ends; returns the exit status."""
        await self._exited.wait()
        return self._process.returncode if self._process else 0

    def _spawn(self) -> None:
        uid, gid = self.spec.user or (-1, -1)
        launcher = [sys.executable, "-I", "-S", str(HERE / "launch.py")]
        arguments = [os.getpid(), int(self.spec.death_signal), uid, gid]
        with self.log.open("ab") as output:
            self._log_start = output.tell()
            process = subprocess.Popen(
                [*launcher, *map(str, arguments), *self.spec.command],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                cwd=self.spec.cwd, env=None if self.spec.env is None else dict(self.spec.env), start_new_session=True,
            )  # fmt: skip
        self._process, self._ready, self._paused = process, False, False
        self._started_at = time.monotonic()
        self._exited = asyncio.Event()
        self._supervisor.guard(f"+{process.pid} {int(self.spec.death_signal)}")
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._watch, args=(process, loop), name=f"watch-{self.name}", daemon=True).start()

    def _watch(self, process: subprocess.Popen[bytes], loop: asyncio.AbstractEventLoop) -> None:
        process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(self._on_exit, process)

    def _on_exit(self, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # what it left behind in its group
        self._supervisor.guard(f"-{process.pid}")
        self._exited.set()
        if not self._wanted or not self._ready:
            return  # stopped on purpose, or `start` raises
        error = ChildError(self.name, f"died ({self._status()})", self.tail())
        if not (self._supervisor.respawn if self.spec.respawn is None else self.spec.respawn):
            self._supervisor.fail(error)
            return
        lived = time.monotonic() - self._started_at
        self.restarts = 1 if lived > _STEADY_SECONDS else self.restarts + 1
        delay = min(_RESPAWN_FIRST * 2 ** (self.restarts - 1), _RESPAWN_MAX)
        self._supervisor.report(f"{error}\n  it is started again in {delay:g} s")
        self._respawn = asyncio.get_running_loop().create_task(self._start_again(delay))

    async def _start_again(self, delay: float) -> None:
        while True:
            await asyncio.sleep(delay)
            try:
                self._spawn()
                await self.wait_ready()
            except ChildError as error:
                self._wanted = True  # a start that timed out has cleared it
                self.restarts += 1
                delay = min(2 * delay, _RESPAWN_MAX)
                self._supervisor.report(f"{error}\n  next try in {delay:g} s")
            else:
                self._supervisor.report(f"{self.name} is back")
                return

    def _cancel_respawn(self) -> None:
        task, self._respawn = self._respawn, None
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._exited.wait(), seconds)

    def _signal(self, number: signal.Signals) -> None:
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _signal_tree(self, number: signal.Signals) -> None:
        if not self.running:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.pid)
            if number == signal.SIGSTOP:
                root.send_signal(number)  # first, so that it starts no more
            for process in root.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            root.send_signal(number)

    def _status(self) -> str:
        code = self._process.returncode if self._process else None
        if code is not None and code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit status {code}"


class Supervisor:
    """Owns the children of one stack and the guard that outlives us by a moment. With `respawn`, a child that dies by
    itself is started again; else that fails the stack."""

    def __init__(self, logs: Path, report: Report, *, respawn: bool = False) -> None:
        self.report = report
        self.respawn = respawn
        self.children: dict[str, Child] = {}
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._logs = logs
        self._guard: subprocess.Popen[str] | None = None
        self._log_task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Start the guard and make the log folder; before any child."""
        self._logs.mkdir(parents=True, exist_ok=True)
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(HERE / "guard.py")],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd="/", start_new_session=True, text=True,
        )  # fmt: skip
        self._log_task = asyncio.get_running_loop().create_task(self._bound_logs())

    def add(self, spec: Spec) -> Child:
        """Register a child (or replace one that is not running); its log of the last run is kept as `.1`."""
        log = self._logs / f"{spec.name}.log"
        known = self.children.get(spec.name)
        if known is None and log.exists():
            log.replace(log.with_suffix(".log.1"))
        child = self.children[spec.name] = Child(spec, log, self)
        return child

    def guard(self, line: str) -> None:
        if self._guard is not None and self._guard.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                self._guard.stdin.write(line + "\n")
                self._guard.stdin.flush()

    def fail(self, error: ChildError) -> None:
        """The stack cannot go on: told on the console and to who awaits or asks `failure`."""
        self.report(str(error))
        if not self.failure.done():
            self.failure.set_exception(error)
            self.failure.exception()  # asked for: no complaint when nobody else does

    async def stop(self, names: Iterable[str]) -> None:
        """Stop these, in parallel."""
        await asyncio.gather(*(self.children[name].stop() for name in names if name in self.children))

    def kill_all(self) -> None:
        """SIGKILL to every child, now."""
        for child in self.children.values():
            child.kill_now()

    async def close(self) -> None:
        """Kill what still runs and end the guard."""
        self.kill_all()
        await asyncio.gather(*(child.kill() for child in self.children.values()))
        if self._log_task is not None:
            self._log_task.cancel()
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            await asyncio.to_thread(self._guard.wait)
            self._guard = None

    async def _bound_logs(self) -> None:
        while True:
            await asyncio.sleep(_LOG_CHECK_SECONDS)
            for child in self.children.values():
                if child.log.exists() and child.log.stat().st_size > _MAX_LOG_BYTES:
                    # The child keeps its file open (in append mode), so copy and cut rather than rename.
                    shutil.copyfile(child.log, child.log.with_suffix(".log.1"))
                    os.truncate(child.log, 0)


async def run(
    command: Iterable[str],
    *,
    log: Path,
    what: str,
    user: tuple[int, int] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path = HERE.parent,
    seconds: float = 60.0,
) -> None:
    """Run a command to its end, its output to `log`. Raises `ChildError` when it fails or takes too long."""
    uid, gid = user or (-1, -1)
    launcher = [sys.executable, "-I", "-S", str(HERE / "launch.py"), str(os.getpid()), str(int(signal.SIGKILL))]
    start = 0

    def tail() -> str:
        with log.open("rb") as file:
            file.seek(start)
            return "\n".join(file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:])

    with log.open("ab") as output:
        start = output.tell()
        process = await asyncio.create_subprocess_exec(
            *launcher, str(uid), str(gid), *command,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            cwd=cwd, env=None if env is None else dict(env), start_new_session=True,
        )  # fmt: skip
    try:
        code = await asyncio.wait_for(process.wait(), seconds)
    except TimeoutError:
        raise ChildError(what, f"took longer than {seconds:g} s", tail()) from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if code != 0:
        raise ChildError(what, f"failed (exit status {code})", tail())
