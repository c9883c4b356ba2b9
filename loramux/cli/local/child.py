"""Runs a command that dies with its parent: ``python -m loramux.cli.local.child PARENT_PID PROGRAM ARG...``.

Linux signals a process whose parent thread ends, whatever ended it, once the process asked for that. Asking
here, in a process of its own that then becomes the program, needs no Python code between fork and exec of
the parent, which may have threads. Elsewhere only a parent that ends in order stops its children.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Tie this process to its parent, then become the program."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent died before the call
        sys.exit(1)
    os.execv(program[0], program)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main()
