"""Child processes that make variants (`imaging`), fed through pipes by the event loop.

A child that takes too long is killed; one that dies takes only its own image along. There are no threads and no locks
between the children, so that killing one at any moment harms no other; when the worker dies, they do.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec

from services.media.imaging import READY, Job, Limits, Made, Refused
from services.media.models import Processed
from services.media.settings import Settings
from shared import metrics
from shared.errors import Unavailable
from shared.logs import get_logger

log = get_logger()

_IMAGES_A_CHILD = 500  # then a fresh one: against leaks in decoders
_ATTEMPTS = 2
_START_SECONDS = 20.0
_ANSWER_BYTES = 1024 * 1024  # of a line; what `shown` may put into one is a tenth of that, in base64
_ROOT = Path(__file__).parents[2]
_PASSED_ON = ("PATH", "PYTHON", "LD_", "LANG", "LC_", "TMPDIR")

KILLED = metrics.Counter("tenfold_media_children_lost_total", "Child processes that died or were killed", ("why",))


class CannotProcess(Exception):
    """The image cannot be processed, whatever is tried. `code` is for programs, `reason` for people."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class _Died(Exception):
    pass


class _Child:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid
        self.served = 0

    @classmethod
    async def started(cls, limits: Limits) -> "_Child":
        """Raises `Unavailable` when the program does not start."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.media.imaging",
            msgspec.json.encode(limits).decode(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_ANSWER_BYTES,
            stderr=asyncio.subprocess.DEVNULL,  # libvips' complaints about bad images
            cwd=_ROOT,
            # What decodes strangers' files is not told the worker's secrets.
            env={name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)},
        )
        child = cls(process)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await child._ready()
        except BaseException as error:
            await asyncio.shield(child.kill())
            # No image's fault: the event waits until children start again.
            if isinstance(error, TimeoutError | _Died):
                raise Unavailable("the processes for images do not start") from error
            raise
        return child

    async def _ready(self) -> None:
        assert self._process.stdout is not None
        if await self._process.stdout.readline() != READY:
            raise _Died

    async def ask(self, job: Job) -> Made | Refused:
        """Raises `_Died` when the process ends over it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.served += 1
        try:
            self._process.stdin.write(msgspec.json.encode(job) + b"\n")
            await self._process.stdin.drain()
            line = await self._process.stdout.readline()
            return msgspec.json.decode(line, type=Made | Refused)
        except (OSError, ValueError) as error:  # it is gone, or what it says is no answer of ours
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.stdout.read()  # before Python 3.12, else it cannot be waited for
            raise _Died from error

    async def kill(self) -> int:
        """Ends it, however busy; its exit status."""
        with suppress(ProcessLookupError):
            self._process.kill()
        return await self._process.wait()


class Children:
    """At most `processes` children, started when there is work. Open it with `Children.opened`."""

    def __init__(self, settings: Settings) -> None:
        self._limits = Limits(settings.max_pixels, settings.max_animation_pixels, settings.process_memory_bytes)
        self._seconds = settings.process_seconds
        self._gate = asyncio.Semaphore(settings.processes)
        self._idle: list[_Child] = []
        self._all: set[_Child] = set()
        self._closed = False

    @classmethod
    @asynccontextmanager
    async def opened(cls, settings: Settings) -> "AsyncIterator[Children]":
        children = cls(settings)
        try:
            yield children
        finally:
            children._closed = True  # whoever still asks is told so, and leaves none behind
            await asyncio.gather(*(child.kill() for child in children._all))

    async def process(self, source: Path, target: Path, content_type: str) -> Processed:
        """Make the variants of `source` as files in the folder `target`. Raises `CannotProcess`.

        Raises `Unavailable` when children do not start, or are at their end.
        """
        job = Job(str(source), str(target), content_type)
        async with self._gate:
            for _ in range(_ATTEMPTS):
                self._require_open()
                answer = await self._ask(job)
                if isinstance(answer, Made):
                    return answer.processed
                if answer is not None:
                    raise CannotProcess(answer.code, answer.reason)
        raise CannotProcess("out-of-memory", "the image takes too much memory, or is damaged in a way that harms")

    async def _ask(self, job: Job) -> Made | Refused | None:
        """The answer; `None` when the child died, which may have been chance."""
        child = self._idle.pop() if self._idle else await _Child.started(self._limits)
        self._all.add(child)
        keep = False
        try:
            self._require_open()
            async with asyncio.timeout(self._seconds):
                answer = await child.ask(job)
        except TimeoutError:
            metrics.child(KILLED, "timeout").inc()
            return Refused("timeout", f"the image takes longer than {self._seconds:g} s")
        except _Died:
            self._require_open()
            metrics.child(KILLED, "died").inc()
            log.warning("child_died", status=await child.kill())
            return None
        else:
            keep = child.served < _IMAGES_A_CHILD
            return answer
        finally:
            if keep:
                self._idle.append(child)
            else:
                self._all.discard(child)
                await asyncio.shield(child.kill())

    def _require_open(self) -> None:
        if self._closed:
            raise Unavailable("the worker stops")
