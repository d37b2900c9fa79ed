"""A mail server that delivers nothing and shows everything: SMTP in, HTTP out. `python -m devstack.mail`.

    GET /messages[?to=address]   the messages, oldest first: [{id, to, from, subject, headers, text, html}]
    GET /messages/{id}           one
    DELETE /messages             forget them
    GET /recipients              {address: how many of the messages went to it}
    GET /stats                   {"received": all since the start, "kept": those in memory, "refused", "dropped"}
    PUT /faults                  {"reply": "451 try later", "times": 3, "to": "a@b.c", "drop_after_data": 2}
    GET /                        a page for people

Faults, for tests: `reply` is the SMTP answer to the end of DATA for the next `times` messages (all when it is absent)
to `to` (anybody when it is absent); `drop_after_data` closes the connection after DATA without an answer, for so many
messages; those are kept, as a real server may have done. An empty object ends all faults. The latest 10,000 messages
are kept.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import email
import email.policy
import html
import itertools
import signal
import warnings
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from email.message import EmailMessage
from functools import cached_property
from typing import Any, cast

from aiohttp import web

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from aiosmtpd.smtp import SMTP, Envelope, Session

MAX_MESSAGES = 10_000
MAX_MESSAGE_BYTES = 10 * 1024 * 1024


@dataclass(frozen=True)
class Message:
    """As it came; read when somebody looks, for a sink is to be faster than what is measured on it."""

    id: str
    recipients: list[str]
    sender: str
    content: bytes

    @cached_property
    def _parsed(self) -> EmailMessage:
        return email.message_from_bytes(self.content, _class=EmailMessage, policy=email.policy.default)

    @cached_property
    def headers(self) -> dict[str, str]:
        return {name: _header(self._parsed, name) for name in self._parsed}

    @property
    def subject(self) -> str:
        return self.headers.get("Subject") or self.headers.get("subject", "")

    @cached_property
    def text(self) -> str | None:
        return _body(self._parsed, "plain")

    @cached_property
    def html(self) -> str | None:
        return _body(self._parsed, "html")

    def as_json(self) -> dict[str, object]:
        return {
            "id": self.id, "to": self.recipients, "from": self.sender, "subject": self.subject,
            "headers": self.headers, "text": self.text, "html": self.html,
        }  # fmt: skip


@dataclass
class Faults:
    """What to do wrong; counts run down as it is done."""

    reply: str | None = None
    times: int | None = None
    to: str | None = None
    drop_after_data: int = 0

    @classmethod
    def parse(cls, body: object) -> Faults:
        """Raises ValueError for anything but the shape in the module's docstring."""
        if not isinstance(body, dict) or (unknown := set(body) - {"reply", "times", "to", "drop_after_data"}):
            raise ValueError(f"unknown fields: {', '.join(sorted(unknown))}" if isinstance(body, dict) else "no object")
        faults = cls(**body)
        if faults.reply is not None and not (isinstance(faults.reply, str) and faults.reply[:3].isdigit()):
            raise ValueError('reply must be an SMTP answer such as "451 try later"')
        if not isinstance(faults.drop_after_data, int) or not isinstance(faults.times, int | None):
            raise ValueError("times and drop_after_data must be whole numbers")  # noqa: TRY004 - the contract above
        return faults

    def answer(self, recipients: Sequence[str]) -> str | None:
        if self.reply is None or self.times == 0 or (self.to is not None and self.to not in recipients):
            return None
        if self.times is not None:
            self.times -= 1
        return self.reply


@dataclass
class Mailbox:
    """The messages, and what aiosmtpd calls to fill it."""

    messages: deque[Message] = field(default_factory=lambda: deque(maxlen=MAX_MESSAGES))
    faults: Faults = field(default_factory=Faults)
    received: int = 0
    refused: int = 0
    dropped: int = 0
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802 - aiosmtpd's
        if refusal := self.faults.answer(envelope.rcpt_tos):
            self.refused += 1
            return refusal
        self.received += 1
        content = envelope.content if isinstance(envelope.content, bytes) else str(envelope.content or "").encode()
        number = f"{next(self._ids):010d}"
        self.messages.append(Message(number, list(envelope.rcpt_tos), envelope.mail_from or "", content))
        if self.faults.drop_after_data > 0:
            self.faults.drop_after_data -= 1
            self.dropped += 1
            cast("asyncio.Transport", server.transport).abort()
        return "250 OK"


def _header(parsed: EmailMessage, name: str) -> str:
    try:
        return str(parsed[name])
    except Exception:  # noqa: BLE001 - the parser of the standard library raises many things on bad headers
        return ""


def _body(parsed: EmailMessage, kind: str) -> str | None:
    with contextlib.suppress(Exception):  # same: a sink shows what it can
        part = parsed.get_body((kind,))
        return None if part is None else str(part.get_content()).replace("\r\n", "\n")
    return None


_mailbox = web.AppKey("mailbox", Mailbox)


async def _list(request: web.Request) -> web.Response:
    to = request.query.get("to")
    messages = request.app[_mailbox].messages
    return web.json_response([m.as_json() for m in messages if to is None or to in m.recipients])


def _find(request: web.Request) -> Message:
    for message in request.app[_mailbox].messages:
        if message.id == request.match_info["id"]:
            return message
    raise web.HTTPNotFound


async def _get(request: web.Request) -> web.Response:
    return web.json_response(_find(request).as_json())


async def _clear(request: web.Request) -> web.Response:
    request.app[_mailbox].messages.clear()
    return web.Response(status=204)


async def _recipients(request: web.Request) -> web.Response:
    return web.json_response(Counter(address for m in request.app[_mailbox].messages for address in m.recipients))


async def _stats(request: web.Request) -> web.Response:
    box = request.app[_mailbox]
    return web.json_response(
        {"received": box.received, "kept": len(box.messages), "refused": box.refused, "dropped": box.dropped}
    )


async def _put_faults(request: web.Request) -> web.Response:
    try:
        request.app[_mailbox].faults = Faults.parse(await request.json())
    except ValueError as error:
        raise web.HTTPBadRequest(text=str(error)) from None
    return web.Response(status=204)


async def _page(request: web.Request) -> web.Response:
    box = request.app[_mailbox]
    rows = "".join(
        f'<tr><td><a href="/messages/{m.id}">{int(m.id)}</a><td>{html.escape(", ".join(m.recipients))}'
        f"<td>{html.escape(m.subject)}<td><details><summary>show</summary>{_shown(m)}</details>"
        for m in itertools.islice(reversed(box.messages), 100)
    )
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Mail</title><style>body{font:15px/1.5 system-ui;"
        "margin:2rem}td,th{padding:.3rem .8rem;text-align:left;vertical-align:top}iframe{width:40rem;height:24rem;"
        f"border:1px solid #ccc}}</style><h1>Mail</h1><p>{box.received} received, the latest first, at most 100 shown."
        f"<table><tr><th>no<th>to<th>subject<th>content{rows}</table>"
    )
    # What people can send us is shown, never run: no scripts at all, and frames without any right.
    policy = "default-src 'none'; style-src 'unsafe-inline'; frame-src 'self'; img-src data:"
    return web.Response(text=page, content_type="text/html", headers={"Content-Security-Policy": policy})


def _shown(message: Message) -> str:
    if message.html is not None:
        return f'<iframe sandbox srcdoc="{html.escape(message.html)}" title="message"></iframe>'
    return f"<pre>{html.escape(message.text or '')}</pre>"


def application(box: Mailbox) -> web.Application:
    app = web.Application()
    app[_mailbox] = box
    app.add_routes(
        [
            web.get("/", _page),
            web.get("/messages", _list),
            web.get("/messages/{id}", _get),
            web.delete("/messages", _clear),
            web.get("/recipients", _recipients),
            web.get("/stats", _stats),
            web.put("/faults", _put_faults),
        ]
    )
    return app


async def serve(smtp_port: int, http_port: int) -> None:
    """Serve on 127.0.0.1 until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    box = Mailbox()

    def protocol() -> Any:
        return SMTP(box, hostname="localhost", data_size_limit=MAX_MESSAGE_BYTES, enable_SMTPUTF8=True, loop=loop)

    server = await loop.create_server(protocol, "127.0.0.1", smtp_port)
    runner = web.AppRunner(application(box), access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", http_port).start()
    print(f"smtp on {smtp_port}, http on {http_port}", flush=True)
    await stopped.wait()
    server.close()
    await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m devstack.mail", description="A mail sink with an HTTP view.")
    parser.add_argument("--smtp-port", type=int, required=True)
    parser.add_argument("--http-port", type=int, required=True)
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.smtp_port, arguments.http_port))


if __name__ == "__main__":
    main()
