"""The executor: a persistent Python session per trajectory, in processes of its own.

Owns the limits of a session, the result of a *cell* (one execution of code in a session), the process that keeps the
variables, the wire between it and the host, timeouts and the kill. machinery/sandbox.py isolates the processes and says
what that covers; this file can be understood without it. Read in this order: `Limits`, `CellResult`, `Session` (a cell
as the host sees it), `Executor`, `Runner` (a cell as seen inside). Nothing here knows of models or tasks.

  host: the trainer        supervisor: trusted       runner: one process, runs the model's code, cell after cell
  {"run": code} ---------------------------------->  runs the code in the session's namespace, once it goes on
  resume --------------->  lets the runner go on
  <-----------------------------------------------   {"call": tool...}, {"answer": text...}; at last {"end": status...}
  interrupt ------------>  SIGINT ---------------->  KeyboardInterrupt, once the cell's time is up
  pause ---------------->  stops the runner, threads included; kills all else of the cell. The host does not wait for it
  start ---------------->  kills all; forks a new runner, if the cell was killed or has crashed

Two sockets lead to a session: `control` to the supervisor; `wire` to the runner, where all that comes is hostile: it is
bounded and checked. Output goes to a file in memory that the host owns. Clock and status are the host's; a runner can
only claim that its code raised nothing, which any code can have with `except: pass`. An interrupted cell keeps its
variables. A killed or crashed one restarts the session: variables are lost, the working directory and its files stay.

Unlike in plain Python: exit() ends the cell, not the session. Each cell begins with stdout, stderr and SIGINT's handler
as new. At its end its alarm and its processes end (which count until code has waited for them); it waits for tool calls
that its threads have begun, then threads stand still. A signal handler that raises between two cells crashes the next
one. A forked child that ends by an exception or exit(n) has status 1 and prints nothing. Nothing runs at the exit.
`__file__` names no file; /dev/stdout, opened by name, begins anew. No network, so no multiprocessing.Manager; no memfd,
no mmap(-1), no inotify; calls of the scheduler take pid 0 only. A reply of 200 kB must be read within half the grace.
Not covered: bugs of the kernel; side channels (flock on a file in /usr); use of the cores; the kernel's own memory for
pipes and mappings; code may lower its oom_score_adj, unless the start had CAP_SYS_RESOURCE. In "none" also not: files
(for root also /proc's: priorities of others); the disk's total; the number of terminals, timers and sockets; /dev/zero
as shared memory; the size of a fork bomb (it soon ends); before Linux 6.12 others' signals, memory and environment.
"""
import ast
import builtins
import fcntl
import inspect
import io
import linecache
import os
import secrets
import select
import socket
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec
from os import _exit, dup2, getpid, getppid, read       # by name: model code may patch modules
from pathlib import Path
from signal import ITIMER_REAL, SIG_BLOCK, SIG_UNBLOCK, SIGINT, pthread_sigmask, setitimer, signal
from traceback import TracebackException

from machinery.cli import UserError
from machinery.sandbox import PR_SET_DUMPABLE, SandboxError, Zygote, libc, remove_tree
from machinery.wire import cut, send_frame, take_frame, valid

MAX_ANSWER = 10_000                             # characters kept of an answer
BROKEN_PROTOCOL = "crashed", "it broke the protocol between sandbox and host"


class ToolError(Exception):
    """A tool says no. Its text reaches the model's code as a short error."""
    __module__ = "builtins"                     # so that a traceback says "ToolError", without a module


class SessionLost(Exception):
    """The host's side failed (no process, no memory), not the code: the trajectory has no valid outcome."""


class CellLost(Exception):
    """(status, reason): a cell cannot end in order, and the session has to be restarted."""


@dataclass(frozen=True)
class Limits:
    """What one session may use."""
    seconds: float = 20.0           # per cell, tool calls included
    grace: float = 1.0              # how much longer a cell may take to be interrupted or killed
    memory_mb: int = 1024           # address space per process; three times this resident in all together
    output_chars: int = 20_000      # of the output (in bytes), the value and the error, each
    tool_calls: int = 50            # per session
    disk_mb: int = 64               # besides the attachments; also the largest file and the most output
    processes: int = 64             # processes and threads at once


@dataclass
class CellResult:
    """What one cell came to. `status` is what the host found:
    ok; error: an exception; timeout: interrupted, variables are kept; killed: no reaction, or too much used;
    crashed: its process died or broke the protocol. The last two restart the session: variables are lost."""
    status: str = "ok"
    output: str = ""                # stdout and stderr in order, cut in the middle
    value: str | None = None        # repr of a last bare expression
    error: str | None = None        # the traceback with the model's own lines, and why a cell was stopped
    seconds: float = 0.0
    answered: bool = False
    answer: str | None = None       # of the first final_answer(...) in this cell
    tool_calls: int = 0

    def observation(self) -> str:
        """What the model reads: output, value and error."""
        return "\n".join(part.rstrip("\n") for part in (self.output, self.value, self.error) if part) or "(no output)"


class Session(AbstractContextManager):
    """One trajectory's Python, made by `Executor.session`. One cell at a time; other sessions run beside it."""

    def __init__(self, executor: "Executor", tools: Mapping[str, Callable], files: Mapping[str, Path | bytes]):
        self.executor, self.tools, self.limits = executor, dict(tools), executor.limits
        self.files, self.tool_calls, base = dict(files), 0, executor.base
        self.workdir = Path(tempfile.mkdtemp(dir=base)) if base else None   # sandbox "none": the host sees it
        self._lock, self._deadline, self._control, self._wire = threading.Lock(), 0.0, None, None
        self._output = open(os.memfd_create("output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "r+b", buffering=0)
        fcntl.fcntl(self._output, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)     # so code can add no seal
        try:
            self._start(self.files)
        except BaseException:
            self.close()
            raise

    def execute(self, code: str, seconds: float | None = None) -> CellResult:
        """Run one cell of at most `seconds` plus the grace. SessionLost: the session is closed.

        What code does is never a host failure: once a session has started, whatever goes wrong in it is the cell's
        result, crashed or killed (`_run`, the only place that decides this), or code could steer its reward."""
        with self._lock, self.executor.slots:           # the clock starts when a slot is free
            if self._output.closed:
                raise SessionLost("the session is closed")
            result, start = CellResult(), time.monotonic()
            self._deadline = start + (self.limits.seconds if seconds is None else seconds)
            try:
                self._run(code, result)
            except BaseException:                       # Ctrl-C in the trainer: the runner may do anything
                self._stop()
                raise
            result.seconds = time.monotonic() - start
            return result

    def seconds_left(self) -> float:
        """Until the running cell's time is up: for tools."""
        return max(0.0, self._deadline - time.monotonic())

    def close(self) -> None:
        """End the session; its processes and files go with it."""
        with self._lock:
            self._stop()
            self._output.close()
            if self.workdir is not None:
                remove_tree(self.workdir)

    def __exit__(self, *exc):
        self.close()

    def _run(self, code: str, result: CellResult) -> None:
        """Run the cell and fill in its result. Where it does not end in order, restart the session."""
        try:
            if self._control is None:
                raise CellLost("crashed", "it could not run: the last restart failed")
            end = self._listen(code, result)
            late = self.seconds_left() == 0.0
            self._control.send(b"pause")
        except Exception as lost:                       # not only what we expect: see `execute`
            result.status, reason = lost.args if isinstance(lost, CellLost) else ("crashed", "its process is gone")
            if self.seconds_left() == 0.0:
                result.status = "killed"
            note = f"{reason}. {self._restart()}"
        else:
            result.value, result.error = (
                end[key] and cut(valid(end[key]), self.limits.output_chars) for key in ("value", "error"))
            result.status = "timeout" if late else "ok" if end["end"] == "ok" else "error"
            note = "its time was up. Variables set so far are kept." if late else None
        result.output = self._read_output()
        if note:
            result.error = f"{result.error or ''}[{result.status}: {note}]"

    def _listen(self, code: str, result: CellResult) -> dict:
        """Have the code run; serve it until its `end`. When its time is up, interrupt it every 0.1 s; then give up.

        A frame counts only if it bears the cell's token: what was written before the cell began cannot."""
        interrupts, token = 0, secrets.token_hex(8)
        self._inbox.clear()
        with suppress(BlockingIOError):                 # what the last cell has left
            while os.read(self._wire.fileno(), 1 << 20):
                pass
        self._control.send(b"resume")
        send_frame(self._wire, {"run": code, "token": token})
        while True:
            now, next_interrupt = time.monotonic(), self._deadline + 0.1 * interrupts
            if now >= self._deadline + 0.7 * self.limits.grace:
                raise CellLost("killed", "its time was up and it did not react to an interrupt")
            if now >= next_interrupt:
                self._control.send(b"interrupt")
                interrupts += 1
            try:
                frame = take_frame(self._inbox)
            except (ValueError, RecursionError):
                raise CellLost(*BROKEN_PROTOCOL) from None
            if frame is None:
                ready = [descriptor for descriptor, _ in self._poll.poll(1000 * max(0.0, next_interrupt - now))]
                if self._wire.fileno() in ready:        # read first: a last frame may have come before a death
                    if not (chunk := self._wire.recv(1 << 16)):
                        raise CellLost("crashed", "it closed the connection to the host")
                    self._inbox += chunk
                elif ready:
                    self._report()
                continue
            if frame.pop("token", None) != token:
                raise CellLost(*BROKEN_PROTOCOL)
            match frame:
                case {"call": str(), "id": int(), "args": list(), "kwargs": dict(), **more} if not more:
                    self._call(frame, result)
                case {"answer": str(answer), "id": int(number), **more} if not more:
                    if not result.answered:
                        result.answered, result.answer = True, valid(answer[:MAX_ANSWER])
                    send_frame(self._wire, {"reply": number, "value": None, "error": None})
                case {"end": str(), "value": str() | None, "error": str() | None, **more} if not more:
                    return frame
                case _:
                    raise CellLost(*BROKEN_PROTOCOL)

    def _call(self, frame: dict, result: CellResult) -> None:
        """Run one tool in a thread of its own, until the cell's time is up, and without holding a slot."""
        name, reply = frame["call"], {"reply": frame["id"], "value": None, "error": None}
        result.tool_calls, self.tool_calls = result.tool_calls + 1, self.tool_calls + 1

        def work():
            try:
                reply["value"] = self.tools[name](*frame["args"], **frame["kwargs"])
            except BaseException as error:              # whatever it raises, exit included, the model reads
                kind = "" if isinstance(error, ToolError) else f"{type(error).__name__}: "
                reply["error"] = cut(f"{kind}{error}", 1000)

        if name not in self.tools:
            reply["error"] = f"there is no tool {name[:100]!r}"
        elif self.tool_calls > self.limits.tool_calls:
            reply["error"] = f"no more than {self.limits.tool_calls} tool calls are allowed"
        else:
            thread = threading.Thread(target=work, daemon=True)
            self.executor.slots.release()
            try:
                thread.start()
                while thread.is_alive() and self.seconds_left() > 0.0:
                    thread.join(min(0.1, self.seconds_left()))
                    if self._control.fileno() in dict(self._poll.poll(0)):
                        self._report()                  # the code's other processes use too much, or it has died
            finally:
                waiting = time.monotonic()
                self.executor.slots.acquire()
                self._deadline += time.monotonic() - waiting
            if thread.is_alive() or self.seconds_left() == 0.0:     # next is the interrupt: a large reply stays unread
                return send_frame(self._wire, {"reply": frame["id"], "value": None, "error": "the cell's time is up"})
        try:
            send_frame(self._wire, reply)
        except (TypeError, ValueError, RecursionError) as error:
            send_frame(self._wire, reply | {"value": None, "error": f"the tool's result cannot be sent: {error}"})

    def _restart(self) -> str:
        """A new runner in the same directory. Returns what the model reads."""
        try:
            self._wire.close()
            self._start_runner()
        except Exception:                               # the supervisor is gone, too: a whole new session
            self._stop()
            try:
                self._start(self.files if self.workdir is None else {})     # "none": the directory is still there
            except Exception as error:                  # the next cell tries again
                return f"{error}. Variables are lost."
            if self.workdir is None:
                return "The session was restarted: variables and files are lost, attachments are as at the start."
        return "The session was restarted: variables are lost, files in the working directory are kept."

    def _read_output(self) -> str:
        """What the cell wrote, or its first and last part: the host reads little, however much it is."""
        file = self._output.fileno()
        size, half = os.fstat(file).st_size, self.limits.output_chars // 2
        ends = [(0, size)] if size <= 2 * half else [(0, half), (size - half, half)]
        texts = [os.pread(file, length, at).decode("utf-8", "replace") for at, length in ends]
        self._output.truncate(0)                        # give the memory back now
        return f"\n[... {size - 2 * half:,} bytes of output cut ...]\n".join(texts)

    def _start(self, files: Mapping[str, Path | bytes]) -> None:
        """A supervisor, a working directory with these files, and a runner."""
        docs = {name: (inspect.getdoc(tool) or "")[:500] for name, tool in self.tools.items()}
        setup = asdict(self.limits) | {"tools": docs, "workdir": str(self.workdir or "/tmp/work")}
        try:
            self._control = self.executor.zygote.fork_session(setup, files)
            self._start_runner()
        except (OSError, SandboxError) as error:
            self._stop()
            raise SessionLost(f"a session could not start: {error}") from None

    def _start_runner(self) -> None:
        """Have the supervisor kill every other process of the session, and fork a runner with a new wire."""
        self._wire, inside = socket.socketpair()
        self._wire.settimeout(self.limits.grace / 2)    # a runner may refuse to read
        with inside:
            socket.send_fds(self._control, [b"start"], [inside.fileno(), self._output.fileno()])
        while True:
            with suppress(CellLost):                    # there may be reports of the last runner before it
                self._report()
                break
        self._inbox, self._poll = bytearray(), select.poll()
        self._poll.register(self._control, select.POLLIN)
        self._poll.register(self._wire, select.POLLIN)

    def _report(self) -> None:
        """Take the supervisor's next report. CellLost: the runner has died, or used too much. Else it has started."""
        report = self._control.recv(1 << 16).decode()
        if not report or report.startswith("failed"):
            raise ConnectionError(report or "the session's supervisor is gone")
        if " " in report:
            raise CellLost(*report.split(" ", 1))

    def _stop(self) -> None:
        """Close the host's ends: the supervisor kills all processes, and exits."""
        for end in filter(None, (self._control, self._wire)):
            end.close()
        self._control = self._wire = None


class Executor(AbstractContextManager):
    """Starts sessions, any number; at most `max_running` (default: the cores) run a cell. Thread-safe.
    sandbox: "bwrap", "none" (SandboxError where it does not work), or "auto": bwrap, else none, loudly.
    One process inside it, the zygote, has the usual libraries imported; it forks all sessions."""

    def __init__(self, sandbox: str = "auto", limits: Limits = Limits(), max_running: int | None = None):
        if sandbox not in ("auto", "bwrap", "none"):
            raise UserError(f"--sandbox is auto, bwrap or none, not {sandbox!r}")
        self.limits, self.base, self.zygote = limits, None, None
        self.slots = threading.Semaphore(max_running or os.cpu_count() or 1)
        for kind in ["bwrap", "none"] if sandbox == "auto" else [sandbox]:
            self.sandbox = kind
            try:
                if kind == "none":
                    self.base = tempfile.mkdtemp(prefix="tool-r1-")
                    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)         # or code could read our memory in /proc
                self.zygote = Zygote(self.base)
                self.session().close()
                return
            except (OSError, SandboxError, SessionLost) as error:
                self.close()
                if sandbox != "auto" or kind == "none":
                    raise SandboxError(f"--sandbox {kind} fails here: {error} (README: Sandbox)") from None
                print(f"WARNING: NO SANDBOX: bwrap fails here ({error}). Model-written code can read and "
                      "change every file that you can, and signal processes (see README).", file=sys.stderr)

    def session(self, tools: Mapping[str, Callable] | None = None,
                files: Mapping[str, Path | bytes] | None = None) -> Session:
        """A new session: `tools` by their names in the code's namespace, `files` copied into its folder."""
        return Session(self, tools or {}, files or {})

    def close(self) -> None:
        """End every session. When this returns, no process, mount or file of the executor is left."""
        if self.zygote is not None:
            self.zygote.close()

    def __exit__(self, *exc):
        self.close()


# --- inside: the runner. Whatever it says is hostile, because model code runs in the same process ---

def run_cells(wire: socket.socket, resumed: int, output: int, setup: dict) -> None:
    """All that a runner's process does, until it is killed. Does not return."""
    try:
        runner = Runner(wire, output, setup)
        while read(resumed, 1):                         # until then the last cell is not over
            while "run" not in (frame := runner.read()):
                pass                                    # a reply that came too late for its call
            runner.token = frame["token"]
            runner.run(frame["run"])
    finally:
        _exit(1)


class Runner:
    """Runs the cells, in the module __main__."""

    def __init__(self, wire: socket.socket, output: int, setup: dict):
        self.wire, self.output, self.setup, self.inbox = wire, output, setup, bytearray()
        self.cell, self.calls, self.token, self.lock = 0, 0, "", threading.Lock()    # the token: of this cell
        self.pid, self.armed = getpid(), False          # armed: an interrupt raises
        self.lock.acquire()                             # a thread that calls a tool between cells waits
        sys.modules["__main__"] = self.main = types.ModuleType("__main__")
        sys.argv = [""]
        sys.path.append(os.getcwd())
        self.file = self.main.__file__ = os.path.join(os.getcwd(), "cell.py")   # it does not exist, and
        self.main.__spec__, self.lines = ModuleSpec("__main__", None), []       # so multiprocessing must not run it
        os.environ.update(HOME=os.getcwd(), TMPDIR="/tmp" if getppid() == 1 else os.getcwd(), USER="user")
        tools = {name: self.tool(name, doc) for name, doc in setup["tools"].items()}
        vars(self.main).update(tools, final_answer=self.final_answer, ToolError=ToolError, __builtins__=builtins)
        self.make_ready()

    def run(self, code: str) -> None:
        """Run one cell and send its `end`; then, while the host goes on, make ready for the next one."""
        self.cell, self.interrupts, value, error = self.cell + 1, 0, None, None
        pthread_sigmask(SIG_UNBLOCK, {SIGINT})
        self.lock.release()
        self.armed = True
        try:
            try:
                value = self.execute(code)
            except BaseException as problem:
                sys.settrace(None)
                if type(problem) is SystemExit and problem.code in (None, 0):
                    value = "exit: this cell ends here, the session goes on"
                else:
                    error = describe(problem, self.setup["output_chars"])
            setitimer(ITIMER_REAL, 0)                   # an alarm that the code has left ends with its cell
            for name in ("stdout", "stderr"):           # so does what the code's own streams hold back
                with suppress(Exception):
                    getattr(sys, name).flush()
        except BaseException as again:                  # interrupted again while it was described
            error = type(again).__name__
        self.armed = False
        sys.settrace(None)
        libc.fflush(None)                               # what C code has printed
        if getpid() != self.pid:
            _exit(1 if error else 0)                    # a child that the code has forked comes back here
        self.lock.acquire()
        send_frame(self.wire, {"end": "error" if error else "ok", "value": value, "error": error, "token": self.token})
        self.make_ready()

    def make_ready(self) -> None:
        """Streams and handler as a cell finds them, whatever the last one did to them."""
        for _ in range(2):                              # the code's own streams may close 1 and 2 when they go
            with suppress(OSError):                     # the code has closed it: its output is lost
                dup2(self.output, 1), dup2(self.output, 2)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__ = [     # unbuffered
                io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
                for number in (1, 2)]
        if getattr(sys.stdin, "closed", True):          # exit() closes it
            sys.stdin = open(0, closefd=False)
        signal(SIGINT, self.on_interrupt)

    def execute(self, code: str) -> str | None:
        """Run the code in the module __main__; returns the repr of a last bare expression."""
        name, space, code = f"<cell {self.cell}>", vars(self.main), code.removeprefix("\ufeff")
        linecache.cache[name] = len(code), None, code.splitlines(True), name
        self.lines[:0] = f"{code}\n".splitlines(True)   # the newest first: where `inspect` looks for a class
        linecache.cache[self.file] = 0, None, self.lines, self.file
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), space)
        value = eval(compile(ast.Expression(last.value), name, "eval"), space) if last else None
        return None if value is None else cut("".join([repr(value)]), self.setup["output_chars"])   # join: a plain str

    def on_interrupt(self, signum, frame) -> None:
        """Raise in the running code; from the second time on, also in the handler that swallows it."""
        def again(frame, event, arg):
            if event == "line":
                raise KeyboardInterrupt
            return again if frame.f_code.co_filename.startswith("<cell ") else None

        if not self.armed:
            return
        self.interrupts += 1
        while self.interrupts > 1 and frame is not None:
            if frame.f_code.co_filename.startswith("<cell "):
                frame.f_trace = again
                sys.settrace(again)
            frame = frame.f_back
        raise KeyboardInterrupt

    def tool(self, name: str, doc: str) -> Callable:
        """A function of the namespace: has the host run the tool."""
        def function(*args, **kwargs):
            return self.ask(name, {"call": name, "args": list(args), "kwargs": kwargs})
        function.__name__, function.__qualname__, function.__doc__ = name, name, doc
        return function

    def final_answer(self, answer) -> None:
        """Give the final answer to the question."""
        self.ask("final_answer", {"answer": str(answer)[:MAX_ANSWER]})

    def ask(self, name: str, frame: dict):
        """Send the frame; returns the host's reply. ToolError: the tool says no, or the arguments are not JSON."""
        if getpid() != self.pid:
            raise ToolError(f"{name} works in the main process only")
        with self.lock:                                 # one thread at a time
            self.calls += 1
            pthread_sigmask(SIG_BLOCK, {SIGINT})        # an interrupt would leave half a frame on the wire
            try:
                send_frame(self.wire, frame | {"id": self.calls, "token": self.token})
                while (reply := self.read()).get("reply") != self.calls:
                    pass                                # the reply to a call that was interrupted
            except (TypeError, ValueError, RecursionError) as error:
                raise ToolError(f"{name}: arguments have to be plain values: {error}") from None
            finally:
                pthread_sigmask(SIG_UNBLOCK, {SIGINT})
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.001)                           # so that a loop of calls lets others in, the cell's end too
        if reply["error"] is not None:
            raise ToolError(reply["error"])
        return reply["value"]

    def read(self, select=select.select) -> dict:
        """The next frame. An interrupt may end the waiting for it, but never splits it."""
        while (frame := take_frame(self.inbox)) is None:
            pthread_sigmask(SIG_UNBLOCK, {SIGINT})
            select([self.wire], [], [])
            pthread_sigmask(SIG_BLOCK, {SIGINT})
            self.inbox += self.wire.recv(1 << 16) or _exit(0)
        return frame


def describe(error: BaseException, limit: int) -> str:
    """The traceback with the model's own lines only. Of a hostile exception, its type's name."""
    try:
        todo = [whole := TracebackException.from_exception(error)]
        while todo:
            part = todo.pop()
            part.stack[:] = [frame for frame in part.stack if frame.filename.startswith("<cell ")]
            todo += [other for other in (part.__cause__, part.__context__, *(part.exceptions or [])) if other]
        return cut("".join(whole.format()), limit)
    except BaseException:
        return f"{type(error).__name__} (its text could not be made)"
