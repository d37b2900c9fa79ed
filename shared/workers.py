"""`WORKERS=n`: several processes on one machine that share a port, for one process is one event loop and one core.

They are forked before anything is opened. Each has connections, metrics and an admin port of its own (`ADMIN_PORT`, the
next one, ...); the kernel spreads callers over them (SO_REUSEPORT). On a cluster a pod is one process instead.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable

from shared.logs import get_logger

log = get_logger()

_TOO_SOON_SECONDS = 5.0
_STOP = frozenset({signal.SIGTERM, signal.SIGINT})


def run(number: int, work: Callable[[int], int]) -> int:
    """Run `work(0)` ... `work(number - 1)`, each in a process of its own, until told to stop; returns the exit status.

    One that ends by itself is started anew; when it did not even live for five seconds all of them are stopped, and its
    status is the answer. They end with this process, whatever ends it.
    """
    watched = _STOP | {signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    alive = os.pipe()
    running: dict[int, tuple[int, float]] = {}  # by process id: which one, since when
    for index in range(number):
        running[_fork(index, work, alive)] = index, time.monotonic()
    status, stopping = 0, False
    while running:
        if signal.sigwait(watched) in _STOP:
            stopping = True
            _stop(running)
        for pid, code in _ended(running):
            index, since = running.pop(pid)
            if stopping:
                status = status or code
            elif time.monotonic() - since < _TOO_SOON_SECONDS:
                status, stopping = code or 1, True
                _stop(running)
            else:
                log.warning("worker_ended", worker=index, status=code)
                running[_fork(index, work, alive)] = index, time.monotonic()
    return status


def _fork(index: int, work: Callable[[int], int], alive: tuple[int, int]) -> int:
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    # The pipe's other end closes when our parent is gone, and a thread notices even if the loop is busy.
    os.close(alive[1])
    threading.Thread(target=_end_with_parent, args=(alive[0],), name="parent", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP | {signal.SIGCHLD})
    status = 1
    try:
        status = work(index)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _end_with_parent(alive: int) -> None:
    os.read(alive, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _ended(running: Iterable[int]) -> list[tuple[int, int]]:
    """Process ids and exit statuses of those that have ended; a signal counts as a failure."""
    found = []
    for pid in running:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            found.append((pid, code if code >= 0 else 1))
    return found


def _stop(running: Iterable[int]) -> None:
    for pid in running:
        os.kill(pid, signal.SIGTERM)
