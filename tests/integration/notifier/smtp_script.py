"""A mail server that does what a test tells it to, at the moment that matters."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field


async def _at_once() -> None:
    pass


@dataclass
class SmtpScript:
    """`before` is awaited before the answer to a command: `greeting`, `MAIL`, `RCPT`, `DATA`, or `body` for the end of
    the message. `replies` replace the answers."""

    before: dict[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)
    replies: dict[str, str] = field(default_factory=dict)
    bodies: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    connections: int = 0
    url: str = ""
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["SmtpScript"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"smtp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            self.hang_up()

    def hang_up(self) -> None:
        """End every connection, as a restart does."""
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)

        async def answer(step: str, reply: str) -> None:
            await self.before.get(step, _at_once)()
            writer.write(f"{self.replies.get(step, reply)}\r\n".encode())
            await writer.drain()

        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await answer("greeting", "220 here")
                while line := (await reader.readline()).decode().strip():
                    command = line.partition(" ")[0].upper()
                    self.commands.append(line)
                    await answer(command, {"DATA": "354 go on", "QUIT": "221 bye"}.get(command, "250 ok"))
                    if command == "DATA" and "DATA" not in self.replies:
                        self.bodies.append((await reader.readuntil(b"\r\n.\r\n")).decode())
                        await answer("body", "250 taken")
        finally:
            self._writers.discard(writer)
            writer.close()
