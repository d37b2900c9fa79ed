"""Email over SMTP: composing a message, and one attempt to send it with its outcome."""

import asyncio
import email.policy
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import format_datetime, parseaddr
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

import aiosmtplib

from services.notifier.models import Content, Outcome, is_sendable, one_line
from shared.clock import Clock

_QUIT_SECONDS = 2.0
# Bodies in seven bits: not every server says 8BITMIME.
_ASCII = email.policy.SMTP.clone(cte_type="7bit")
_UTF8 = email.policy.SMTPUTF8.clone(cte_type="7bit")
_STARTTLS = {"auto": None, "always": True, "never": False}


class NotSendable(ValueError):
    """There is no way to send to this address, now or later."""


@dataclass(frozen=True)
class SmtpUrl:
    """`smtp://[user:password@]host[:port][?starttls=auto|always|never]`, or `smtps://` for TLS from the start.

    `auto` (the default) encrypts where the server offers it.
    """

    hostname: str
    port: int
    username: str | None
    password: str | None
    use_tls: bool
    start_tls: bool | None

    @classmethod
    def parse(cls, url: str) -> "SmtpUrl":
        """Raises `ValueError`; its message does not repeat the URL, which may hold a password."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            raise ValueError("its port must be a number from 0 to 65535") from None
        if parts.scheme not in ("smtp", "smtps") or not parts.hostname:
            raise ValueError("must be smtp://host:port or smtps://host:port")
        use_tls = parts.scheme == "smtps"
        query = parse_qs(parts.query)
        mode = query.pop("starttls", ["never" if use_tls else "auto"])[-1]
        if query or mode not in _STARTTLS:
            raise ValueError("takes no other option than starttls=auto|always|never")
        return cls(
            hostname=parts.hostname,
            port=port or (465 if use_tls else 587 if parts.username else 25),
            username=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
            use_tls=use_tls,
            start_tls=_STARTTLS[mode],
        )


@dataclass(frozen=True)
class Result:
    """`bounced`: the server knows no such address, or takes nothing for it."""

    outcome: Outcome
    reason: str = ""
    bounced: bool = False


class Composer:
    """Makes messages from one sender's address."""

    def __init__(self, mail_from: str, clock: Clock) -> None:
        name, address = parseaddr(mail_from)
        self._from = _address(name, address)
        self._clock = clock

    @property
    def domain(self) -> str:
        """Where message ids are from."""
        return self._from.domain

    def compose(
        self, content: Content, to_name: str, to_address: str, message_id: str, unsubscribe_url: str | None = None
    ) -> EmailMessage:
        """Raises `NotSendable` for addresses that no server takes. What people wrote cannot add a header.

        With `unsubscribe_url` mail programs offer to unsubscribe by one click (RFC 8058).
        """
        message = EmailMessage(policy=_ASCII)
        message["From"] = self._from
        message["To"] = _address(to_name, to_address)
        message["Subject"] = one_line(content.subject)
        message["Date"] = format_datetime(self._clock.now())
        message["Message-ID"] = message_id
        message["Auto-Submitted"] = "auto-generated"  # so that nobody's auto-reply answers (RFC 3834)
        if unsubscribe_url is not None:
            message["List-Unsubscribe"] = f"<{unsubscribe_url}>"
            message["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
        message.set_content(content.text)
        message.add_alternative(content.html, subtype="html")
        return message


def _address(name: str, address: str) -> Address:
    if not is_sendable(address):
        raise NotSendable("the address cannot be written to")
    local, _, domain = address.rpartition("@")
    try:
        return Address(one_line(name), local, domain.encode("idna").decode())
    except ValueError as error:
        raise NotSendable("the address cannot be written to") from error


class Smtp:
    """The server that takes our mail; a connection for each message."""

    def __init__(self, url: str, command_seconds: float, data_seconds: float) -> None:
        self._url = SmtpUrl.parse(url)
        self._command_seconds = command_seconds
        self._data_seconds = data_seconds

    async def send(self, message: EmailMessage, before_data: Callable[[], Awaitable[None]]) -> Result:
        """One attempt, in bounded time. `before_data` is awaited when the next step can make the message arrive;
        if it raises, nothing was sent and the error passes on.
        """
        stage: Stage = "opening"
        smtp = self._client()
        sender, recipient = _envelope(message, "From"), _envelope(message, "To")
        try:
            async with asyncio.timeout(2 * self._command_seconds):
                await smtp.connect()
                international = not recipient.isascii()
                if international and not smtp.supports_extension("smtputf8"):
                    return Result(Outcome.REFUSED, "the server does not take addresses with such letters")
                options, encoding = (["SMTPUTF8"], "utf-8") if international else ([], "ascii")
                await smtp.mail(sender, options=options, encoding=encoding)
                stage = "addressed"
                await smtp.rcpt(recipient, encoding=encoding)
            content = message.as_bytes(policy=_UTF8 if international else _ASCII)
            await before_data()
            stage = "data"
            await smtp.data(content, timeout=self._data_seconds)
        except (aiosmtplib.SMTPException, OSError, TimeoutError) as error:
            return judge(error, stage)
        finally:
            await _leave(smtp)
        return Result(Outcome.SENT)

    def _client(self) -> aiosmtplib.SMTP:
        return aiosmtplib.SMTP(
            hostname=self._url.hostname,
            port=self._url.port,
            username=self._url.username,
            password=self._url.password,
            use_tls=self._url.use_tls,
            start_tls=self._url.start_tls,
            local_hostname=socket.gethostname(),  # the default would ask the name service, which may take its time
            timeout=self._command_seconds,
        )


# opening: up to and with MAIL; addressed: RCPT; data: from DATA on.
Stage = Literal["opening", "addressed", "data"]


def judge(error: Exception, stage: Stage) -> Result:
    """What a failure at this stage means. A refusal counts as final only where it is about this message or address:
    a 5xx before RCPT (login, sender, policy) would be the same for every email, and is ours to put right."""
    if isinstance(error, aiosmtplib.SMTPResponseException) and 400 <= error.code <= 599:
        final = error.code >= 500 and stage != "opening"
        reason = f"{error.code} {one_line(str(error.message))}"
        return Result(Outcome.REFUSED if final else Outcome.POSTPONED, reason, final and stage == "addressed")
    reason = f"{type(error).__name__}: {one_line(str(error))}"
    return Result(Outcome.AMBIGUOUS if stage == "data" else Outcome.POSTPONED, reason)


def _envelope(message: EmailMessage, header: str) -> str:
    address: str = message[header].addresses[0].addr_spec
    return address


async def _leave(smtp: aiosmtplib.SMTP) -> None:
    # Politeness, bounded; whatever it brings, what became of the message is known already.
    with suppress(aiosmtplib.SMTPException, OSError, TimeoutError):
        if smtp.is_connected:
            await smtp.quit(timeout=_QUIT_SECONDS)
    smtp.close()
