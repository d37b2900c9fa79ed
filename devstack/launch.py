"""Run by path as a program: become another user, tie our life to the supervisor's, then become the command.

    python -I -S launch.py PARENT_PID DEATH_SIGNAL UID GID COMMAND ARGUMENT...

It stands in for `preexec_fn`, which forks a process that has threads (a warning since Python 3.12). The order matters:
changing the user clears the parent death signal. Standard library only, it runs before any environment.
"""

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, death_signal, uid, gid = (int(value) for value in sys.argv[1:5])
    command = sys.argv[5:]
    if uid >= 0:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, death_signal)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        os._exit(127)


main()
