"""The pool against a server that answers byte for byte what a test says."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar

import pytest

from services.gateway.upstream_pool import Pool, Unreachable, UpstreamError
from shared.testing import eventually

Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Server:
    def __init__(self) -> None:
        self.connections = 0
        self.heads: list[bytes] = []
        self.ended = 0

    @asynccontextmanager
    async def opened(self, answering: Answering) -> AsyncIterator[str]:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connections += 1
            try:
                await answering(reader, writer)
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                self.ended += 1
                writer.close()

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()

    @asynccontextmanager
    async def saying(self, *answers: bytes, close: bool = False) -> AsyncIterator[Pool]:
        """Gives one of `answers` to each request of a connection, in order, the last one for ever."""

        async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for number in range(1000):
                self.heads.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(answers[min(number, len(answers) - 1)])
                await writer.drain()
                if close:
                    return

        async with self.opened(answering) as url:
            pool = Pool(url, 10)
            try:
                yield pool
            finally:
                pool.close()


@pytest.fixture
def server() -> Server:
    return Server()


async def get(pool: Pool, method: str = "GET", body: AsyncIterator[bytes] | None = None) -> tuple[int, bytes]:
    async with asyncio.timeout(5):
        answer = await pool.ask(method, "/", b"", body, chunked=body is not None, repeatable=body is None)
        try:
            whole = b""
            while chunk := await answer.chunk():
                whole += chunk
            return answer.status, whole
        finally:
            answer.close()


async def test_what_arrives_is_in_nobody_s_context(server: Server) -> None:
    trace: ContextVar[str] = ContextVar("trace", default="none")
    trace.set("of the first")
    seen: list[str] = []
    async with server.saying(OK) as pool:
        assert await get(pool) == (200, b"ok")
        answer = pool.begin("GET", "/", b"")
        assert answer is not None
        told = asyncio.Event()

        def tell() -> None:
            seen.append(trace.get())
            told.set()

        answer.tell = tell
        async with asyncio.timeout(5):
            await told.wait()
        answer.close()
    assert seen == ["none"]


async def test_a_connection_made_as_its_request_is_cancelled_is_closed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    create_connection, made = loop.create_connection, asyncio.Event()

    async def creating(*args: object, **options: object) -> object:
        connection = await create_connection(*args, **options)  # type: ignore[call-overload]
        loop.call_soon(asking.cancel)  # before who waits for it has its turn
        made.set()
        return connection

    async with server.saying(OK) as pool:
        monkeypatch.setattr(loop, "create_connection", creating)
        asking = asyncio.create_task(get(pool))
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert made.is_set()

        async def ended() -> bool:
            return server.ended == 1

        await eventually(ended)
        assert pool.in_flight == 0


async def blocks(*data: bytes) -> AsyncIterator[bytes]:
    for block in data:
        yield block


@pytest.mark.parametrize(
    ("method", "said", "status", "body", "connections"),
    [
        ("GET", OK, 200, b"ok", 1),
        ("GET", CHUNKED + b"1\r\no\r\n1;x=y\r\nk\r\n0\r\nT: 1\r\n\r\n", 200, b"ok", 1),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", 1),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", 304, b"", 1),
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", 200, b"", 1),
        ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 200, b"", 1),
        ("GET", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + OK, 200, b"ok", 1),
        ("GET", b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", 200, b"ok", 3),
        ("GET", b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, b"ok", 3),
        # More than announced is nobody's answer.
        ("GET", OK + OK, 200, b"ok", 3),
        ("HEAD", OK, 200, b"", 3),
    ],
)  # fmt: skip
async def test_answers_end_where_they_say(
    server: Server, method: str, said: bytes, status: int, body: bytes, connections: int
) -> None:
    async with server.saying(said) as pool:
        for _ in range(3):
            assert await get(pool, method) == (status, body)
        assert server.connections == connections
        assert pool.in_flight == 0


async def test_an_answer_may_end_with_its_connection(server: Server) -> None:
    async with server.saying(b"HTTP/1.1 200 OK\r\n\r\nok", close=True) as pool:
        for _ in range(2):
            assert await get(pool) == (200, b"ok")
        assert server.connections == 2


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"SSH-2.0\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nokk",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 40_000,
    ],
)
async def test_what_is_not_whole_is_an_error(server: Server, said: bytes) -> None:
    async with server.saying(said, close=True) as pool:
        with pytest.raises(UpstreamError):
            await get(pool)
        assert server.connections == 1  # a new connection that fails is no stale one
        assert pool.in_flight == 0


async def test_a_kept_connection_that_closed_is_replaced_for_what_may_be_repeated(server: Server) -> None:
    async def once_then_hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(OK)
        server.heads.append(await reader.readuntil(b"\r\n\r\n"))

    async with server.opened(once_then_hang_up) as url:
        pool = Pool(url, 10)
        for _ in range(3):
            assert await get(pool) == (200, b"ok")
        assert (server.connections, len(server.heads)) == (3, 5)
        with pytest.raises(UpstreamError):
            await get(pool, "POST", blocks(b"x"))
        assert len(server.heads) == 6
        pool.close()


async def test_nothing_is_repeated_once_an_answer_has_begun(server: Server) -> None:
    async def begins(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(OK)
        server.heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 2")

    async with server.opened(begins) as url:
        pool = Pool(url, 10)
        await get(pool)
        with pytest.raises(UpstreamError):
            await get(pool)
        assert len(server.heads) == 2
        pool.close()


async def test_a_cancelled_call_closes_its_connection(server: Server) -> None:
    async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.read()

    async with server.opened(silent) as url:
        pool = Pool(url, 10)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await pool.ask("GET", "/", b"", repeatable=True)

        async def ended() -> bool:
            return server.ended == 1

        await eventually(ended)
        assert pool.in_flight == 0


async def test_an_answer_that_is_not_read_does_not_pass_to_the_next(server: Server) -> None:
    async with server.saying(b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n" + bytes(900_000)) as pool:
        for _ in range(3):
            answer = await pool.ask("GET", "/", b"", repeatable=True)
            assert len(await answer.chunk()) < 900_000
            answer.close()
        assert server.connections == 3
        assert len((await get(pool))[1]) == 900_000


async def test_no_more_connections_than_allowed(server: Server) -> None:
    go = asyncio.Event()

    async def waits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            await go.wait()
            writer.write(OK)

    async with server.opened(waits) as url:
        pool = Pool(url, 3)
        calls = [asyncio.create_task(get(pool)) for _ in range(9)]

        async def connected() -> bool:
            return server.connections == 3

        await eventually(connected)
        go.set()
        assert await asyncio.gather(*calls) == [(200, b"ok")] * 9
        assert server.connections == 3
        go.clear()
        calls = [asyncio.create_task(get(pool)) for _ in range(4)]
        done, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        assert isinstance(done.pop().exception(), Unreachable)
        go.set()
        await asyncio.gather(*waiting)
        pool.close()


async def test_who_answers_before_it_has_the_body_is_asked_over_another_connection(server: Server) -> None:
    go = asyncio.Event()

    async def waits() -> AsyncIterator[bytes]:
        yield b"abc"
        await go.wait()

    async with server.saying(OK) as pool:
        assert await get(pool, "POST", waits()) == (200, b"ok")
        assert await get(pool) == (200, b"ok")
        assert server.connections == 2


async def test_a_connection_that_is_closing_is_not_used(server: Server) -> None:
    async with server.saying(OK) as pool:
        assert await get(pool) == (200, b"ok")
        pool._idle[0].close()
        assert await get(pool, "POST", blocks(b"x")) == (200, b"ok")
        assert server.connections == 2


async def test_a_body_that_breaks_off_is_never_whole(server: Server) -> None:
    received: list[bytes] = []

    async def reads(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        received.append(await reader.read())

    async def breaks() -> AsyncIterator[bytes]:
        yield b"abc"
        raise ValueError("mine")

    async with server.opened(reads) as url:
        pool = Pool(url, 3)
        with pytest.raises(ValueError, match="mine"):
            await get(pool, "POST", breaks())

        async def ended() -> bool:
            return server.ended == 1

        await eventually(ended)
        assert all(not data.endswith(b"0\r\n\r\n") for data in received)
        assert pool.in_flight == 0


@pytest.mark.parametrize("target", ["/a\r\nX: y", "/a\nX: y", "/a\rb"])
async def test_no_target_can_begin_a_line(server: Server, target: str) -> None:
    async with server.saying(OK) as pool:
        with pytest.raises(ValueError, match="line break"):
            await pool.ask("GET", target, b"", repeatable=True)
        assert server.connections == 0


async def test_what_follows_an_answer_does_not_change_it(server: Server) -> None:
    async with server.saying(OK + b"HTTP/1.1 404 Not asked for\r\nContent-Length: 0\r\n\r\n") as pool:
        answer = await pool.ask("GET", "/", b"", repeatable=True)
        assert (answer.status, answer.first, await answer.chunk()) == (200, b"HTTP/1.1 200 OK", b"ok")
        answer.close()
