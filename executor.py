"""The executor: a persistent Python session for model-written code, isolated in processes of its own.

Owns both sides of the sandbox. Tools are passed in as plain callables; nothing here knows of models or tasks.

Read in this order: `Limits`, `StepResult`, `Session.run` and `_listen` (a step as the host sees it), `Executor` (how a
sandbox is started), and below the line the code that runs inside: `zygote` -> `session` -> `Worker`.

    host (trainer) ---> bwrap ---> zygote: Python with the usual libraries imported; forks one tree per session
                                     `-- session: process 1 of its own namespaces; trusted, never runs model code
                                           |-- runner: runs the model's code, step after step, as one process
                                           `-- keeper: the runner's fork from before this step, stopped; takes over
                                                       when the step has to be killed (memory rolls back, files do not)

Two sockets lead to a session. `ctl` (host <-> session) is trusted: go, interrupt, settle, rollback, and how a runner
died. `wire` (host <-> runner) is hostile: length-prefixed JSON, bounded and checked, with tool calls, answers and what
the step came to. Output goes into a memfd that the host owns. The clock and the status are the host's; a runner can
only claim "ok" or "error", which code could also do with `try: ... except: pass`. After a step all its processes but
the runner are killed and the runner is stopped, threads included, until the next step.

`bwrap` covers: an unprivileged uid without capabilities; own user, mount, pid, ipc, uts and network namespaces;
  only /usr, the interpreter and its packages are visible, read-only; one private tmpfs of `disk_mb` (/tmp, /dev/shm)
  per session; no sockets at all (seccomp), so no loopback, vsock, netlink or abstract names; no ptrace, mount, unshare,
  io_uring, bpf, keyctl, memfd, SysV memory (seccomp); limits on memory, processes, descriptors and file size.
  It does not cover: bugs of the kernel, side channels, and CPU time of other sessions while a step runs.
`none` covers: an empty environment, resource limits, the same seccomp filter (no sockets), no capabilities, and the
  killing of what a step leaves. It does not cover files: code reads and writes whatever the trainer's uid may
  (task files with their answers too, if they lie on a readable disk), sees other processes and may signal them.
In both modes expected answers never enter the sandbox, and the trainer's memory and environment cannot be read from it.
"""
import dataclasses
import inspect
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tools import UserError

UNPRIVILEGED = 65534            # the uid a root trainer drops to before anything else


class SandboxError(UserError):
    """The sandbox that was asked for does not work on this machine."""


class SessionLost(Exception):
    """The host's side failed (no process, no memory), not the code: the trajectory has no valid outcome."""


class WireError(Exception):
    """The runner died, or sent what it must not; the text says what, for the model to read."""


class Killed(WireError):
    """The host's decision: the step has to be killed."""


@dataclass(frozen=True)
class Limits:
    """What one session may use."""
    seconds: float = 20.0           # a step, tool calls included
    grace: float = 1.0              # how much longer a step may take to be interrupted or killed
    memory_mb: int = 1024           # address space of one process; all processes together: three times as much resident
    output_chars: int = 20_000      # of output, value and error, each
    tool_calls: int = 50            # a session
    disk_mb: int = 64               # besides the attachments; also the largest file and the most output
    processes: int = 64             # processes and threads at once
    rollback: bool = True           # keep the state before each step (a fork, 1-2 ms); without, a kill costs the session's state


@dataclass
class StepResult:
    """What one step came to. `status` is what the host found:
    ok; error (an exception); timeout (interrupted, variables kept); killed (it did not react, or used too much memory)
    and crashed (its process died or broke the protocol): both rolled back to the state before the step."""
    status: str = "ok"
    output: str = ""                # stdout and stderr in order, cut in the middle
    value: str | None = None        # repr of a last bare expression
    error: str | None = None        # the traceback, only the model's own lines
    seconds: float = 0.0
    answered: bool = False
    answer: str | None = None
    tool_calls: int = 0

    def observation(self) -> str:
        """What the model reads: output, value and error."""
        parts = [part.rstrip("\n") for part in (self.output, self.value, self.error) if part]
        return "\n".join(parts) or "(no output)"


class Session:
    """One trajectory's Python. `run` is for one thread at a time; other sessions run beside it."""

    def __init__(self, executor: "Executor", tools: Mapping[str, Callable], files: Mapping[str, Path | bytes]):
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
                raise UserError(f"a file of a session needs a relative name inside its directory, not {name!r}")
        self.executor, self.tools, self.files = executor, dict(tools), dict(files)
        self.limits, self.tool_calls, self.workdir = executor.limits, 0, None
        if executor.sandbox == "none":
            self.workdir = Path(tempfile.mkdtemp(dir=executor.base))
        self._lock, self._deadline, self._ctl = threading.Lock(), 0.0, None
        self._start()

    # --- what a caller uses ---

    def run(self, code: str, seconds: float | None = None) -> StepResult:
        """Run one step of at most `seconds` (plus the grace). Raises nothing for what the code does, only SessionLost."""
        with self._lock, self.executor.slots:           # the clock starts when a slot is free
            if self._ctl is None:
                raise SessionLost("the session is closed")
            result, start = StepResult(), time.monotonic()
            self._deadline = start + (self.limits.seconds if seconds is None else seconds)
            try:
                self._step(code, result)
            except BaseException:                       # Ctrl-C in the trainer: nobody knows what the runner is doing
                self._stop()
                raise
            result.seconds = time.monotonic() - start
            return result

    def seconds_left(self) -> float:
        """Until the running step's time is up."""
        return max(0.0, self._deadline - time.monotonic())

    def close(self) -> None:
        """End the session; its processes and files go with it."""
        with self._lock:
            self._stop()
            if self.workdir is not None:
                shutil.rmtree(self.workdir, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    # --- one step ---

    def _step(self, code: str, result: StepResult) -> None:
        os.ftruncate(self._out, 0)
        os.lseek(self._out, 0, os.SEEK_SET)             # runner and host share the file offset
        self._keeper, done, note = 0, None, None
        try:
            self._order("go")
            send_frame(self._wire, {"run": code})
            done = self._listen(result)
            late = time.monotonic() > self._deadline
            result.status = "timeout" if late else "ok" if done["done"] == "ok" else "error"
            result.value, result.error = (text and cut(text, self.limits.output_chars) for text in (done["value"], done["error"]))
            note = "stopped: its time was up. Variables set so far are kept." if late else None
        except (WireError, OSError) as problem:
            result.status = "killed" if isinstance(problem, Killed) else "crashed"
            note = f"{problem}. " + self._rollback()
        else:
            self._order("settle")
        result.output = self._output()
        if note:
            result.error = (result.error or "") + f"[This step was {result.status}: {note}]"

    def _listen(self, result: StepResult) -> dict:
        """Serve the step until its `done` frame. Raises Killed when it reacts to nothing, WireError when it broke."""
        interrupts = 0
        while True:
            now, interrupt_at = time.monotonic(), self._deadline + 0.1 * interrupts
            if now >= self._deadline + 0.7 * self.limits.grace:
                raise Killed("its time was up and it did not react to being interrupted")
            if now >= interrupt_at:
                self._order("interrupt")
                interrupts += 1
            frame = self._receive(interrupt_at)
            if frame is None:
                continue
            kind = next(iter(frame), None)
            if kind == "started" and not self._keeper:
                self._keeper = frame["started"]
            elif kind == "answer":
                if not result.answered:
                    result.answered, result.answer = True, frame["answer"][:MAX_ANSWER]
            elif kind == "call":
                self._call(frame, result)
            elif kind == "done":
                return frame
            else:
                raise WireError("it broke the protocol between sandbox and host")

    def _receive(self, until: float) -> dict | None:
        """The next valid frame from the runner, None at `until`. Raises WireError for anything else."""
        while True:
            try:
                frame = take_frame(self._inbox)
            except (ValueError, RecursionError):
                raise WireError("it broke the protocol between sandbox and host") from None
            if frame is not None:
                return frame
            ready = [fd for fd, _ in self._poll.poll(max(0.0, until - time.monotonic()) * 1000)]
            if not ready:
                return None
            if self._wire.fileno() in ready:            # first: a `done` may stand before the news of a death
                chunk = self._wire.recv(1 << 16)
                if not chunk:
                    raise WireError("its process closed the connection to the host")
                self._inbox += chunk
            else:
                news = self._news()
                if "over" in news:
                    raise Killed(f"it used too much {news['over']}")
                raise WireError(f"its process died ({death(news['exit'])})" if "exit" in news else str(news))

    def _call(self, frame: dict, result: StepResult) -> None:
        """Run one tool in a thread of its own, at most until the step's time is up, without holding a slot."""
        result.tool_calls += 1
        self.tool_calls += 1
        reply, finished = {}, threading.Event()

        def work():
            try:
                reply["value"] = self.tools[frame["call"]](*frame["args"], **frame["kwargs"])
            except Exception as error:                  # whatever a tool raises is the model's to read
                reply["error"] = str(error) if type(error).__name__ == "ToolError" else f"{type(error).__name__}: {error}"
            finished.set()

        if frame["call"] not in self.tools:
            reply["error"] = f"there is no tool {frame['call'][:100]!r}"
        elif self.tool_calls > self.limits.tool_calls:
            reply["error"] = f"no more than {self.limits.tool_calls} tool calls are allowed"
        else:
            self.executor.slots.release()
            threading.Thread(target=work, daemon=True).start()
            on_time = finished.wait(self.seconds_left())
            waiting = time.monotonic()
            self.executor.slots.acquire()
            self._deadline += time.monotonic() - waiting
            if not on_time:
                return                                  # too late: the interrupt is next, and the result is dropped
        try:
            send_frame(self._wire, {"reply": frame["id"], "error": reply.get("error", "")[:1000] or None,
                                    "value": reply.get("value")})
        except (TypeError, ValueError, RecursionError) as error:
            send_frame(self._wire, {"reply": frame["id"], "value": None, "error": f"the tool's result cannot be sent: {error}"})

    def _rollback(self) -> str:
        """Kill the step and let the keeper take over; where there is none, start the session anew."""
        try:
            self._order("rollback", keeper=self._keeper)
            while "rolled" not in (news := self._news()):
                pass                                    # news of a death that came before
            if news["rolled"]:
                while self._poll.poll(0):               # all writers are dead: what is left in the wire is stale
                    self._wire.recv(1 << 16)
                self._inbox.clear()
                self._order("go")
                if self._receive(time.monotonic() + 1.0) == {"ready": True}:
                    return "Variables are as they were before it; files it wrote are still there."
        except (OSError, WireError, KeyError):
            pass                                        # the state before the step is lost too
        self._stop()
        self._start()
        return "The session was restarted: variables and files of earlier steps are lost."

    # --- the host's ends ---

    def _start(self) -> None:
        self._ctl, self._wire, self._out = self.executor.connect()
        self._inbox, self._poll = bytearray(), select.poll()
        self._ctl.settimeout(5.0)                       # trusted and prompt: longer means that something broke
        self._wire.settimeout(self.limits.grace / 2)    # a runner may refuse to read
        for sock in (self._ctl, self._wire):
            self._poll.register(sock, select.POLLIN)
        opened = []
        try:
            for content in self.files.values():
                if isinstance(content, bytes):
                    opened.append(os.memfd_create("attachment"))
                    os.write(opened[-1], content)
                    os.lseek(opened[-1], 0, os.SEEK_SET)
                else:
                    opened.append(os.open(content, os.O_RDONLY | os.O_CLOEXEC))
            setup = dataclasses.asdict(self.limits) | {
                "files": list(self.files), "workdir": str(self.workdir or "/tmp/work"),
                "tools": {name: (inspect.getdoc(tool) or "")[:500] for name, tool in self.tools.items()}}
            socket.send_fds(self._ctl, [json.dumps(setup).encode()], opened)
            news = self._news()
        except OSError as error:
            news = {"failed": str(error)}
        finally:
            for fd in opened:
                os.close(fd)
        if "ready" not in news:
            self._stop()
            raise SessionLost(f"a session could not start: {news.get('failed', news)}")

    def _stop(self) -> None:
        if self._ctl is not None:
            self._ctl.close()                           # process 1 of the session exits, and its namespace with it
            self._wire.close()
            os.close(self._out)
            self._ctl = None

    def _order(self, order: str, **details) -> None:
        self._ctl.send(json.dumps({"order": order} | details).encode())

    def _news(self) -> dict:
        news = self._ctl.recv(1 << 16)
        if not news:
            raise ConnectionError("the session's first process is gone")
        return json.loads(news)

    def _output(self) -> str:
        """What the step wrote: all of it, or its first and last part. The memfd is mapped by nobody, so reads are safe."""
        size, limit = os.fstat(self._out).st_size, self.limits.output_chars
        if size <= limit:
            return os.pread(self._out, size, 0).decode("utf-8", "replace")
        head, tail = os.pread(self._out, limit // 2, 0), os.pread(self._out, limit // 2, size - limit // 2)
        os.ftruncate(self._out, 0)                      # give the memory back now
        return (head.decode("utf-8", "replace") + f"\n[... {size - 2 * (limit // 2):,} bytes of output cut ...]\n"
                + tail.decode("utf-8", "replace"))


def death(status: int) -> str:
    """What a wait status means, in words."""
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit status {os.WEXITSTATUS(status)}"


class Executor:
    """Starts sessions. Thread-safe; any number of sessions, of which `max_running` (default: the cores) run a step at once.

    sandbox: "bwrap" (SandboxError where it does not work), "none", or "auto": bwrap, else none with a warning."""

    def __init__(self, sandbox: str = "auto", limits: Limits = Limits(), max_running: int | None = None):
        if sandbox not in ("auto", "bwrap", "none"):
            raise UserError(f"--sandbox is auto, bwrap or none, not {sandbox!r}")
        self.limits, self.sandbox, self.base = limits, "bwrap", None
        self.slots = threading.Semaphore(max_running or os.cpu_count() or 1)
        self._lock, self._zygote = threading.Lock(), None
        if sandbox != "none":
            try:
                self._start_zygote()
                self.session().close()
                return
            except (SandboxError, SessionLost) as error:
                self.close()
                if sandbox == "bwrap":
                    raise SandboxError(f"--sandbox bwrap does not work here: {error}") from None
                print(f"WARNING: NO SANDBOX. bwrap does not work here ({error}); model-written code can read and change "
                      "every file that you can, and see your processes. See README, 'Sandbox'.", file=sys.stderr)
        self.sandbox, self.base = "none", tempfile.mkdtemp(prefix="tool-r1-")
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)         # the same uid must not read this process's memory in /proc
        self._start_zygote()

    def session(self, tools: Mapping[str, Callable] | None = None, files: Mapping[str, Path | bytes] | None = None) -> Session:
        """A new session: `tools` by their names in the code's namespace, `files` put into its directory."""
        return Session(self, tools or {}, files or {})

    def close(self) -> None:
        """End the zygote and with it every session. Nothing of the executor is left when this returns."""
        with self._lock:
            if self._zygote is not None:
                self._control.close()
                try:
                    self._zygote.wait(5.0)
                except subprocess.TimeoutExpired:
                    self._zygote.kill()
                    self._zygote.wait()
                self._zygote = None
            if self.base is not None:
                shutil.rmtree(self.base, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def connect(self) -> tuple[socket.socket, socket.socket, int]:
        """Have the zygote fork a session; returns the host's ends: ctl, wire and the output's memfd."""
        ctl, ctl_inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        wire, wire_inside = socket.socketpair()
        out = os.memfd_create("output")
        with ctl_inside, wire_inside, self._lock:
            fds = [ctl_inside.fileno(), wire_inside.fileno(), out]
            try:
                socket.send_fds(self._control, [b"fork"], fds)
            except OSError:                             # the zygote died (the system ran out of memory?): once more
                self._start_zygote()
                socket.send_fds(self._control, [b"fork"], fds)
        return ctl, wire, out

    def _start_zygote(self) -> None:
        self._control, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(30.0)
        python, stages = [sys.executable, "-I", "-c", BOOT], 1
        command = python + [json.dumps(["zygote", self.sandbox == "bwrap"])]
        if self.sandbox == "bwrap":
            command = self._bubblewrap(command)
            if os.getuid() == 0:
                stages = 2
                command = python + [json.dumps(["launch", UNPRIVILEGED, visible_paths(), command])]
        errors = tempfile.TemporaryFile()
        with inside, errors:
            self._zygote = subprocess.Popen(
                command, stdin=inside, stdout=subprocess.DEVNULL, stderr=errors, cwd="/", start_new_session=True,
                env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp/work",
                     "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"})
            try:
                for _ in range(stages):
                    self._control.send(SANDBOX_SIDE.encode())
                ready = self._control.recv(64)
            except OSError:
                ready = b""
            if ready != b"ready":
                self._zygote.kill()
                self._zygote.wait()
                errors.seek(0)
                text = errors.read().decode(errors="replace").strip().splitlines()
                raise SandboxError(text[-1] if text else "the sandbox's process did not start")

    def _bubblewrap(self, command: list[str]) -> list[str]:
        """The command inside bwrap: nothing but /usr, the interpreter and its packages, read-only."""
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise SandboxError("bubblewrap is not installed")
        argv = [bwrap, "--unshare-all", "--as-pid-1", "--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev", "--dir", "/tmp"]
        for name in ("bin", "sbin", "lib", "lib64"):
            if os.path.islink(f"/{name}"):
                argv += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
            elif os.path.isdir(f"/{name}"):
                argv += ["--ro-bind", f"/{name}", f"/{name}"]
        for name in ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"):
            argv += ["--ro-bind-try", name, name]
        for number, path in enumerate(visible_paths()):
            argv += ["--ro-bind", f"/tmp/{number}" if os.getuid() == 0 else path, path]
        return argv + ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/", "--"] + command


def visible_paths() -> list[str]:
    """Parts of the interpreter and its environment that lie outside /usr. Not the whole prefix: it may be a project."""
    parts = [os.path.join(prefix, part) for prefix in dict.fromkeys((sys.base_prefix, sys.prefix))
             for part in ("bin", "lib", "lib64", "pyvenv.cfg")]
    return [path for path in parts if os.path.exists(path) and not path.startswith("/usr/")]



MARK = "# ======= " + "Inside the sandbox"
SANDBOX_SIDE = Path(__file__).read_text(encoding="utf-8").split(MARK)[1].partition("\n")[2]
# The sandbox's Python receives that text as the first message on fd 0 and runs it with builtins of its own: model code may
# patch the shared ones. Then it calls the function named in its argument.
BOOT = ("import builtins, json, os, sys; side = {'__builtins__': dict(vars(builtins)), '__name__': 'sandbox'}; "
        "exec(os.read(0, 1 << 18), side); name, *args = json.loads(sys.argv[1]); side[name](*args)")

# ======= Inside the sandbox: the text below this line is all that the sandbox's Python sees of this project. =======
import ast
import builtins
import ctypes
import gc
import importlib
import io
import json
import linecache
import os
import platform
import resource
import select
import signal
import socket
import struct
import sys
import threading
import types
from os import _exit, dup2, fork, getpid, getppid, kill, waitpid      # by value: model code may patch the modules
from select import select as wait_readable
from signal import SIG_BLOCK, SIG_SETMASK, SIG_UNBLOCK, SIGINT, pthread_sigmask
from contextlib import contextmanager
from traceback import TracebackException

MAX_FRAME = 8 << 20             # bytes
MAX_ANSWER = 10_000             # characters of an answer that are kept
PRELOAD = ("ast", "collections", "csv", "datetime", "decimal", "fractions", "functools", "heapq", "itertools", "math", "random",
           "re", "statistics", "string", "tempfile", "typing", "subprocess", "multiprocessing", "numpy")
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 22, 36, 38
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
CLONE_ANY_NAMESPACE = 0x7E020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
EPERM, ENOSYS, ENETDOWN = 1, 38, 100

# Refused system calls: name -> (number on x86_64, on aarch64, errno).
REFUSED = {
    "socket": (41, 198, ENETDOWN), "connect": (42, 203, ENETDOWN), "bind": (49, 200, ENETDOWN), "listen": (50, 201, ENETDOWN),
    "ptrace": (101, 117, EPERM), "process_vm_readv": (310, 270, EPERM), "process_vm_writev": (311, 271, EPERM),
    "kcmp": (312, 272, EPERM), "perf_event_open": (298, 241, EPERM), "bpf": (321, 280, EPERM), "userfaultfd": (323, 282, EPERM),
    "unshare": (272, 97, EPERM), "setns": (308, 268, EPERM), "mount": (165, 40, EPERM), "umount2": (166, 39, EPERM),
    "pivot_root": (155, 41, EPERM), "chroot": (161, 51, EPERM), "name_to_handle_at": (303, 264, EPERM),
    "open_by_handle_at": (304, 265, EPERM), "add_key": (248, 217, EPERM), "request_key": (249, 218, EPERM),
    "keyctl": (250, 219, EPERM), "init_module": (175, 105, EPERM), "finit_module": (313, 273, EPERM), "kexec_load": (246, 104, EPERM),
    "personality": (135, 92, EPERM), "memfd_create": (319, 279, EPERM), "shmget": (29, 194, EPERM), "semget": (64, 190, EPERM),
    "msgget": (68, 186, EPERM), "mq_open": (240, 180, EPERM), "fanotify_init": (300, 262, EPERM)}
CLONE = (56, 220)
# From 424 on numbers are the same everywhere. These are let through: pidfd_send_signal, pidfd_open, close_range, openat2,
# faccessat2, epoll_pwait2, futex_waitv. The rest (io_uring, clone3, new mount calls, memfd_secret, ...) does not exist.
NEW_AND_HARMLESS = (424, 434, 436, 437, 439, 441, 449)


def check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def cut(text: str, limit: int) -> str:
    """The first and last part of a long text, and how much is missing."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}\n[... {len(text) - 2 * half:,} characters cut ...]\n{text[-half:]}"


# --- the wire: 4 bytes of length, then JSON ---

def plain(value):
    """JSON for numpy's scalars and arrays; anything else is refused."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def send_frame(sock, frame: dict, dumps=json.dumps) -> None:
    """Raises TypeError, ValueError or RecursionError for what is not JSON or too large, and then sends nothing."""
    data = dumps(frame, allow_nan=False, default=plain).encode()
    if len(data) > MAX_FRAME:
        raise ValueError(f"{len(data):,} bytes are more than {MAX_FRAME:,}")
    sock.sendall(struct.pack(">I", len(data)) + data)


def take_frame(inbox: bytearray, loads=json.loads) -> dict | None:
    """Take the first frame out of what was received, None if it is not complete. ValueError, RecursionError if it is invalid."""
    if len(inbox) < 4:
        return None
    (size,) = struct.unpack(">I", inbox[:4])
    if size > MAX_FRAME:
        raise ValueError("frame too large")
    if len(inbox) < 4 + size:
        return None
    data = bytes(inbox[4:4 + size])
    del inbox[:4 + size]
    frame = loads(data)
    kinds = FRAMES.get(next(iter(frame), None)) if isinstance(frame, dict) else None
    if kinds is None or frame.keys() != kinds.keys() or not all(isinstance(frame[k], kinds[k]) for k in kinds):
        raise ValueError("not a frame")
    return frame


TEXT = (str, type(None))
FRAMES = {  # by the first key
    "run": {"run": str}, "reply": {"reply": int, "value": object, "error": TEXT},                           # host -> runner
    "started": {"started": int}, "ready": {"ready": bool}, "answer": {"answer": str},                       # runner -> host
    "call": {"call": str, "id": int, "args": list, "kwargs": dict}, "done": {"done": str, "value": TEXT, "error": TEXT}}


# --- launch (root only), zygote and session: trusted, they never run model code ---

def launch(uid: int, paths: list[str], command: list[str]) -> None:
    """As root: make the interpreter readable for the unprivileged uid (a home may be 0700), drop to it, become bwrap."""
    check(libc.unshare(CLONE_NEWNS), "unshare")
    check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "make mounts private")
    sources = [os.open(path, os.O_PATH) for path in paths]
    check(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=755"), "mount /tmp")
    for number, source in enumerate(sources):
        target = f"/tmp/{number}"
        if os.path.isdir(f"/proc/self/fd/{source}"):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT))
        check(libc.mount(f"/proc/self/fd/{source}".encode(), target.encode(), None, MS_BIND | MS_REC, None), f"bind {target}")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.execv(command[0], command)


def zygote(isolated: bool) -> None:
    """Import once what sessions use, then fork a session for every message, which carries its three descriptors."""
    for name in PRELOAD:
        try:
            importlib.import_module(name)
        except ImportError:
            pass                                        # numpy is the only one that may be missing
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)       # children are reaped by the kernel
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()                                         # a later collection does not touch, so does not copy, these pages
    control.send(b"ready")
    while True:
        message, fds, _, _ = socket.recv_fds(control, 16, 3)
        if not message:
            _exit(0)                                    # the host is gone; as process 1 of bwrap's namespace we take all with us
        if fork() == 0:
            control.close()
            ctl, wire = socket.socket(fileno=fds[0]), socket.socket(fileno=fds[1])
            try:
                session(ctl, wire, fds[2], isolated)
            except BaseException as error:
                ctl.send(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())
            _exit(1)
        for fd in fds:
            os.close(fd)


def session(ctl, wire, out: int, isolated: bool) -> None:
    """Set up one session: namespaces, files, limits; then fork its first runner and supervise it."""
    if isolated:
        own_namespaces()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # the zygote ignores it, and then nothing can be waited for
    message, attachments, _, _ = socket.recv_fds(ctl, 1 << 16, 250)
    setup = json.loads(message)
    if isolated:
        size = (setup["disk_mb"] << 20) + sum(os.fstat(fd).st_size for fd in attachments)
        own_mounts(size, inodes=1000 + 16 * setup["disk_mb"])
    os.makedirs(setup["workdir"], exist_ok=True)
    os.chdir(setup["workdir"])
    for name, source in zip(setup["files"], attachments, strict=True):
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "wb") as target:
            while chunk := os.read(source, 1 << 20):
                target.write(chunk)
        os.close(source)
    restrict(setup, isolated)
    runner = fork()
    if runner == 0:
        ctl.close()
        for fd in (1, 2):
            os.dup2(out, fd)
        os.close(out)
        Worker(wire, setup).loop()
    os.close(out)
    ctl.send(b'{"ready": true}')
    supervise(ctl, wire, runner, setup)


def own_namespaces() -> None:
    """Go on as process 1 of new user, mount and pid namespaces. The network namespace is the zygote's, and empty."""
    uid, gid = os.getuid(), os.getgid()
    check(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    if fork():
        _exit(0)


def own_mounts(size: int, inodes: int) -> None:
    """A private /proc, and one tmpfs for /tmp (with the working directory) and /dev/shm."""
    check(libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV, None), "mount /proc")
    options = f"mode=700,size={size},nr_inodes={inodes}".encode()
    check(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, options), "mount /tmp")
    os.mkdir("/tmp/.shm")
    check(libc.mount(b"/tmp/.shm", b"/dev/shm", None, MS_BIND, None), "bind /dev/shm")


def restrict(setup: dict, isolated: bool) -> None:
    """Drop what remains of power: limits, capabilities, system calls. Forked runners inherit all of it."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    disk = setup["disk_mb"] << 20
    limits = {"AS": mapped + (setup["memory_mb"] << 20), "FSIZE": disk, "NOFILE": 256, "CORE": 0, "MSGQUEUE": 0, "MEMLOCK": 0}
    if isolated:
        limits["NPROC"] = setup["processes"] + 3        # counted in this user namespace; elsewhere it is the uid's whole count
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    os.setsid()
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")                              # if the machine runs out of memory, a session goes first
    check(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    check(libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)), "capset")
    rules = seccomp_rules(platform.machine())
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    check(libc.prctl(PR_SET_SECCOMP, 2, struct.pack("HxxxxxxP", len(rules), ctypes.addressof(program)), 0, 0), "seccomp")


def seccomp_rules(machine: str) -> list[tuple[int, int, int, int]]:
    """Classic BPF over struct seccomp_data (number at 0, architecture at 4, first argument at 16)."""
    column, arch = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill_process, errno = (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x80000000), 0x00050000
    rules = [(load, 0, 0, 4), (equal, 1, 0, arch), kill_process, (load, 0, 0, 0)]
    for number in NEW_AND_HARMLESS:
        rules += [(equal, 0, 1, number), allow]
    rules += [(at_least, 0, 1, 424), (give, 0, 0, errno | ENOSYS)]          # also the x32 numbers, from 2^30 on
    for *numbers, code in REFUSED.values():
        rules += [(equal, 0, 1, numbers[column]), (give, 0, 0, errno | code)]
    return rules + [(equal, 0, 3, CLONE[column]), (load, 0, 0, 16), (any_bit, 0, 1, CLONE_ANY_NAMESPACE), (give, 0, 0, errno | EPERM), allow]


def supervise(ctl, wire, runner: int, setup: dict) -> None:
    """Process 1 of a session: obey the host's orders, watch the runner, end with the host."""
    running, exited = False, False
    alive = os.pidfd_open(runner)
    while True:
        poll = select.poll()
        poll.register(ctl, select.POLLIN)
        if not exited:
            poll.register(alive, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(100 if running else None)]
        if alive in ready:
            exited = True
            ctl.send(json.dumps({"exit": os.waitpid(runner, 0)[1]}).encode())
        if running:
            reap(keep=runner)
        if running and (over := overuse(setup)):
            running = False
            ctl.send(json.dumps({"over": over}).encode())
        if ctl.fileno() not in ready:
            continue
        message = ctl.recv(1 << 16)
        if not message:
            sweep(keep=set())
            _exit(0)
        order = json.loads(message)
        running = order["order"] in ("go", "interrupt")
        if order["order"] == "rollback":
            sweep(keep={order["keeper"]})
            if not exited:
                os.waitpid(runner, 0)
            reap(keep=order["keeper"])
            while wait_readable([wire], [], [], 0)[0] and wire.recv(1 << 16):
                pass                                    # what the host sent to the dead runner
            runner, exited = order["keeper"], not is_child(order["keeper"])
            os.close(alive)
            alive = os.pidfd_open(runner if not exited else getpid())
            ctl.send(json.dumps({"rolled": not exited}).encode())
        elif not exited:
            if order["order"] == "interrupt":
                kill(runner, signal.SIGINT)
            kill(runner, signal.SIGSTOP if order["order"] == "settle" else signal.SIGCONT)
        if order["order"] == "settle":
            sweep(keep={runner})
            reap(keep=runner)


def is_child(pid: int) -> bool:
    """Whether pid is a living child of this process, by the kernel's word."""
    try:
        return pid > 0 and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def descendants() -> set[int]:
    """All processes of this session but this one. In a pid namespace of our own that is everybody."""
    if getpid() == 1:
        return {int(name) for name in os.listdir("/proc") if name.isdigit()} - {1}
    found, todo = set(), [getpid()]
    while todo:
        parent = todo.pop()
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children") as file:
                    todo += [int(pid) for pid in file.read().split()]
        except OSError:
            pass                                        # it ended meanwhile
        found.add(parent)
    return found - {getpid()}


def sweep(keep: set[int]) -> None:
    """Kill all processes of the session but `keep` and this one, until no new ones turn up."""
    killed = set()
    while found := descendants() - keep - killed:
        for pid in found:
            try:
                kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        killed |= found


def reap(keep: int) -> None:
    """Collect dead children, orphans of the session included; the runner's own death is told elsewhere."""
    try:
        while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and dead.si_pid != keep:
            os.waitpid(dead.si_pid, 0)
    except ChildProcessError:
        pass                                            # none is left


def overuse(setup: dict) -> str | None:
    """What the session's processes have too much of, together. One process alone is held by its rlimits."""
    pages, pids = 0, descendants()
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm") as file:
                pages += int(file.read().split()[1])
        except (OSError, IndexError):
            pass                                        # it ended meanwhile
    if pages * resource.getpagesize() > 3 * setup["memory_mb"] << 20:
        return "memory"
    return "processes" if len(pids) > setup["processes"] + 2 else None


# --- the runner: everything it says is hostile, because model code runs in the same process ---

class ToolError(Exception):
    """What the model's code sees when a tool says no."""
    __module__ = "builtins"                             # so that a traceback says ToolError, not sandbox.ToolError


class Worker:
    """Runs the steps. Before each it forks the keeper, which stops itself and goes on from here if the step is killed."""

    def __init__(self, wire, setup: dict):
        self.wire, self.setup, self.inbox = wire, setup, bytearray()
        self.step = self.keeper = self.calls = self.interrupts = 0
        self.in_step = self.armed = False
        self.out = os.dup(1)
        self.main = types.ModuleType("__main__")
        sys.modules["__main__"], sys.argv = self.main, [""]
        sys.path.append(os.getcwd())
        os.environ.update(HOME=os.getcwd(), TMPDIR="/tmp" if getppid() == 1 else os.getcwd())
        tools = {name: self.tool(name, doc) for name, doc in setup["tools"].items()}
        vars(self.main).update(tools, __builtins__=builtins, final_answer=self.final_answer, ToolError=ToolError)

    def loop(self) -> None:
        libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)         # the code may look at its own /proc/self
        parent = getppid()
        while True:
            frame = self.read()
            if "run" not in frame:
                continue                                # a reply that came too late for its call
            self.step, self.lock, old_keeper = self.step + 1, threading.Lock(), self.keeper
            if self.setup["rollback"]:
                self.keeper = fork()
                if self.keeper == 0:
                    while getppid() != parent:          # the runner lives
                        kill(getpid(), signal.SIGSTOP)
                    self.send({"ready": True})
                    continue
                self.send({"started": self.keeper})
            if old_keeper:
                try:
                    waitpid(old_keeper, 0)
                except ChildProcessError:
                    pass
            self.serve(frame["run"])

    def serve(self, code: str) -> None:
        self.me = getpid()
        self.fresh_streams()
        signal.signal(SIGINT, self.on_interrupt)
        pthread_sigmask(SIG_UNBLOCK, {SIGINT})
        self.in_step, self.interrupts = True, 0
        try:
            value, error = self.execute(code)
        except BaseException as again:                  # interrupted once more while it was being described
            value, error = None, type(again).__name__
        self.armed = False
        sys.settrace(None)
        libc.fflush(None)                               # what C code has printed
        if getpid() != self.me:
            _exit(0)                                    # a child that the code forked came back here
        with self.lock:
            self.in_step = False                        # from here on no thread may call
            self.send({"done": "error" if error else "ok", "value": value, "error": error})

    def execute(self, code: str) -> tuple[str | None, str | None]:
        """Run the step in __main__; returns (repr of a last bare expression, traceback)."""
        name, space, limit = f"<step {self.step}>", vars(self.main), self.setup["output_chars"]
        linecache.cache[name] = len(code), None, code.splitlines(True), name
        self.armed = True
        try:
            tree = ast.parse(code, name)
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, name, "exec"), space)
            value = last and eval(compile(ast.Expression(last.value), name, "eval"), space)
            return None if value is None else cut(repr(value), limit), None
        except BaseException as error:
            sys.settrace(None)
            return None, describe(error, limit)

    def fresh_streams(self) -> None:
        """stdout and stderr unbuffered on the host's memfd, whatever the last step did to them."""
        try:
            dup2(self.out, 1), dup2(self.out, 2)
        except OSError:
            pass                                        # the code closed it; its output is lost
        for name, fd in (("stdout", 1), ("stderr", 2)):
            raw = io.FileIO(fd, "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True))

    def on_interrupt(self, signum, frame) -> None:
        """Raise in the running code; from the second time on also in the handler that swallows it."""
        def again(frame, event, arg):
            if not frame.f_code.co_filename.startswith("<step "):
                return None
            if event == "line":
                raise KeyboardInterrupt
            return again

        if not self.armed:
            return
        self.interrupts += 1
        if self.interrupts > 1:
            while frame is not None:
                if frame.f_code.co_filename.startswith("<step "):
                    frame.f_trace = again
                frame = frame.f_back
            sys.settrace(again)
        raise KeyboardInterrupt

    # --- tools and the wire ---

    def tool(self, name: str, doc: str):
        def function(*args, **kwargs):
            return self.call(name, args, kwargs)
        function.__name__ = function.__qualname__ = name
        function.__doc__ = doc
        return function

    def call(self, name: str, args: tuple, kwargs: dict):
        """Ask the host to run a tool. Its failure, and arguments that are not JSON, raise ToolError."""
        with self.turn(name):
            self.calls += 1
            try:
                self.send({"call": name, "id": self.calls, "args": list(args), "kwargs": kwargs})
            except (TypeError, ValueError, RecursionError) as error:
                raise ToolError(f"{name}: arguments have to be plain values: {error}") from None
            while (reply := self.read()).get("reply") != self.calls:
                pass                                    # the reply to a call that was interrupted
        if reply["error"] is not None:
            raise ToolError(reply["error"])
        return reply["value"]

    def final_answer(self, answer) -> None:
        """Give the final answer to the question."""
        text = str(answer)[:MAX_ANSWER]
        with self.turn("final_answer"):
            self.send({"answer": text})

    @contextmanager
    def turn(self, name: str):
        """One thread of the one right process at a time may talk to the host, and only during a step."""
        if getpid() != self.me:
            raise ToolError(f"{name} works in the main process only")
        with self.lock:
            if not self.in_step:
                raise ToolError(f"{name} works during a step only")
            yield

    def send(self, frame: dict) -> None:
        with masked():
            send_frame(self.wire, frame)

    def read(self) -> dict:
        """The next frame. An interrupt may end the waiting, never split a frame."""
        while True:
            with masked():
                frame = take_frame(self.inbox)
            if frame is not None:
                return frame
            wait_readable([self.wire], [], [])
            with masked():
                chunk = self.wire.recv(1 << 16)
                if not chunk:
                    _exit(0)
                self.inbox += chunk


@contextmanager
def masked():
    """No KeyboardInterrupt in here: half a frame would break the protocol."""
    before = pthread_sigmask(SIG_BLOCK, {SIGINT})
    try:
        yield
    finally:
        pthread_sigmask(SIG_SETMASK, before)


def describe(error: BaseException, limit: int) -> str:
    """The traceback with the model's own lines only. A hostile exception gets its type's name."""
    try:
        whole = TracebackException.from_exception(error)
        todo = [whole]
        while todo:
            part = todo.pop()
            part.stack[:] = [frame for frame in part.stack if frame.filename.startswith("<step ")]
            todo += [other for other in (part.__cause__, part.__context__) if other] + list(getattr(part, "exceptions", None) or [])
        return cut("".join(whole.format()), limit)
    except BaseException:
        return f"{type(error).__name__} (its text could not be made)"
