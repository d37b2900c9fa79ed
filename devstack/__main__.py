"""`python -m devstack [--stage 1..4] [--data DIR]`: run the platform until Ctrl-C (`make dev`)."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

from devstack import kafka
from devstack.stack import REPOSITORY, Stack
from devstack.supervisor import StackError
from devstack.topology import Topology

_GATEWAY_PORT = 8080
_MAIL_PORT = 1080
_STAGES = {1: "single server", 2: "balanced", 3: "cached", 4: "queued"}


class Console:
    """Lines with the time since the start; colour on a terminal only."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def step(self, line: str) -> None:
        print(f"{self._paint('2', f'{time.monotonic() - self._start:6.1f}')}  {line}", flush=True)

    def title(self, line: str) -> None:
        print(self._paint("1", line), flush=True)

    def error(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colour else text


async def dev(topology: Topology, root: Path, console: Console) -> int:
    """Run the stack until SIGINT, SIGTERM or SIGHUP, or until the stack fails. Returns the exit status."""
    stack = Stack(topology, root=root, report=console.step, gateway_port=_GATEWAY_PORT, mail_port=_MAIL_PORT)
    main = asyncio.current_task()
    asked = asyncio.Event()

    def interrupt() -> None:
        if asked.is_set():
            stack.kill_now()
            console.error("killed")
            os._exit(130)
        asked.set()
        console.step("stopping (again to kill at once)")
        if stack_starting and main is not None:
            main.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, interrupt)
    stack_starting = True
    try:
        async with stack:
            stack_starting = False
            if not asked.is_set():
                _explain(stack, console)
                waiting = asyncio.ensure_future(asked.wait())
                both: set[asyncio.Future[Any]] = {waiting, stack.failure}
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
    except asyncio.CancelledError:
        if not asked.is_set():
            raise
    except StackError as error:
        # A death was already told when it happened.
        if not (hasattr(stack, "supervisor") and stack.failure.done()):
            console.error(f"\nThe stack did not start: {error}\nAll logs are in {stack.root / 'logs'}")
        return 1
    console.step("stopped")
    return 0


def _explain(stack: Stack, console: Console) -> None:
    urls = stack.urls
    console.title("\nTenfold is running")
    lines = {
        "web page, API": urls.gateway,
        "API docs": urls.gateway and f"{urls.gateway}/api/docs",
        "mail": urls.mail,
        "postgres": urls.postgres_primary,
        "redis": urls.redis,
        f"kafka ({stack.broker_kind})": urls.kafka,
        "health, metrics": " ".join(dict.fromkeys(url for each in urls.admin.values() for url in each)),
        "logs": str(stack.root / "logs"),
        "for programs": str(stack.root / "urls.json"),
    }
    for what, where in lines.items():
        if where:
            print(f"  {what:16} {where}")
    if urls.gateway:
        console.title("\nThe flow, to paste into a second terminal in this folder")
        print(flow(urls.gateway, urls.mail, sys.executable))
    console.title(
        "Ctrl-C stops everything; the data stays for the next start (delete " + f"{stack.root / 'data'} to forget it)."
    )


def flow(gateway: str, mail: str, python: str) -> str:
    """Shell commands for each step of the main flow; they need curl and this Python only."""
    python = shlex.quote(python)
    field = f"{python} -c 'import json, sys; print(json.load(sys.stdin)"
    curl = "curl -sS -w '\\n'"
    bearer = '-H "Authorization: Bearer $TOKEN"'
    photo = 'pyvips.Image.gaussnoise(1600, 1200, mean=128, sigma=40).cast("uchar").jpegsave("photo.jpg")'
    return f"""
# register
{curl} {gateway}/api/v1/users -H 'Content-Type: application/json' \\
  -d '{{"email": "ada@example.com", "password": "correct horse battery staple", "display_name": "Ada"}}'
# log in, and keep the token
TOKEN=$(curl -sS {gateway}/api/v1/sessions -H 'Content-Type: application/json' \\
  -d '{{"email": "ada@example.com", "password": "correct horse battery staple"}}' \\
  | {field}["access_token"])')
# follow what happens, live, in the background: kill %1 ends it
curl -sSN {gateway}/api/v1/notifications/stream {bearer} &
# make a photo, and upload it
{python} -c 'import pyvips; {photo}'
ID=$(curl -sS {gateway}/api/v1/media {bearer} -H 'Content-Type: image/jpeg' \\
  --data-binary @photo.jpg | {field}["id"])')
# wait until the worker has made the variants, and list
until curl -sS {gateway}/api/v1/media/$ID {bearer} | grep -qE '"status": ?"(ready|failed)"'; do sleep 0.5; done
{curl} {gateway}/api/v1/media {bearer}
# fetch a variant
curl -sS {gateway}/api/v1/media/$ID/variants/small {bearer} -o small.webp
# the inbox
{curl} {gateway}/api/v1/notifications {bearer}
# the mails (or open {mail} in a browser)
{curl} '{mail}/messages?to=ada@example.com'
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m devstack", description="Run the platform on this machine.")
    stage = os.environ.get("STAGE") or "4"
    parser.add_argument("--stage", type=int, choices=sorted(_STAGES), default=stage, help="default: $STAGE or 4")
    parser.add_argument("--data", type=Path, default=REPOSITORY / ".devstack", help="default: .devstack")
    arguments = parser.parse_args()
    topology = Topology.stage(arguments.stage)
    console = Console()
    with contextlib.suppress(KeyboardInterrupt):
        try:
            note = kafka.plan(topology.broker).note if topology.broker != "none" else "nothing to download"
        except StackError as error:
            console.error(str(error))
            return 1
        print(note, flush=True)
        print(f"stage {arguments.stage} ({_STAGES[arguments.stage]}), data and logs in {arguments.data}", flush=True)
        return asyncio.run(dev(topology, arguments.data, console))
    return 130


if __name__ == "__main__":
    sys.exit(main())
