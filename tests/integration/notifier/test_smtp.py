"""Connections to the mail server: used again, left in time, made anew when stale; encrypted and with login."""

import asyncio
import datetime as dt
import ipaddress
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from services.notifier.channels.email import Letter
from services.notifier.channels.smtp import Result, Smtp
from services.notifier.models import Outcome
from shared.testing import eventually
from tests.integration.notifier.smtp_script import SmtpScript

LETTER = Letter("us@example.com", "ada@example.com", b"Subject: x\r\n\r\nhello\r\n")


@pytest.fixture
async def script() -> AsyncIterator[SmtpScript]:
    async with SmtpScript().serving() as serving:
        yield serving


@pytest.fixture
async def opened() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def nothing() -> None:
    pass


async def smtp_to(
    opened: AsyncExitStack, url: str, *, messages: int = 100, idle: float = 30, command: float = 5
) -> Smtp:
    return await opened.enter_async_context(Smtp(url, command, 5, messages, idle).opened())


async def send(smtp: Smtp, number: int = 1) -> list[Outcome]:
    return [(await smtp.send(LETTER, nothing)).outcome for _ in range(number)]


async def test_one_after_another_they_share_a_connection(opened: AsyncExitStack, script: SmtpScript) -> None:
    smtp = await smtp_to(opened, script.url)
    assert await send(smtp, 5) == [Outcome.SENT] * 5
    assert (script.connections, len(script.bodies)) == (1, 5)


async def test_there_are_as_many_as_are_needed_at_a_time(opened: AsyncExitStack, script: SmtpScript) -> None:
    everybody = asyncio.Barrier(3)
    script.before["body"] = everybody.wait  # type: ignore[assignment]
    smtp = await smtp_to(opened, script.url)
    for _ in range(2):
        await asyncio.gather(*(send(smtp) for _ in range(3)))
    assert (script.connections, len(script.bodies)) == (3, 6)


async def test_a_connection_is_left_after_so_many_messages(opened: AsyncExitStack, script: SmtpScript) -> None:
    smtp = await smtp_to(opened, script.url, messages=2)
    assert await send(smtp, 5) == [Outcome.SENT] * 5
    assert (script.connections, script.commands.count("QUIT")) == (3, 2)


async def test_what_is_idle_is_left(opened: AsyncExitStack, script: SmtpScript) -> None:
    smtp = await smtp_to(opened, script.url, idle=0.1)
    await send(smtp)

    async def left() -> bool:
        return "QUIT" in script.commands

    await eventually(left)
    assert await send(smtp) == [Outcome.SENT]
    assert script.connections == 2


async def test_the_end_leaves_politely(opened: AsyncExitStack, script: SmtpScript) -> None:
    await send(await smtp_to(opened, script.url))
    await opened.aclose()
    assert script.commands[-1] == "QUIT"


async def test_a_server_that_was_restarted_costs_no_attempt(opened: AsyncExitStack, script: SmtpScript) -> None:
    smtp = await smtp_to(opened, script.url)
    await asyncio.gather(*(send(smtp) for _ in range(3)))
    script.hang_up()
    assert await send(smtp, 3) == [Outcome.SENT] * 3
    assert len(script.bodies) == 6


@pytest.mark.parametrize(("step", "reply"), [("RCPT", "550 no such user"), ("DATA", "451 later"), ("body", "554 spam")])
async def test_a_refusal_leaves_the_connection_usable(
    opened: AsyncExitStack, script: SmtpScript, step: str, reply: str
) -> None:
    smtp = await smtp_to(opened, script.url)
    await send(smtp)
    script.replies[step] = reply
    refused = await smtp.send(LETTER, nothing)
    assert refused.outcome is (Outcome.POSTPONED if reply.startswith("4") else Outcome.REFUSED)
    del script.replies[step]
    assert await send(smtp) == [Outcome.SENT]
    assert (script.connections, script.commands.count("RSET")) == (1, 1)


async def test_a_server_that_closes_is_taken_at_its_word(opened: AsyncExitStack, script: SmtpScript) -> None:
    smtp = await smtp_to(opened, script.url)
    await send(smtp)
    script.replies["RCPT"] = "421 closing"
    assert await send(smtp) == [Outcome.POSTPONED]
    del script.replies["RCPT"]
    assert await send(smtp) == [Outcome.SENT]
    assert script.connections == 2


async def test_who_is_cancelled_leaves_no_connection_behind(opened: AsyncExitStack, script: SmtpScript) -> None:
    smtp = await smtp_to(opened, script.url)
    await send(smtp)
    reached, released = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        reached.set()
        await released.wait()

    script.before["RCPT"] = hold
    sending = asyncio.create_task(send(smtp))
    await reached.wait()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    released.set()
    script.before.clear()
    assert await send(smtp) == [Outcome.SENT]  # and gets its own answers, not those of the one before
    assert script.connections == 2


class Server:
    """A server that wants TLS, or a login, with a certificate that only `trusted` knows."""

    def __init__(self, folder: Path) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
            )
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        self.trusted = folder / "trusted.pem"
        self.trusted.write_bytes(certificate.public_bytes(pem))
        own = folder / "key.pem"
        own.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.load_cert_chain(self.trusted, own)
        self.received: list[tuple[bool, str | None]] = []  # over TLS, who had logged in

    async def handle_DATA(self, server: SMTP, session: Session, _envelope: Envelope) -> str:  # noqa: N802 - aiosmtpd's
        self.received.append((session.ssl is not None, session.auth_data))
        return "250 OK"

    async def serve(self, opened: AsyncExitStack, *, tls: str) -> str:
        """`tls`: none, starttls or implicit; a login is offered, with starttls demanded. Answers host and port."""

        def check(_server: Any, _session: Any, _envelope: Any, _mechanism: str, data: LoginPassword) -> AuthResult:
            good = (data.login, data.password) == (b"ann", b"p/w")
            return AuthResult(success=good, handled=False, auth_data=data.login.decode() if good else None)

        def protocol() -> SMTP:
            return SMTP(
                self, hostname="localhost", tls_context=self.context if tls == "starttls" else None,
                require_starttls=tls == "starttls", authenticator=check, auth_required=tls == "starttls",
                auth_require_tls=tls == "starttls", auth_exclude_mechanism=["LOGIN"], loop=asyncio.get_running_loop(),
            )  # fmt: skip

        server = await asyncio.get_running_loop().create_server(
            protocol, "127.0.0.1", 0, ssl=self.context if tls == "implicit" else None
        )
        opened.callback(server.close)
        return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


@pytest.mark.parametrize(("tls", "scheme"), [("starttls", "smtp"), ("implicit", "smtps")])
async def test_encrypted_and_with_login(
    opened: AsyncExitStack, server: Server, monkeypatch: pytest.MonkeyPatch, tls: str, scheme: str
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(server.trusted))
    place = await server.serve(opened, tls=tls)
    smtp = await smtp_to(opened, f"{scheme}://ann:p%2Fw@{place}")
    assert await send(smtp, 2) == [Outcome.SENT] * 2
    assert [who for _, who in server.received] == ["ann", "ann"]
    wrong = await smtp_to(opened, f"{scheme}://ann:wrong@{place}")
    result = await wrong.send(LETTER, nothing)
    assert result.outcome is Outcome.POSTPONED  # ours to put right, no fault of the recipient's
    assert result.reason.startswith("535")
    assert len(server.received) == 2


async def test_a_certificate_that_nobody_vouches_for_is_not_taken(opened: AsyncExitStack, server: Server) -> None:
    smtp = await smtp_to(opened, f"smtp://{await server.serve(opened, tls='starttls')}")
    assert (await send(smtp), server.received) == ([Outcome.POSTPONED], [])


async def test_a_password_is_told_to_nobody_in_the_clear(opened: AsyncExitStack, server: Server) -> None:
    smtp = await smtp_to(opened, f"smtp://ann:p%2Fw@{await server.serve(opened, tls='none')}")
    result: Result = await smtp.send(LETTER, nothing)
    assert (result.outcome, server.received) == (Outcome.POSTPONED, [])
    assert "starttls" in result.reason.lower()
