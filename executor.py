"""The executor: a persistent Python session for model-written code, isolated in processes of its own.

Owns both sides of the sandbox. Tools are passed in as plain callables; nothing here knows of models or tasks.
Read in this order: `Limits`, `CellResult`, `Session.execute` to `_listen` (a step as the host sees it), then
`Executor` (how a sandbox starts), `zygote`, `session`, `supervise`, `Worker` (inside: it runs this file too).

  host (trainer) --> bwrap --> zygote: Python with the usual libraries imported; forks one tree per session
                                 `-- supervisor: process 1 of its own namespaces; never runs model code
                                       |-- runner: runs the model's code, step after step, in one process
                                       `-- keeper: the runner's fork from before this step, waiting; it takes
                                                   over if the step is killed: memory rolls back, files do not
Two sockets lead to a session. `ctl` (host <-> supervisor) is trusted: orders, and news of a runner's death.
`wire` (host <-> runner) is hostile: length-prefixed JSON, bounded and checked, with tool calls, answers and
the step's end. Output goes to a memfd of the host's. Clock and status are the host's; a runner can only claim
that its code raised nothing, which any code can have with `try: ... except: pass`. After a step every process
but the runner is killed, and the runner is stopped, threads included, until the next step.

`bwrap` covers: an unprivileged uid without capabilities; user, mount, pid, ipc, uts and network namespaces;
  only /usr and the interpreter with its packages are visible, read-only; a private tmpfs per session (/tmp,
  /dev/shm); no sockets (seccomp: no loopback, vsock, netlink, abstract names); no ptrace, mount, unshare,
  io_uring, bpf, keyctl, memfd, SysV memory (seccomp); limits on memory, processes, open files, disk, output.
  It does not cover bugs of the kernel, side channels, kernel buffers (pipes), or the use of the cores.
`none` covers: an empty environment, the limits, the same seccomp filter, no capabilities, no access to the
  trainer's memory, and the killing of what a step leaves. It does not cover files: code reads and writes what
  the trainer's uid may, files with expected answers too; it sees and may signal other processes.
In both modes expected answers never enter the sandbox.
"""
import ast
import builtins
import ctypes
import dataclasses
import gc
import importlib
import inspect
import io
import json
import linecache
import os
import platform
import resource
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
import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from os import _exit, dup2, fork, getpid, getppid, kill, waitpid    # by name: model code may patch modules
from pathlib import Path, PurePosixPath
from signal import SIG_BLOCK, SIG_SETMASK, SIG_UNBLOCK, SIGCONT, SIGINT, pthread_sigmask, sigwait
from traceback import TracebackException

from machinery.cli import UserError

MAX_FRAME, MAX_ANSWER = 8 << 20, 10_000         # bytes of a frame, characters kept of an answer
UNPRIVILEGED = 65534                            # the uid that a root trainer drops to before anything else


class SandboxError(UserError):
    """The sandbox that was asked for does not work on this machine."""


class SessionLost(Exception):
    """The host's side failed (no process, no memory), not the code: the trajectory has no valid outcome."""


class Broken(Exception):
    """(status, reason): the host's finding that a step cannot end in order and has to be rolled back."""


@dataclass(frozen=True)
class Limits:
    """What one session may use."""
    seconds: float = 20.0           # a step, tool calls included
    grace: float = 1.0              # how much longer a step may take to be interrupted or killed
    memory_mb: int = 1024           # address space of a process; thrice this resident in all together
    output_chars: int = 20_000      # of the output (in bytes), the value and the error, each
    tool_calls: int = 50            # a session
    disk_mb: int = 64               # besides the attachments; also the largest file and the most output
    processes: int = 64             # processes and threads at once
    rollback: bool = True           # fork a keeper before each step; without, a kill restarts the session


@dataclass
class CellResult:
    """What one step came to. `status` is what the host found:
    ok; error: an exception; timeout: interrupted, variables are kept; killed: no reaction, or too much used;
    crashed: its process died or broke the protocol. The last two roll back to the state before the step."""
    status: str = "ok"
    output: str = ""                # stdout and stderr in order, cut in the middle
    value: str | None = None        # repr of a last bare expression
    error: str | None = None        # the traceback with the model's own lines, and why a step was stopped
    seconds: float = 0.0
    answered: bool = False
    answer: str | None = None       # of the first final_answer(...) in this step
    tool_calls: int = 0

    def observation(self) -> str:
        """What the model reads: output, value and error."""
        parts = [part.rstrip("\n") for part in (self.output, self.value, self.error) if part]
        return "\n".join(parts) or "(no output)"


class Session(AbstractContextManager):
    """One trajectory's Python, made by `Executor.session`. One step at a time; others run beside it."""

    def __init__(self, executor: "Executor", tools: Mapping[str, Callable],
                 files: Mapping[str, Path | bytes]):
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name or len(files) > 250:
                raise UserError(f"a session takes up to 250 files with names inside its folder, not {name!r}")
        self.executor, self.tools, self.files = executor, dict(tools), dict(files)
        self.limits, self.tool_calls, self.workdir = executor.limits, 0, None
        if executor.base is not None:                   # sandbox "none": the directory is the host's to see
            self.workdir = Path(tempfile.mkdtemp(dir=executor.base))
        self._lock, self._deadline, self._ctl = threading.Lock(), 0.0, None
        self._start()

    def execute(self, code: str, seconds: float | None = None) -> CellResult:
        """Run one step of at most `seconds` plus the grace. Raises SessionLost, not for what code does."""
        with self._lock, self.executor.slots:           # the clock starts when a slot is free
            if self._ctl is None:
                raise SessionLost("the session is closed")
            result, start = CellResult(), time.monotonic()
            self._deadline = start + (self.limits.seconds if seconds is None else seconds)
            try:
                self._step(code, result)
            except BaseException:                       # Ctrl-C in the trainer: the runner may do anything
                self._stop()
                raise
            result.seconds = time.monotonic() - start
            return result

    def seconds_left(self) -> float:
        """Until the running step's time is up: for tools."""
        return max(0.0, self._deadline - time.monotonic())

    def close(self) -> None:
        """End the session; its processes and files go with it."""
        with self._lock:
            self._stop()
            if self.workdir is not None:
                shutil.rmtree(self.workdir, ignore_errors=True)

    def __exit__(self, *exc):
        self.close()

    # --- a step ---

    def _step(self, code: str, result: CellResult) -> None:
        os.ftruncate(self._out, 0)
        os.lseek(self._out, 0, os.SEEK_SET)             # runner and host share the file's offset
        self._keeper, note = 0, None
        try:
            self._order("go")                           # obeyed after the last step's "settle"
            if self._settling:                          # what that step left is dead before this one begins
                self._settling = False
                self._await("settled")
            send_frame(self._wire, {"run": code})
            end, late = self._listen(result), self.seconds_left() == 0.0
            result.status = "timeout" if late else "ok" if end["end"] == "ok" else "error"
            result.value, result.error = (end[key] and cut(end[key], self.limits.output_chars)
                                          for key in ("value", "error"))
            note = "its time was up. Variables set so far are kept." if late else None
            self._order("settle")
            self._settling = True
        except (Broken, OSError) as problem:
            lost = problem if isinstance(problem, Broken) else Broken("crashed", "its process is gone")
            result.status = "killed" if self.seconds_left() == 0.0 else lost.args[0]
            note = f"{lost.args[1]}. {self._rollback()}"
        result.output = self._output()
        if note:
            result.error = f"{result.error or ''}[{result.status}: {note}]"

    def _listen(self, result: CellResult) -> dict:
        """Serve the step until its `end` frame. Its time up, interrupt it every 0.1 s; then give up."""
        interrupts = 0
        while True:
            next_interrupt = self._deadline + 0.1 * interrupts
            if time.monotonic() >= self._deadline + 0.7 * self.limits.grace:
                raise Broken("killed", "its time was up and it did not react to an interrupt")
            if time.monotonic() >= next_interrupt:
                self._order("interrupt")
                interrupts += 1
            frame = self._receive(next_interrupt)
            kind = next(iter(frame), None)
            if kind == "end":
                return frame
            if kind == "call":
                self._call(frame, result)
            elif kind == "answer" and not result.answered:
                result.answered, result.answer = True, frame["answer"][:MAX_ANSWER]
            elif kind == "keeper" and not self._keeper:
                self._keeper = frame["keeper"]
            elif kind not in (None, "answer"):
                raise Broken("crashed", "it broke the protocol between sandbox and host")

    def _receive(self, until: float) -> dict:
        """The next frame from the runner, {} at `until`; Broken where it sends no frames, or died."""
        while True:
            try:
                if (frame := take_frame(self._inbox)) is not None:
                    return frame
            except (ValueError, RecursionError):
                raise Broken("crashed", "it broke the protocol between sandbox and host") from None
            ready = [fd for fd, _ in self._poll.poll(max(0.0, until - time.monotonic()) * 1000)]
            if not ready:
                return {}
            if self._wire.fileno() in ready:            # first: the end may stand before the news of a death
                chunk = self._wire.recv(1 << 16)
                if not chunk:
                    raise Broken("crashed", "it closed the connection to the host")
                self._inbox += chunk
                continue
            kind, _, rest = self._news().partition(" ")
            if kind == "over":
                raise Broken("killed", f"it had too {rest}")
            raise Broken("crashed", f"its process died ({death(int(rest))})")

    def _call(self, frame: dict, result: CellResult) -> None:
        """Run one tool in a thread of its own, until the step's time is up, and without holding a slot."""
        name, reply = frame["call"], {"reply": frame["id"], "value": None, "error": None}
        finished = threading.Event()
        result.tool_calls, self.tool_calls = result.tool_calls + 1, self.tool_calls + 1

        def work():
            try:
                reply["value"] = self.tools[name](*frame["args"], **frame["kwargs"])
            except BaseException as error:              # whatever it raises, exit included, the model reads
                kind = type(error).__name__
                reply["error"] = cut(str(error) if kind == "ToolError" else f"{kind}: {error}", 1000)
            finished.set()

        if name not in self.tools:
            reply["error"] = f"there is no tool {name[:100]!r}"
        elif self.tool_calls > self.limits.tool_calls:
            reply["error"] = f"no more than {self.limits.tool_calls} tool calls are allowed"
        else:
            self.executor.slots.release()
            try:
                threading.Thread(target=work, daemon=True).start()
                on_time = finished.wait(self.seconds_left())
            finally:
                waiting = time.monotonic()
                self.executor.slots.acquire()
                self._deadline += time.monotonic() - waiting
            if not on_time:
                return                                  # the interrupt is next; nobody waits for it
        try:
            send_frame(self._wire, reply)
        except (TypeError, ValueError, RecursionError) as error:
            reply |= {"value": None, "error": f"the tool's result cannot be sent: {error}"}
            send_frame(self._wire, reply)

    def _rollback(self) -> str:
        """Kill the step and let the keeper take over; where there is none, start the session anew."""
        try:
            self._order(f"rollback {self._keeper:d}")
            if self._await("rolled") == "True":
                while self._poll.poll(0) and self._wire.recv(1 << 16):
                    pass                                # all writers are dead: this is stale
                self._inbox.clear()
                self._order("go")
                if self._receive(time.monotonic() + self.limits.grace / 2) == {"ready": True}:
                    return "Variables are as they were before this step; files it wrote are still there."
        except (OSError, Broken):
            pass                                        # the state before the step is lost too
        self._stop()
        self._start()
        return "The session was restarted: variables and files of earlier steps are lost."

    # --- the host's ends ---

    def _start(self) -> None:
        details = dataclasses.asdict(self.limits) | {
            "files": list(self.files), "workdir": str(self.workdir or "/tmp/work"),
            "tools": {name: (inspect.getdoc(tool) or "")[:500] for name, tool in self.tools.items()}}
        attachments = []
        try:
            for content in self.files.values():
                if isinstance(content, bytes):
                    attachments.append(os.memfd_create("attachment"))
                    os.write(attachments[-1], content)
                    os.lseek(attachments[-1], 0, os.SEEK_SET)
                else:
                    attachments.append(os.open(content, os.O_RDONLY))
            self._ctl, self._wire, self._out = self.executor.connect(details, attachments)
            self._inbox, self._poll, self._settling = bytearray(), select.poll(), False
            self._ctl.settimeout(10.0)                  # trusted and prompt: else something broke
            self._wire.settimeout(self.limits.grace / 2)        # a runner may refuse to read
            self._poll.register(self._ctl, select.POLLIN)
            self._poll.register(self._wire, select.POLLIN)
            news = self._news()
        except (OSError, SandboxError) as error:
            news = str(error)
        finally:
            for fd in attachments:
                os.close(fd)
        if news != "ready":
            self._stop()
            raise SessionLost(f"a session could not start: {news}")

    def _stop(self) -> None:
        if self._ctl is not None:
            self._ctl.close()                           # the supervisor exits, all else with it
            self._wire.close()
            os.close(self._out)
            self._ctl = None

    def _order(self, order: str) -> None:
        self._ctl.send(order.encode())

    def _news(self) -> str:
        news = self._ctl.recv(1 << 16)
        if not news:
            raise ConnectionError("the session's supervisor is gone")
        return news.decode()

    def _await(self, word: str) -> str:
        """What follows `word` in the answer to an order; news of a death may come before it."""
        while not (news := self._news()).startswith(word):
            pass
        return news[len(word) + 1:]

    def _output(self) -> str:
        """What the step wrote, or its first and last part: the host reads little, however much it is."""
        size, half = os.fstat(self._out).st_size, self.limits.output_chars // 2
        if size <= 2 * half:
            return os.pread(self._out, size, 0).decode("utf-8", "replace")
        head, tail = (os.pread(self._out, half, at).decode("utf-8", "replace") for at in (0, size - half))
        os.ftruncate(self._out, 0)                      # give the memory back now
        return f"{head}\n[... {size - 2 * half:,} bytes of output cut ...]\n{tail}"


def death(status: int) -> str:
    """What a wait status means, in words."""
    code = os.waitstatus_to_exitcode(status)
    return f"exit status {code}" if code >= 0 else signal.Signals(-code).name


class Executor(AbstractContextManager):
    """Starts sessions, any number; at most `max_running` (default: the cores) run a step. Thread-safe.

    sandbox: "bwrap" (SandboxError where it does not work), "none", or "auto": bwrap, else none, loudly."""

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
                    raise SandboxError(f"--sandbox bwrap fails here: {error} (README: Sandbox)") from None
                print(f"WARNING: NO SANDBOX: bwrap fails here ({error}). Model-written code can read and "
                      "change every file that you can, and signal processes (see README).", file=sys.stderr)
        self.sandbox, self.base = "none", tempfile.mkdtemp(prefix="tool-r1-")
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)         # or code could read our memory in /proc
        self._start_zygote()

    def session(self, tools: Mapping[str, Callable] = types.MappingProxyType({}),
                files: Mapping[str, Path | bytes] = types.MappingProxyType({})) -> Session:
        """A new session: `tools` by their names in the code's namespace, `files` copied into its folder."""
        return Session(self, tools, files)

    def close(self) -> None:
        """End every session. When this returns, no process, mount or file of the executor is left."""
        with self._lock:
            if self._zygote is not None:
                self._control.close()
                try:
                    self._zygote.wait(10.0)
                except subprocess.TimeoutExpired:
                    self._zygote.kill()
                    self._zygote.wait()
                self._zygote = None

    def __exit__(self, *exc):
        self.close()

    def connect(self, details: dict, attachments: list[int]) -> tuple[socket.socket, socket.socket, int]:
        """Have the zygote fork a session; returns the host's ends: ctl, wire and the output's memfd."""
        ctl, ctl_inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        wire, wire_inside = socket.socketpair()
        out = os.memfd_create("output")
        fds = [ctl_inside.fileno(), wire_inside.fileno(), out, *attachments]
        message = [json.dumps(details).encode()], fds
        with ctl_inside, wire_inside, self._lock:
            try:
                socket.send_fds(self._control, *message)
            except ConnectionError:                     # the zygote died (out of memory?): a new one, once
                self._start_zygote()
                socket.send_fds(self._control, *message)
        return ctl, wire, out

    def _start_zygote(self) -> None:
        self._control, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(60.0)
        python, stages = [sys.executable, "-I", "-c", BOOT], 1
        command = python + [json.dumps(["zygote", self.base])]
        if self.sandbox == "bwrap":
            command = bubblewrap(command)
            if os.getuid() == 0:
                command, stages = python + [json.dumps(["launch", UNPRIVILEGED, visible_paths(), command])], 2
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"} | dict.fromkeys(
            ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
        with inside, tempfile.TemporaryFile() as errors:
            self._zygote = subprocess.Popen(command, stdin=inside, stdout=errors, stderr=errors, cwd="/",
                                            start_new_session=True, env=environment)  # no Ctrl-C for it
            try:
                for _ in range(stages):
                    self._control.send(Path(__file__).read_bytes())
                if self._control.recv(16) == b"ready":
                    return
            except OSError:
                pass
            self._zygote.kill()
            self._zygote.wait()
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise SandboxError(lines[-1] if lines else "its process did not start")


def bubblewrap(command: list[str]) -> list[str]:
    """The command inside bwrap: a read-only view of /usr and of the interpreter, and nothing else."""
    if (bwrap := shutil.which("bwrap")) is None:
        raise SandboxError("bubblewrap is not installed")
    argv = [bwrap, "--unshare-all", "--as-pid-1", "--proc", "/proc", "--dev", "/dev", "--dir", "/tmp"]
    argv += ["--ro-bind", "/usr", "/usr"]
    for path in ("/bin", "/sbin", "/lib", "/lib64"):
        if os.path.exists(path):
            link = os.path.islink(path)
            argv += ["--symlink", os.readlink(path), path] if link else ["--ro-bind", path, path]
    for path in ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"):
        argv += ["--ro-bind-try", path, path]
    for number, path in enumerate(visible_paths()):
        argv += ["--ro-bind", f"/tmp/{number}" if os.getuid() == 0 else path, path]     # see `launch`
    return argv + ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/", "--"] + command


def visible_paths() -> list[str]:
    """The interpreter and its packages, outside /usr. Not whole prefixes: one may be a project."""
    paths = [os.path.join(prefix, part) for prefix in dict.fromkeys((sys.base_prefix, sys.prefix))
             for part in ("bin", "lib", "lib64", "pyvenv.cfg")]
    return [path for path in paths if os.path.exists(path) and not path.startswith("/usr/")]


# --- the wire: 4 bytes of length, then JSON ---

TEXT = (str, type(None))
FRAMES = {                                      # by their first key: all keys, and the types of their values
    "run": {"run": str}, "reply": {"reply": int, "value": object, "error": TEXT},              # to the runner
    "keeper": {"keeper": int}, "call": {"call": str, "id": int, "args": list, "kwargs": dict}, # to the host
    "answer": {"answer": str}, "end": {"end": str, "value": TEXT, "error": TEXT}, "ready": {"ready": bool}}


def plain(value):
    """JSON for numpy's scalars and arrays; anything else is refused."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def send_frame(sock, frame: dict, encode=json.JSONEncoder(allow_nan=False, default=plain).encode) -> None:
    """Sends nothing but raises TypeError, ValueError or RecursionError for what is not JSON, or too large."""
    data = encode(frame).encode()
    if len(data) > MAX_FRAME:
        raise ValueError(f"{len(data):,} bytes are more than {MAX_FRAME:,}")
    sock.sendall(struct.pack(">I", len(data)) + data)


def take_frame(inbox: bytearray, loads=json.JSONDecoder().decode) -> dict | None:
    """Take the first frame out of the inbox, None while incomplete. ValueError, RecursionError: no frame."""
    if len(inbox) < 4:
        return None
    end = 4 + int.from_bytes(inbox[:4], "big")
    if end > 4 + MAX_FRAME:
        raise ValueError("too large")
    if len(inbox) < end:
        return None
    frame = loads(inbox[4:end].decode())
    del inbox[:end]
    kinds = FRAMES.get(next(iter(frame), None)) if isinstance(frame, dict) else None
    if not kinds or frame.keys() != kinds.keys() or not all(isinstance(frame[k], kinds[k]) for k in kinds):
        raise ValueError("not a frame")
    return frame


def cut(text: str, limit: int) -> str:
    """The first and last part of a long text, and how much is missing."""
    half = limit // 2
    if len(text) <= limit:
        return text
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters cut ...]\n{text[-half:]}"


# --- inside: launch (as root only), zygote and supervisor. Trusted: they never run model code ---

# The sandbox's Python gets this file as its first message on fd 0, and calls the function its argument names.
BOOT = ("import json, os, sys, types; cli = types.SimpleNamespace(UserError=Exception); "
        "sys.modules |= {'machinery': cli, 'machinery.cli': cli}; "
        "m = sys.modules['executor'] = types.ModuleType('executor'); exec(os.read(0, 1 << 18), vars(m)); "
        "del sys.modules['machinery'], sys.modules['machinery.cli']; name, *args = json.loads(sys.argv[1]); getattr(m, name)(*args)")
PRELOAD = ("collections", "csv", "datetime", "decimal", "fractions", "heapq", "itertools", "math",
           "multiprocessing", "random", "re", "statistics", "string", "numpy")
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 22, 36, 38
NEWNS, NEWUSER, NEWPID, ANY_NAMESPACE = 0x20000, 0x10000000, 0x20000000, 0x7E020000
NOSUID, NODEV, BIND, REC, PRIVATE = 2, 4, 4096, 16384, 1 << 18
EPERM, ENOSYS, ENETDOWN = 1, 38, 100
# Refused system calls: their numbers on x86_64 and aarch64.
REFUSED = """socket 41 198, connect 42 203, bind 49 200, listen 50 201, ptrace 101 117, kcmp 312 272,
    process_vm_readv 310 270, process_vm_writev 311 271, perf_event_open 298 241, bpf 321 280, syslog 103 116,
    userfaultfd 323 282, unshare 272 97, setns 308 268, mount 165 40, umount2 166 39, pivot_root 155 41,
    chroot 161 51, name_to_handle_at 303 264, open_by_handle_at 304 265, add_key 248 217, request_key 249 218,
    keyctl 250 219, init_module 175 105, finit_module 313 273, kexec_load 246 104, personality 135 92,
    memfd_create 319 279, shmget 29 194, semget 64 190, msgget 68 186,
    mq_open 240 180, fanotify_init 300 262"""
# From 424 on all numbers agree. Let through: pidfd_send_signal, pidfd_open, close_range, openat2, faccessat2,
# epoll_pwait2, futex_waitv. The rest (io_uring, clone3, new mounts, memfd_secret, ...) "does not exist".
HARMLESS = (424, 434, 436, 437, 439, 441, 449)


def check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def launch(uid: int, paths: list[str], command: list[str]) -> None:
    """As root: bind the interpreter where any uid can read it (a home may be 0700); drop to uid; be bwrap."""
    check(libc.unshare(NEWNS), "unshare")
    check(libc.mount(None, b"/", None, REC | PRIVATE, None), "make mounts private")
    sources = [os.open(path, os.O_PATH) for path in paths]
    check(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", NOSUID | NODEV, b"mode=755"), "mount /tmp")
    for number, (path, source) in enumerate(zip(paths, sources)):
        origin, target = f"/proc/self/fd/{source}", f"/tmp/{number}"
        os.mkdir(target) if os.path.isdir(origin) else Path(target).touch()
        check(libc.mount(origin.encode(), target.encode(), None, BIND | REC, None), f"bind {path}")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.execv(command[0], command)


def zygote(base: str | None) -> None:
    """Import what sessions use; fork a session for every message, with its descriptors. `base`: no bwrap."""
    for name in PRELOAD:
        try:
            importlib.import_module(name)
        except ImportError:
            pass                                        # numpy may be missing
    control = socket.socket(fileno=os.dup(0))
    dup2(os.open(os.devnull, os.O_RDWR), 0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)       # the kernel reaps the children
    signal.signal(SIGINT, signal.SIG_IGN)
    check(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")
    gc.collect()
    gc.freeze()                                         # a collection does not touch, so copy, these pages
    control.send(b"ready")
    while True:
        message, fds, _, _ = socket.recv_fds(control, 1 << 18, 253)
        if not message:                                 # the host is gone. In bwrap's namespace this is
            break                                       # process 1, and takes every session with it
        if fork() == 0:
            control.close()
            ctl, wire = (socket.socket(fileno=fd) for fd in fds[:2])
            try:
                session(ctl, wire, fds[2], fds[3:], json.loads(message), isolated=base is None)
            except BaseException as error:
                ctl.send(f"{type(error).__name__}: {error}".encode())
            finally:                                    # also where the host does not listen any more
                _exit(1)
        for fd in fds:
            os.close(fd)
    if base is not None:
        sweep(keep=set())
        try:
            os.wait()                                   # returns when all have ended
        except ChildProcessError:
            shutil.rmtree(base, ignore_errors=True)
    _exit(0)


def session(ctl, wire, out: int, attachments: list[int], setup: dict, isolated: bool) -> None:
    """Set up a session and supervise it."""
    if isolated:
        attached = sum(os.fstat(fd).st_size for fd in attachments)
        isolate(size=attached + (setup["disk_mb"] << 20), inodes=1000 + 16 * setup["disk_mb"])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # or nothing could be waited for
    os.makedirs(setup["workdir"], exist_ok=True)
    os.chdir(setup["workdir"])
    for name, source in zip(setup["files"], attachments, strict=True):
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "wb") as target, open(source, "rb") as content:
            shutil.copyfileobj(content, target)
    restrict(setup, isolated)
    runner = fork()
    if runner == 0:
        ctl.close()
        dup2(out, 1), dup2(out, 2)
        Worker(wire, out, setup).loop()
    os.close(out)
    try:
        ctl.send(b"ready")
        supervise(ctl, wire, runner, setup)
    finally:                                            # the host has closed ctl, with news unread or not
        sweep(keep=set())


def isolate(size: int, inodes: int) -> None:
    """Be process 1 of new user, mount and pid namespaces, with its own /proc, /tmp and /dev/shm."""
    uid, gid = os.getuid(), os.getgid()
    check(libc.unshare(NEWUSER | NEWNS | NEWPID), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    if fork():
        _exit(0)
    check(libc.mount(b"proc", b"/proc", b"proc", NOSUID | NODEV, None), "mount /proc")
    options = b"mode=700,size=%d,nr_inodes=%d" % (size, inodes)
    check(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", NOSUID | NODEV, options), "mount /tmp")
    os.mkdir("/tmp/.shm")
    check(libc.mount(b"/tmp/.shm", b"/dev/shm", None, BIND, None), "bind /dev/shm")


def restrict(setup: dict, isolated: bool) -> None:
    """Limits, no capabilities, fewer system calls, for this process and all that it forks."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {"AS": mapped + (setup["memory_mb"] << 20), "FSIZE": setup["disk_mb"] << 20, "NOFILE": 256,
              "CORE": 0, "MEMLOCK": 0}
    if isolated:
        limits["NPROC"] = setup["processes"] + 3        # per user namespace; elsewhere it is all the uid's
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    os.setsid()
    Path("/proc/self/oom_score_adj").write_text("1000")     # if memory runs out, sessions go first
    check(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    check(libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)), "capset")
    rules = seccomp_rules(platform.machine())
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    filters = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(program))
    check(libc.prctl(PR_SET_SECCOMP, 2, filters, 0, 0), "seccomp")


def seccomp_rules(machine: str) -> list[tuple[int, int, int, int]]:
    """Classic BPF over struct seccomp_data: the number at 0, architecture at 4, first argument at 16."""
    column, arch, clone = {"x86_64": (1, 0xC000003E, 56), "aarch64": (2, 0xC00000B7, 220)}[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill_process, errno = (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x80000000), 0x00050000
    rules = [(load, 0, 0, 4), (equal, 1, 0, arch), kill_process, (load, 0, 0, 0)]
    for number in HARMLESS:
        rules += [(equal, 0, 1, number), allow]
    rules += [(at_least, 0, 1, 424), (give, 0, 0, errno | ENOSYS)]      # the x32 numbers too, from 2^30 on
    for call in REFUSED.split(","):
        code = ENETDOWN if call.startswith("socket") else EPERM
        rules += [(equal, 0, 1, int(call.split()[column])), (give, 0, 0, errno | code)]
    refuse = (give, 0, 0, errno | EPERM)
    return rules + [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 0, 1, ANY_NAMESPACE), refuse, allow]


def supervise(ctl, wire, runner: int, setup: dict) -> None:
    """Obey the host's orders and watch the runner, until ctl is closed: by the host, or by its end."""
    running, watched = False, [ctl, os.pidfd_open(runner)]
    while True:
        ready = select.select(watched, [], [], 0.1 if running else None)[0]
        if watched[-1] is not ctl and watched[-1] in ready:
            os.close(watched.pop())
            ctl.send(f"exit {waitpid(runner, 0)[1]}".encode())
        if running and not ready:
            reap(keep=runner)
            if over := overuse(setup):
                running = False
                ctl.send(f"over {over}".encode())
        if ctl not in ready:
            continue
        if not (message := ctl.recv(1 << 16)):
            return
        order, *keeper = message.decode().split()             # "rollback 123", else one word
        running = order in ("go", "interrupt")
        if order == "rollback":
            keeper = int(keeper[0])
            sweep(keep={keeper})
            if watched[-1] is not ctl:
                waitpid(runner, 0)
                os.close(watched.pop())
            reap(keep=keeper)
            while select.select([wire], [], [], 0)[0] and wire.recv(1 << 16):
                pass                                    # what the host had sent to the dead runner
            runner = keeper
            if alive := is_child(runner):
                watched.append(os.pidfd_open(runner))
            ctl.send(f"rolled {alive}".encode())
        elif watched[-1] is not ctl:
            if order == "interrupt":
                kill(runner, SIGINT)
            kill(runner, signal.SIGSTOP if order == "settle" else SIGCONT)
        if order == "settle":
            sweep(keep={runner})
            ctl.send(b"settled")
            reap(keep=runner)


def is_child(pid: int) -> bool:
    """Whether pid is a living child of this process, by the kernel's word."""
    try:
        return pid > 0 and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def descendants() -> set[int]:
    """All processes of this session but the supervisor. In its own pid namespace that is everybody."""
    if getpid() == 1:
        return {int(name) for name in os.listdir("/proc") if name.isdigit()} - {1}
    found, todo = set(), [getpid()]
    while todo:
        found.add(parent := todo.pop())
        for children in Path("/proc").glob(f"{parent}/task/*/children"):
            try:
                todo += [int(pid) for pid in children.read_text().split()]
            except OSError:
                pass                                    # it has ended meanwhile
    return found - {getpid()}


def sweep(keep: set[int]) -> None:
    """Kill all processes of the session but `keep`, until no new ones turn up."""
    killed = set()
    while found := descendants() - keep - killed:
        for pid in found:
            try:
                kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        killed |= found


def reap(keep: int) -> None:
    """Collect dead children, the session's orphans included. The runner's death is told elsewhere."""
    try:
        while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and dead.si_pid != keep:
            waitpid(dead.si_pid, 0)
    except ChildProcessError:
        pass                                            # there is none


def overuse(setup: dict) -> str | None:
    """What the session's processes have too much of together; a process alone is held by its limits."""
    pages, pids = 0, descendants()
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            pass                                        # it has ended meanwhile
    if pages * resource.getpagesize() > 3 * setup["memory_mb"] << 20:
        return "much memory"
    return "many processes" if len(pids) > setup["processes"] + 2 else None


# --- inside: the runner. Whatever it says is hostile, because model code runs in the same process ---

class ToolError(Exception):
    """What the model's code sees when a tool says no."""
    __module__ = "builtins"                             # a traceback then says ToolError, without a module


class Worker:
    """Runs the steps, in the module __main__."""

    def __init__(self, wire, out: int, setup: dict):
        self.wire, self.out, self.setup, self.inbox = wire, out, setup, bytearray()
        self.step = self.keeper = self.calls = self.interrupts = 0
        self.in_step = self.armed = False
        sys.modules["__main__"] = self.main = types.ModuleType("__main__")
        sys.argv = [""]
        sys.path.append(os.getcwd())
        os.environ.update(HOME=os.getcwd(), TMPDIR="/tmp" if getppid() == 1 else os.getcwd())
        vars(self.main).update({name: self.tool(name, doc) for name, doc in setup["tools"].items()},
                               __builtins__=builtins, final_answer=self.final_answer, ToolError=ToolError)

    def loop(self) -> None:
        """Serve steps for ever. Before each, fork a keeper, which waits, and goes on if it has to."""
        libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)         # code may look at its own /proc/self
        pthread_sigmask(SIG_BLOCK, {SIGCONT})           # it works all the same; a keeper cannot miss it
        supervisor, keeper = getppid(), 0
        while True:
            frame = self.read()
            if "run" not in frame:
                continue                                # a reply that came too late for its call
            self.step, old_keeper = self.step + 1, keeper
            try:
                keeper = fork() if self.setup["rollback"] else -1
            except OSError:                             # the code's threads leave no room: no keeper
                keeper = -1
            if keeper == 0:
                sigwait({SIGCONT})
                while getppid() != supervisor:          # not the supervisor's order: the runner still lives
                    sigwait({SIGCONT})
                self.send({"ready": True})
                continue
            if keeper > 0:
                self.send({"keeper": keeper})
            if old_keeper > 0:
                waitpid(old_keeper, 0)                  # the supervisor has killed it
            self.serve(frame["run"])

    def serve(self, code: str) -> None:
        self.me, self.interrupts, self.lock = getpid(), 0, threading.Lock()
        self.fresh_streams()
        signal.signal(SIGINT, self.on_interrupt)
        pthread_sigmask(SIG_UNBLOCK, {SIGINT})
        self.in_step = True
        try:
            value, error = self.execute(code)
        except BaseException as again:                  # interrupted again while it was described
            value, error = None, type(again).__name__
        self.armed = False
        sys.settrace(None)
        libc.fflush(None)                               # what C code has printed
        if getpid() != self.me:
            _exit(0)                                    # a child that the code has forked comes back here
        with self.lock:
            self.in_step = False                        # from here on no thread may call
            self.send({"end": "error" if error else "ok", "value": value, "error": error})

    def execute(self, code: str) -> tuple[str | None, str | None]:
        """Run the code; returns (repr of a last bare expression, traceback)."""
        name, space, limit = f"<step {self.step}>", vars(self.main), self.setup["output_chars"]
        linecache.cache[name] = len(code), None, code.splitlines(True), name
        self.armed = True
        try:
            tree = ast.parse(code, name)
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, name, "exec"), space)
            value = last and eval(compile(ast.Expression(last.value), name, "eval"), space)
            return None if value is None else cut("".join([repr(value)]), limit), None  # join: a plain str
        except BaseException as error:
            sys.settrace(None)
            return None, describe(error, limit)

    def fresh_streams(self) -> None:
        """stdout and stderr unbuffered on the host's memfd, whatever the last step did to them."""
        try:
            dup2(self.out, 1), dup2(self.out, 2)
        except OSError:
            pass                                        # the code has closed it: its output is lost
        for name, fd in (("stdout", 1), ("stderr", 2)):
            raw = io.FileIO(fd, "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(raw, "utf-8", "backslashreplace", write_through=True))

    def on_interrupt(self, signum, frame) -> None:
        """Raise in the running code; from the second time on, also in the handler that swallows it."""
        def again(frame, event, arg):
            if event == "line":
                raise KeyboardInterrupt
            return again if frame.f_code.co_filename.startswith("<step ") else None

        if not self.armed:
            return
        self.interrupts += 1
        while self.interrupts > 1 and frame is not None:
            if frame.f_code.co_filename.startswith("<step "):
                frame.f_trace = again
                sys.settrace(again)
            frame = frame.f_back
        raise KeyboardInterrupt

    # --- the namespace's functions, and the wire ---

    def tool(self, name: str, doc: str) -> Callable:
        def function(*args, **kwargs):
            return self.call(name, args, kwargs)
        function.__name__ = function.__qualname__ = name
        function.__doc__ = doc
        return function

    def call(self, name: str, args: tuple, kwargs: dict):
        """Have the host run a tool. ToolError: the tool says no, or the arguments are not JSON."""
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
        """Only the runner itself may talk to the host, one thread at a time, and only during a step."""
        if getpid() != self.me:
            raise ToolError(f"{name} works in the main process only")
        with self.lock:
            if not self.in_step:
                raise ToolError(f"{name} works during a step only")
            yield

    def send(self, frame: dict) -> None:
        with masked():
            send_frame(self.wire, frame)

    def read(self, select=select.select) -> dict:
        """The next frame. An interrupt may end the waiting for it, but never splits it."""
        ready = None
        while True:
            with masked():
                if ready:
                    self.inbox += self.wire.recv(1 << 16) or _exit(0)
                if (frame := take_frame(self.inbox)) is not None:
                    return frame
            ready = select([self.wire], [], [])


@contextmanager
def masked():
    """No KeyboardInterrupt in here: half a frame would break the protocol."""
    before = pthread_sigmask(SIG_BLOCK, {SIGINT})
    try:
        yield
    finally:
        pthread_sigmask(SIG_SETMASK, before)


def describe(error: BaseException, limit: int) -> str:
    """The traceback with the model's own lines only. Of a hostile exception, its type's name."""
    try:
        whole = TracebackException.from_exception(error)
        todo = [whole]
        while todo:
            part = todo.pop()
            part.stack[:] = [frame for frame in part.stack if frame.filename.startswith("<step ")]
            todo += [other for other in (part.__cause__, part.__context__) if other]
            todo += getattr(part, "exceptions", None) or []
        return cut("".join(whole.format()), limit)
    except BaseException:
        return f"{type(error).__name__} (its text could not be made)"
