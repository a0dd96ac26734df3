"""Runs a command in a session of its own, and kills the command and its children when standard input ends.

A script that uses only the standard library: watcher.py SECONDS COMMAND… model-compose holds the other end of standard
input. It closes that end to stop the command; if model-compose is killed, the kernel closes it. SECONDS pass between
SIGTERM and SIGKILL.
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
    threading.Thread(target=_stop_at_end_of_input, args=(child, patience), daemon=True).start()
    code = child.wait()
    _kill_group(child.pid)  # processes that the command has left running
    return code if code >= 0 else 128 - code


def _end_with_this_process() -> None:
    """Runs in the command's process. On Linux, the kernel then ends the command even if the watcher is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop_at_end_of_input(child: "subprocess.Popen[bytes]", patience: float) -> None:
    while os.read(sys.stdin.fileno(), 4096):  # returns b"" at the end of the stream
        pass
    child.terminate()  # only the command, so that it can stop its own processes in order
    time.sleep(patience)  # if the command obeys, main returns and this daemon thread ends with the process
    _kill_group(child.pid)


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
