"""Ctrl-C while a script is still importing torch ends it in one line, like Ctrl-C later on.

A script imports this before the slow modules, and only where it is the program that runs:

    if __name__ == "__main__":
        import harness.interrupt
"""

import os
import signal
import sys


def stop(kind: int, frame: object) -> None:
    """Leave at once: nothing is open yet, and an exception could be caught inside an import."""
    sys.stderr.write("interrupted\n")
    sys.stderr.flush()
    os._exit(130)


# A shell that starts a job in the background has it ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, stop)
