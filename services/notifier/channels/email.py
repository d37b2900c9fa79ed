"""Composing email: what one recipient gets, as the bytes that go over the wire.

What people wrote, the sender and the subject, goes through the standard library's `EmailMessage`, once for all who get
the same subject. What differs by recipient is written out here, for to a campaign the library would cost more than all
else together: checked addresses, encoded names, and two bodies that are quoted-printable, so no line of theirs can be
a boundary.
"""

import binascii
import email.policy
from datetime import datetime
from email.header import Header
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import format_datetime, parseaddr
from functools import lru_cache

import msgspec

from services.notifier.models import Content, is_sendable, one_line
from shared.clock import Clock

_SUBJECTS = 64
_BOUNDARY = "=_tenfold"  # quoted-printable text never has `=_`
_CTE = "Content-Transfer-Encoding: quoted-printable"


class NotSendable(ValueError):
    """There is no way to send to this address, now or later."""


class Letter(msgspec.Struct, frozen=True):
    """A message in its envelope."""

    sender: str
    recipient: str
    content: bytes


class Composer:
    """Makes messages from one sender's address."""

    def __init__(self, mail_from: str, clock: Clock) -> None:
        name, address = parseaddr(mail_from)
        self._sender = Address(one_line(name), addr_spec=_checked(address))
        self._clock = clock
        self._head = lru_cache(maxsize=_SUBJECTS)(self._make_head)

    @property
    def domain(self) -> str:
        """Where message ids are from."""
        return self._sender.domain

    def compose(
        self, content: Content, to_name: str, to_address: str, message_id: str, unsubscribe_url: str | None = None
    ) -> Letter:
        """Raises `NotSendable` for addresses that no server takes. What people wrote cannot add a header.

        With `unsubscribe_url` mail programs offer to unsubscribe by one click (RFC 8058).
        """
        address = _checked(to_address)
        lines = [
            f"To: {_mailbox(to_name, address)}",
            f"Date: {_date(self._clock.now())}",
            f"Message-ID: {message_id}",
        ]
        if unsubscribe_url is not None:
            lines.append(f"List-Unsubscribe: <{unsubscribe_url}>")
            lines.append("List-Unsubscribe-Post: List-Unsubscribe=One-Click")
        lines.append(f'Content-Type: multipart/alternative; boundary="{_BOUNDARY}"')
        parts = [_part("plain", content.text), _part("html", content.html), f"--{_BOUNDARY}--\r\n".encode()]
        head = self._head(one_line(content.subject)) + "\r\n".join(lines).encode()
        return Letter(self._sender.addr_spec, address, b"\r\n\r\n".join([head, b"".join(parts)]))

    def _make_head(self, subject: str) -> bytes:
        """The headers that do not depend on the recipient."""
        message = EmailMessage(policy=email.policy.SMTP)
        message["From"] = self._sender
        message["Subject"] = subject
        message["Auto-Submitted"] = "auto-generated"  # so that nobody's auto-reply answers (RFC 3834)
        message["MIME-Version"] = "1.0"
        return message.as_bytes().removesuffix(b"\r\n")


def _checked(address: str) -> str:
    """The address as it may stand in a command and in a header, its domain in ASCII."""
    if not is_sendable(address):
        raise NotSendable("the address cannot be written to")
    local, _, domain = address.rpartition("@")
    try:
        return f"{local}@{domain.encode('idna').decode()}"
    except ValueError as error:
        raise NotSendable("the address cannot be written to") from error


def _mailbox(name: str, address: str) -> str:
    shown = one_line(name)
    if not shown:
        return address
    if not shown.isascii() or "=?" in shown:  # which some programs decode even where it stands in quotes
        encoded = Header(shown, "utf-8", header_name="To").encode(linesep="\r\n")
        return f"{encoded} <{address}>"
    escaped = shown.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}" <{address}>'


def _part(kind: str, text: str) -> bytes:
    head = f'--{_BOUNDARY}\r\nContent-Type: text/{kind}; charset="utf-8"\r\n{_CTE}\r\n\r\n'
    # The first line end decides how long lines are broken, so there has to be one.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n") + "\n"
    return head.encode() + binascii.b2a_qp(lines.replace("\n", "\r\n").encode(), istext=True) + b"\r\n"


@lru_cache(maxsize=2)
def _format_second(moment: datetime) -> str:
    return format_datetime(moment)


def _date(now: datetime) -> str:
    return _format_second(now.replace(microsecond=0))
