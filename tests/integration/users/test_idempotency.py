"""A users API in a process of its own, killed while the answer is on its way."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import aiohttp
import msgspec
import pytest

from devstack.ports import free_port
from shared.testing import eventually
from tests.backing import PGBOUNCER, SERVICES, Schema, connect

BODY = {"email": "ann@example.org", "password": "correct horse battery", "display_name": "Ann"}


@asynccontextmanager
async def running(schema: Schema, port: int) -> AsyncIterator[int]:
    """The process id of the API once it answers; it is killed at the end at the latest."""
    environment = {
        "PATH": os.defpath, "DATABASE_URL": schema.url, "DATABASE_PGBOUNCER": str(PGBOUNCER).lower(),
        "BUS": "inline", "SIGNING_KEY_SECRET": "s" * 32,
        "LINK_SECRET": "l" * 32,
        "PORT": str(port), "ADMIN_PORT": "0", "DRAIN_SECONDS": "0", "ARGON2_MEMORY_KIB": "8192", "ARGON2_TIME": "1",
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.users", "api", env=environment, cwd=SERVICES.parent,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip

    async def answers() -> bool:
        with suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return True
        assert process.returncode is None
        return False

    try:
        await eventually(answers, within=60)
        yield process.pid
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@asynccontextmanager
async def unread(port: int, key: str) -> AsyncIterator[None]:
    """A registration that has been sent, whose answer nobody reads."""
    raw = msgspec.json.encode(BODY)
    head = f"POST /api/v1/users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n"
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Idempotency-Key: {key}\r\n\r\n".encode() + raw)
    await writer.drain()
    try:
        yield
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("polls", [0, 4, None], ids=["at once", "soon", "when it is committed"])
async def test_killed_before_the_answer_arrived_the_request_is_sent_again(schema: Schema, polls: int | None) -> None:
    """Whenever it is killed: afterwards the same request makes the account or answers with the one that was made."""
    port = free_port()
    connection = await connect(schema.url)
    try:
        async with running(schema, port) as pid, unread(port, "k"):

            async def committed() -> bool:
                return bool(await connection.fetchval("SELECT count(*) FROM idempotency_keys"))

            if polls is None:
                await eventually(committed, every=0)
            else:
                for _ in range(polls):
                    await committed()
            os.kill(pid, signal.SIGKILL)
        before = await connection.fetch("SELECT id::text FROM accounts")
        async with running(schema, port), aiohttp.ClientSession() as http:
            url = f"http://127.0.0.1:{port}/api/v1/users"
            answers = []
            for _ in range(2):
                async with http.post(url, json=BODY, headers={"Idempotency-Key": "k"}) as answer:
                    answers.append((answer.status, await answer.json()))
            async with http.post(url, json=BODY) as answer:
                without = answer.status
        assert answers[0] == answers[1]
        assert answers[0][0] == 201
        assert without == 409
        effects = await connection.fetch("SELECT id::text FROM accounts")
        assert [row["id"] for row in effects] == [answers[0][1]["id"]]
        if polls is None:
            assert before == effects
    finally:
        await connection.close()
    print(f"kill -9 before the answer (accounts then: {len(before)}): effects {len(effects)}, answered {answers[0][0]}")
