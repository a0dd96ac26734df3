"""Runs a command in a session of its own, and takes it down with all that it has started when standard input ends.

A script by itself, of the standard library alone: watcher.py SECONDS COMMAND… The other end of standard input is held by
model-compose: it lets go of it to stop the command, and the kernel does so where model-compose is killed. SECONDS pass
between SIGTERM and SIGKILL.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

PR_SET_PDEATHSIG = 1


def main() -> int:
    patience, command = float(sys.argv[1]), sys.argv[2:]
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_this_process
        )
    except OSError as error:
        print(f"{command[0]} cannot be run ({error.strerror})", file=sys.stderr)
        return 127
    threading.Thread(target=_take_down, args=(child, patience), daemon=True).start()
    code = child.wait()
    _kill_group(child.pid)  # what the command has left running
    return code if code >= 0 else 128 - code


def _end_with_this_process() -> None:
    """In the command's process, on Linux: somebody may kill the watcher as well."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _take_down(child: "subprocess.Popen[bytes]", patience: float) -> None:
    while os.read(sys.stdin.fileno(), 4096):  # empty at the end of the stream
        pass
    child.terminate()  # it alone: it ends its own processes in order
    time.sleep(patience)  # this process leaves earlier where the command obeys
    _kill_group(child.pid)


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
