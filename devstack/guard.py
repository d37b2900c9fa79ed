"""Run by path as a program: ends the children when the supervisor is gone, however it went.

Reads lines `+PGID SIGNAL` and `-PGID` on stdin. At its end (the supervisor stopped, or was killed) every process group
still listed gets its signal, and SIGKILL when it is there after three seconds. The parent death signal set in
`launch.py` reaches the children alone; this one reaches their children too, and works where there is no such signal.
"""

import os
import signal
import sys
import time

_GRACE_SECONDS = 3.0


def _send(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    groups: dict[int, int] = {}
    for line in sys.stdin:
        if line.startswith("+"):
            group, number = line[1:].split()
            groups[int(group)] = int(number)
        elif line.startswith("-"):
            groups.pop(int(line[1:]), None)
    deadline = time.monotonic() + _GRACE_SECONDS
    for group, number in groups.items():
        _send(group, number)
        _send(group, signal.SIGCONT)
    while time.monotonic() < deadline and any(_send(group, 0) for group in groups):
        time.sleep(0.05)
    for group in groups:
        _send(group, signal.SIGKILL)


main()
