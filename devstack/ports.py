"""Free ports of 127.0.0.1."""

import random
import socket
from contextlib import ExitStack

# Below the range from which the kernel takes ports for outgoing connections (32768 and up): a port found free there by
# binding to 0 can be taken by any connection before the server it is meant for has started.
_FIRST, _LAST = 15_000, 32_000
_random = random.SystemRandom()


def free_ports(count: int) -> list[int]:
    """`count` different ports that nothing listens on now."""
    ports: list[int] = []
    with ExitStack() as held:
        for _ in range(100 * (count + 1)):
            if len(ports) == count:
                return ports
            port = _random.randint(_FIRST, _LAST)
            if port not in ports and (taken := _bind(port)):
                held.enter_context(taken)
                ports.append(port)
    if len(ports) == count:
        return ports
    raise OSError(f"found no {count} free ports between {_FIRST} and {_LAST}")


def free_port(preferred: int | None = None) -> int:
    """`preferred` when nothing listens on it, else another."""
    if preferred is not None and (taken := _bind(preferred)):
        taken.close()
        return preferred
    return free_ports(1)[0]


def _bind(port: int) -> socket.socket | None:
    sock = socket.socket()
    # As servers do it, so a port with connections in TIME_WAIT counts as free.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(("127.0.0.1", port))
        sock.listen(1)
    except OSError:
        sock.close()
        return None
    return sock
