"""The process of tests/support/warm_python that forks: imports at its first program, and ends with its parent.

    python server.py SOCKET COMMAND

One thread, one loop: a fork of a process with threads may have locks that nobody opens. Nothing of megatron_mm and
nothing of megatron-core is imported: programs choose the checkout, and the platform redirects megatron-core first.
"""

from __future__ import annotations

import array
import ast
import atexit
import contextlib
import os
import resource
import selectors
import signal
import socket
import sys
import threading
from importlib import import_module
from typing import NoReturn

#: What programs import of other packages and takes its time.
IMPORTED = (
    "concurrent.futures.process",
    "multiprocessing.spawn",
    "numpy",
    "PIL.Image",
    "pydantic",
    "sentencepiece",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint",
    "torch.distributed.run",
    "torch.distributed.tensor",
    "torch.utils.data",
    "torch.utils.tensorboard",
    "transformers.generation",
    "transformers.modeling_utils",
    "tyro",
    "yaml",
)
#: Variables that are read when packages are imported, by the beginnings of their names; and those that are not, or of
#: which nothing depends but what is logged, or what CUDA does once it is used.
_READ = (
    *("OMP_", "MKL_", "KMP_", "TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "PYTHON"),
    *("CUDA_", "LD_", "MALLOC_", "GLIBC_", "TQDM_", "NLTK_", "XDG_", "HOME", "TMPDIR", "LANG", "LC_", "TZ"),
)
_NOT_READ = (
    *("PYTHONPATH", "PYTHONSAFEPATH", "PYTHON_EXEC", "TORCH_CPP_LOG_LEVEL", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"),
    *("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCHINDUCTOR_CACHE_DIR", "HF_MODULES_CACHE"),
    *("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF"),
)
#: Signals that a command passes on.
_PASSED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
#: Folders that this server was told of, and a program perhaps not.
_OWN_PATH = os.environ.get("PYTHONPATH", "").split(os.pathsep)


def _read(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ) and name not in _NOT_READ}


def _limits() -> list[tuple[int, int]]:
    return [resource.getrlimit(getattr(resource, name)) for name in sorted(dir(resource)) if name.startswith("RLIMIT_")]


class Server:
    """Takes programs, forks, and tells each command how its program ended.

    Args:
        path: of the socket.
        command: what a program calls as its interpreter.
    """

    def __init__(self, path: str, command: str) -> None:
        self._command = command
        self._parent = os.getppid()
        self._ready = False
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(64)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._processes: dict[int, tuple[socket.socket, int]] = {}
        """Connection and file descriptor of each fork, by its number."""
        self._environment, self._limits = _read(dict(os.environ)), _limits()
        self._processors = sorted(os.sched_getaffinity(0))

    def program(self) -> dict:
        """Returns in a fork, with the program that it is to run; the server itself ends."""
        while os.getppid() == self._parent:
            for key, _ in self._selector.select(timeout=1):
                if key.data is None:
                    connection, _ = self._listener.accept()
                    if request := self._taken(connection):
                        return request
                elif key.fileobj in self._connections():
                    self._passed_on(*key.data)
                elif key.data[0] in self._processes:
                    self._ended(key.data[0])
        self.end()

    def _connections(self) -> list[socket.socket]:
        return [connection for connection, _ in self._processes.values()]

    def end(self, *_) -> None:
        """Ends all forks and this process."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        os._exit(0)

    def _taken(self, connection: socket.socket) -> dict | None:
        """The program in a fork; None in the server."""
        files = array.array("i")
        try:
            head, control, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(64 * files.itemsize))
            for level, kind, data in control:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    files.frombytes(data[: len(data) - len(data) % files.itemsize])
            size, data = int.from_bytes(head, "little"), b""
            while len(data) < size and (more := connection.recv(size - len(data))):
                data += more
            request = ast.literal_eval(data.decode("utf-8", "surrogateescape")) if size == len(data) > 0 else None
            if request and not self._can(request):
                connection.sendall(b"real")
                request = None
            if request:
                if not self._ready:
                    self._prepare()
                connection.sendall(b"fork")
        except OSError:  # its command was killed
            request = None
        if request is None:
            self._close(connection, files)
            return None
        # No handler of this server runs in the fork: one would end its neighbours.
        signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED)
        process = os.fork()
        if process == 0:
            self._become(request, files, connection)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED)
            return request
        with contextlib.suppress(OSError):  # the fork does so too: whoever is first
            os.setpgid(process, process)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED)
        for number in files:
            os.close(number)
        handle = os.pidfd_open(process)
        self._processes[process] = connection, handle
        self._selector.register(connection, selectors.EVENT_READ, (process,))
        self._selector.register(handle, selectors.EVENT_READ, (process,))
        return None

    @staticmethod
    def _close(connection: socket.socket, files: array.array) -> None:
        connection.close()
        for number in files:
            os.close(number)

    def _can(self, request: dict) -> bool:
        """Whether a fork is what the program asks for."""
        words = request["words"]
        while words and words[0] in ("-u", "-B"):
            words = words[1:]
        if not words or (words[0].startswith("-") and (words[0] not in ("-c", "-m") or len(words) < 2)):
            return False
        asked = {
            **_read(request["environment"]),
            "limits": [tuple(limit) for limit in request["limits"]],
            "processors": request["processors"],
        }
        have = {**self._environment, "limits": self._limits, "processors": self._processors}
        if others := [name for name in {*asked, *have} if asked.get(name) != have.get(name)]:
            print(f"a new interpreter for {' '.join(words)[:80]!r}: another {', '.join(sorted(others))}", flush=True)
        return not others

    def _prepare(self) -> None:
        import gc

        for name in IMPORTED:
            import_module(name)
        threads = os.listdir("/proc/self/task")
        if len(threads) > 1:
            raise RuntimeError(f"{len(threads)} threads run after the imports, so that no fork is safe")
        gc.collect()
        gc.freeze()
        self._ready = True

    def _passed_on(self, process: int) -> None:
        """A signal's number from a command, or its end."""
        connection, _ = self._processes[process]
        try:
            data = connection.recv(64)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(connection)
            with contextlib.suppress(ProcessLookupError):  # with what it has started, as its command's group is
                os.killpg(process, signal.SIGKILL)
        for number in data:
            os.kill(process, number)

    def _ended(self, process: int) -> None:
        connection, handle = self._processes.pop(process)
        _, status = os.waitpid(process, 0)
        for file in (connection, handle):
            with contextlib.suppress(KeyError):
                self._selector.unregister(file)
        with contextlib.suppress(OSError):
            connection.sendall(status.to_bytes(4, "little"))
        connection.close()
        os.close(handle)

    def _become(self, request: dict, files: array.array, connection: socket.socket) -> None:
        """Makes this fork what a new interpreter would be."""
        os.setpgid(0, 0)
        self._selector.close()
        self._listener.close()
        connection.close()
        for other, handle in self._processes.values():
            other.close()
            os.close(handle)
        self._processes.clear()
        # First out of the way of the numbers that they are to have.
        beyond = max([*request["files"], *files, 2]) + 1
        moved = [os.dup2(number, beyond + place, inheritable=False) for place, number in enumerate(files)]
        for number in files:
            os.close(number)
        for number in {0, 1, 2} - set(request["files"]):
            os.close(number)
        for wanted, number in zip(request["files"], moved, strict=True):
            os.dup2(number, wanted)
            os.close(number)
        for number in _PASSED:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for name in request["ignored"]:
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        os.chdir(request["cwd"])
        os.umask(request["umask"])
        environment = request["environment"]
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        import numpy as np

        np.random.seed()
        sys.executable = self._command
        # What transformers took from the environment when it was imported.
        if folder := environment.get("HF_MODULES_CACHE"):
            for module in [module for name, module in sys.modules.items() if name.startswith("transformers.")]:
                if "HF_MODULES_CACHE" in vars(module):
                    module.HF_MODULES_CACHE = folder


def run(words: list[str]) -> None:
    """What the interpreter does with its arguments."""
    while words[0] in ("-u", "-B"):
        if words[0] == "-u":
            sys.stdout.reconfigure(write_through=True)
        else:
            sys.dont_write_bytecode = True
        words = words[1:]
    told = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    more = [*told, *(path for path in sys.path[1:] if path not in _OWN_PATH and path not in told)]
    safe = bool(os.environ.get("PYTHONSAFEPATH"))  # nothing is looked for in the folder of work or of the program
    main = type(sys)("__main__")
    main.__builtins__ = __builtins__
    sys.modules["__main__"] = main
    if words[0] == "-m":
        import runpy

        sys.path[:] = [*([] if safe else [os.getcwd()]), *more]
        sys.argv = ["-m", *words[2:]]
        runpy._run_module_as_main(words[1])
        return
    if words[0] == "-c":
        sys.path[:] = [*([] if safe else [""]), *more]
        sys.argv = ["-c", *words[2:]]
        code = compile(words[1], "<string>", "exec")
    else:
        sys.path[:] = [*([] if safe else [os.path.dirname(os.path.realpath(words[0]))]), *more]
        sys.argv = words
        main.__file__ = words[0]
        try:
            with open(words[0], "rb") as stream:
                code = compile(stream.read(), words[0], "exec")
        except OSError as error:
            sys.exit(f"python: can't open file {words[0]!r}: [Errno {error.errno}] {error.strerror}")
    exec(code, main.__dict__)


def finish(words: list[str]) -> NoReturn:
    """Runs a program and ends as the interpreter would, but for taking all modules apart, which takes half a second."""
    status, interrupted = 0, False
    try:
        run(words)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        status, interrupted = 1, isinstance(error, KeyboardInterrupt)
        error.__traceback__ = error.__traceback__.tb_next.tb_next
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            status = status or 120
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    # The terminal's interrupt goes to pytest, which ends this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = Server(*sys.argv[1:])
    signal.signal(signal.SIGTERM, server.end)
    request = server.program()
    del server
    finish(request["words"])
