"""The command of tests/support/warm_python, below a line that names the interpreter: hands its program to the server.

It starts in a hundredth of a second: it imports nothing that is not needed. `served` sets the three names.
"""

import array
import os
import resource
import signal
import socket
import sys

REAL = None
SOCKET = None
WORDS = []
#: Signals that are passed on.
PASSED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


def real(words):
    """Becomes a new interpreter."""
    os.execv(REAL, [REAL, *words])


def main():
    words = [*WORDS, *sys.argv[1:]]
    if not words or "--multiprocessing-fork" in words:
        real(words)
    numbers = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.get_inheritable(int(name)):
                numbers.append(int(name))
        except OSError:  # the listing's own
            continue
    ignored = [name for name in PASSED if signal.getsignal(getattr(signal, name)) == signal.SIG_IGN]
    mask = os.umask(0)
    os.umask(mask)
    kinds = [name for name in sorted(dir(resource)) if name.startswith("RLIMIT_")]
    request = {
        "words": words,
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
        "files": numbers,
        "ignored": ignored,
        "umask": mask,
        "limits": [resource.getrlimit(getattr(resource, name)) for name in kinds],
        "processors": sorted(os.sched_getaffinity(0)),
    }
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(SOCKET)
    except OSError:
        real(words)
    data = repr(request).encode("utf-8", "surrogateescape")
    files = array.array("i", numbers)
    connection.sendmsg([len(data).to_bytes(8, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    connection.sendall(data)
    for name in PASSED:
        if name not in ignored:
            number = getattr(signal, name)
            signal.signal(number, lambda number, _: connection.send(bytes([number])))
    answer = connection.recv(4, socket.MSG_WAITALL)
    if answer != b"fork":  # it cannot be one, or there is no server any more
        real(words)
    status = connection.recv(4, socket.MSG_WAITALL)
    status = int.from_bytes(status, "little") if len(status) == 4 else 1 << 8
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


main()
