"""Email over SMTP: one attempt to send a message, with its outcome, over connections that are used again."""

import asyncio
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

import aiosmtplib

from services.notifier.channels.email import Letter
from services.notifier.models import Outcome, one_line

_QUIT_SECONDS = 2.0
_STARTTLS = {"auto": None, "always": True, "never": False}
_CLOSING = 421
_TAKEN = (250, 251)  # 251: will be forwarded


@dataclass(frozen=True)
class SmtpUrl:
    """`smtp://[user:password@]host[:port][?starttls=auto|always|never]`, or `smtps://` for TLS from the start.

    `auto` encrypts where the server offers it. It is the default, but with a password, which nobody is to overhear,
    the default is `always`.
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
        mode = query.pop("starttls", ["never" if use_tls else "always" if parts.username else "auto"])[-1]
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


@dataclass
class _Line:
    """A connection, how many messages it has carried, and since when it has been idle."""

    smtp: aiosmtplib.SMTP
    messages: int = 0
    idle_since: float = 0.0


class Smtp:
    """The server that takes our mail. Open it with `Smtp.opened`.

    There are as many connections as messages are sent at a time. One that is free carries the next message; it is
    left after so many, as servers want it, and when it has been idle for a while.
    """

    def __init__(
        self,
        url: str,
        command_seconds: float,
        data_seconds: float,
        messages_a_connection: int,
        idle_seconds: float,
    ) -> None:
        self._url = SmtpUrl.parse(url)
        self._command_seconds = command_seconds
        self._data_seconds = data_seconds
        self._messages = messages_a_connection
        self._idle_seconds = idle_seconds
        self._idle: deque[_Line] = deque()  # the longest idle first

    @asynccontextmanager
    async def opened(self) -> AsyncIterator["Smtp"]:
        """Closes what is idle for long while open, and all that is idle at the end."""
        task = asyncio.create_task(self._keep_leaving(), name="smtp-idle")
        try:
            yield self
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await asyncio.gather(*(_leave(line.smtp) for line in self._idle))
            self._idle.clear()

    async def send(self, letter: Letter, before_data: Callable[[], Awaitable[None]]) -> Result:
        """One attempt, in bounded time. `before_data` is awaited when the next step can make the message arrive;
        if it raises, nothing was sent and the error passes on.
        """
        line: _Line | None = None
        stage: Stage = "opening"
        reusable = False
        try:
            async with asyncio.timeout(2 * self._command_seconds):
                line = await self._begin(letter)
                stage = "addressed"
                await _command(line.smtp, "RCPT", f"TO:<{letter.recipient}>")
            await before_data()
            stage = "data"
            await line.smtp.data(letter.content, timeout=self._data_seconds)
            reusable = True
        except _CannotWrite as error:
            return Result(Outcome.REFUSED, str(error))
        except (aiosmtplib.SMTPException, OSError, TimeoutError) as error:
            reusable = line is not None and _is_refusal(error) and await self._is_reset(line.smtp)
            return judge(error, stage)
        finally:
            if line is not None:
                line.messages += 1
                if reusable and line.messages < self._messages:
                    line.idle_since = asyncio.get_running_loop().time()
                    self._idle.append(line)
                else:
                    await _leave(line.smtp)
        return Result(Outcome.SENT)

    async def _begin(self, letter: Letter) -> _Line:
        """A connection that has taken MAIL: the one used last, or a new one where that has gone stale."""
        if self._idle:
            line = self._idle.pop()
            try:
                await self._mail(line.smtp, letter)
            except (aiosmtplib.SMTPException, OSError):
                # Nothing was sent. The others are to the same server, and hardly better.
                line.smtp.close()
                self._close_idle()
            except BaseException:
                line.smtp.close()
                raise
            else:
                return line
        line = _Line(self._client())
        try:
            await line.smtp.connect()
            await self._mail(line.smtp, letter)
        except BaseException:
            line.smtp.close()
            raise
        return line

    @staticmethod
    async def _mail(smtp: aiosmtplib.SMTP, letter: Letter) -> None:
        if smtp.is_ehlo_or_helo_needed:
            await smtp.ehlo()
        arguments = [f"FROM:<{letter.sender}>"]
        if not letter.recipient.isascii():
            if not smtp.supports_extension("smtputf8"):
                raise _CannotWrite("the server does not take addresses with such letters")
            arguments.append("SMTPUTF8")
        await _command(smtp, "MAIL", *arguments)

    async def _is_reset(self, smtp: aiosmtplib.SMTP) -> bool:
        """Whether the connection is ready for another message after one that was refused."""
        try:
            await smtp.rset(timeout=self._command_seconds)
        except (aiosmtplib.SMTPException, OSError):
            return False
        return True

    async def _keep_leaving(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._idle_seconds / 2)
            while self._idle and self._idle[0].idle_since < loop.time() - self._idle_seconds:
                await _leave(self._idle.popleft().smtp)

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().smtp.close()

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


class _CannotWrite(Exception):
    """The server can never take this message."""


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


def _is_refusal(error: Exception) -> bool:
    """Whether the server has answered, and means to go on."""
    return isinstance(error, aiosmtplib.SMTPResponseException) and 400 <= error.code <= 599 and error.code != _CLOSING


async def _command(smtp: aiosmtplib.SMTP, verb: str, *arguments: str) -> None:
    """As the library's `mail` and `rcpt`, which take checked addresses apart once more, a third of what they cost."""
    response = await smtp.execute_command(verb.encode(), *(argument.encode() for argument in arguments))
    if response.code not in _TAKEN:
        raise aiosmtplib.SMTPResponseException(response.code, response.message)


async def _leave(smtp: aiosmtplib.SMTP) -> None:
    # Politeness, bounded; whatever it brings, what became of the message is known already.
    with suppress(aiosmtplib.SMTPException, OSError, TimeoutError):
        if smtp.is_connected:
            await smtp.quit(timeout=_QUIT_SECONDS)
    smtp.close()
