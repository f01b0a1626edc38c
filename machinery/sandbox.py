"""The sandbox: what keeps a session's processes away from the host and from each other. executor.py uses it.

Skip this file on a first reading. Read it in this order: `Zygote` (what the host starts), `bubblewrap`; then what runs
inside: `launch`, `zygote`, `open_session`, `isolate`, `restrict`, `confine`, `Supervisor`.

  host --> bwrap --> zygote: Python with the usual libraries imported; it forks one process tree per session
                       `-- supervisor: process 1 of the session's own namespaces; it never runs model code
                             `-- runner: runs the model's code (executor.Runner); whatever that code starts is below

`bwrap` covers: an unprivileged uid without capabilities; namespaces (user, mount, pid, ipc, network), terminals and
  tmpfs (/tmp, /dev/shm) of each session's own; only /usr and the interpreter with its packages are visible, read-only;
  no sockets but stream pairs, no ptrace, mount, unshare, inotify, io_uring, bpf, keyctl, memfd, SysV or shared
  anonymous memory, no scheduling of others (seccomp); limits on memory, processes, open files, disk, output.
`none` covers: an empty environment, the limits but the disk's total, the same seccomp filter, no capabilities, no
  access to the trainer's memory; from Linux 6.12 on (Landlock) no memory of others, no signals to them. A session is
  one process group, which the kernel kills when the supervisor dies. Not your files. The rest: top of executor.py.
"""
import ctypes
import fcntl
import gc
import importlib
import json
import os
import re
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
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath

from machinery.cli import UserError

UNPRIVILEGED = 65534                            # the uid that a root trainer drops to before anything else
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 1 << 27, 1 << 28, 1 << 29, 1 << 30
NOSUID, NODEV, NOEXEC, BIND, REC, PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
EPERM, ENOSYS, ENETDOWN = 1, 38, 100


class SandboxError(UserError):
    """The sandbox that was asked for does not work on this machine."""


def check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


# The sandbox's Python imports these files from a zip archive in memory: the repository, which may hold answers, is not
# visible inside. Every process down to the zygote inherits the archive's descriptor.
INSIDE = ("executor.py", "machinery/__init__.py", "machinery/cli.py", "machinery/sandbox.py", "machinery/wire.py")
BOOT = "import sys; sys.path.insert(0, '/proc/self/fd/{}'); import executor; from machinery import sandbox; sandbox."


class Zygote:
    """The process that forks sessions, as the host sees it. Thread-safe. `base`: the sessions' folder; None: bwrap."""

    def __init__(self, base: str | None):
        self.base, self.lock = base, threading.RLock()
        self.start()

    def start(self) -> None:
        """SandboxError where it does not start."""
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8",
                       "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}    # or 64 MB each
        with open(os.memfd_create("sources"), "w+b") as sources, tempfile.TemporaryFile() as errors:
            with zipfile.ZipFile(sources, "w") as archive:
                for name in INSIDE:
                    archive.writestr(name, (Path(__file__).parent.parent / name).read_bytes())
            sources.flush()
            python, boot = [sys.executable, "-I", "-c"], BOOT.format(sources.fileno())
            command = [*python, f"{boot}zygote({self.base!r}, executor.run_cells)"]
            if self.base is None:
                command = bubblewrap(command)
                if os.getuid() == 0:
                    command = [*python, f"{boot}launch({UNPRIVILEGED}, {visible_paths()}, {command})"]
            self.socket, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.socket.settimeout(60.0)
            with inside:                                # a process session of its own: Ctrl-C does not reach it
                self.process = subprocess.Popen(
                    command, stdin=inside, stdout=errors, stderr=errors, cwd="/", env=environment,
                    start_new_session=True, pass_fds=[sources.fileno()])
            with suppress(OSError):
                if self.socket.recv(16) == b"ready":
                    return
            self.process.kill()
            self.close()
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise SandboxError(lines[-1] if lines else "its process did not start")

    def fork_session(self, setup: dict, files: Mapping[str, Path | bytes]) -> socket.socket:
        """Have a session forked with these attachments; returns the host's end of its control socket."""
        for path in map(PurePosixPath, files):
            if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in str(path) or len(files) > 250:
                raise UserError(f"a session takes up to 250 files with names inside its folder, not {str(path)!r}")
        control, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.settimeout(10.0)                        # a supervisor is prompt: else something broke
        with ExitStack() as opened:
            descriptors = [opened.enter_context(inside).fileno()]
            for content in files.values():
                file = opened.enter_context(open(os.memfd_create("attachment"), "w+b"))
                file.write(content if isinstance(content, bytes) else Path(content).read_bytes())
                file.seek(0)                            # this writes what is buffered, too
                descriptors.append(file.fileno())
            message = [json.dumps(setup | {"files": list(files)}).encode()], descriptors
            with self.lock:
                try:
                    socket.send_fds(self.socket, *message)
                except ConnectionError:                 # the zygote died (out of memory?): a new one, once
                    self.close()
                    self.start()
                    socket.send_fds(self.socket, *message)
        return control

    def close(self) -> None:
        """End it and every session; returns when no process is left."""
        with self.lock:
            self.socket.close()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10.0)
            self.process.kill()
            self.process.wait()


def bubblewrap(command: list[str]) -> list[str]:
    """The command inside bwrap: a read-only view of /usr and of the interpreter, and nothing else."""
    if (bwrap := shutil.which("bwrap")) is None:
        raise SandboxError("bubblewrap is not installed")
    argv = [bwrap, "--unshare-all", "--as-pid-1", "--proc", "/proc", "--dev", "/dev", "--dir", "/tmp",
            "--ro-bind", "/usr", "/usr", "--dev-bind", "/dev/full", "/dev/zero"]    # zeros, but no shared memory
    for path in ("/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"):
        argv += ["--ro-bind-try", path, path]
    for number, path in enumerate(visible_paths()):
        argv += ["--ro-bind", f"/tmp/{number}" if os.getuid() == 0 else path, path]     # see `launch`
    return argv + ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/", "--"] + command


def visible_paths() -> list[str]:
    """The interpreter and its packages, outside /usr. Not whole prefixes: one may be a project."""
    paths = [os.path.join(prefix, part) for prefix in dict.fromkeys((sys.base_prefix, sys.prefix))
             for part in ("bin", "lib", "lib64", "pyvenv.cfg")]
    return [path for path in paths if os.path.exists(path) and not path.startswith("/usr/")]


# --- inside: launch (as root only), zygote, session. Trusted: they never run model code ---

PRELOAD = ("collections", "csv", "datetime", "decimal", "fractions", "heapq", "itertools", "math",
           "multiprocessing", "random", "re", "statistics", "string", "numpy")


def launch(uid: int, paths: list[str], command: list[str]) -> None:
    """As root: bind the interpreter where any uid can read it (a home may be 0700); drop to uid; become bwrap."""
    Path("/proc/self/oom_score_adj").write_text("900")  # no other can lower what CAP_SYS_RESOURCE has set
    check(libc.unshare(NEWNS), "unshare")
    check(libc.mount(None, b"/", None, REC | PRIVATE, None), "make mounts private")
    sources = [os.open(path, os.O_PATH) for path in paths]
    check(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", NOSUID | NODEV, b"mode=755"), "mount /tmp")
    for number, source in enumerate(sources):
        bind(source, f"/tmp/{number}")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.execv(command[0], command)


def zygote(base: str | None, run_cells: Callable) -> None:
    """Import what sessions use; fork a session for every message. Its descriptors: control, attachments."""
    os.close(int(os.path.basename(sys.path.pop(0))))    # the archive: all of it is imported
    for name in PRELOAD:
        with suppress(ImportError):                     # numpy may be missing
            importlib.import_module(name)
    host = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "r+b") as nothing:
        os.dup2(nothing.fileno(), 0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)       # the kernel reaps the children
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    check(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")
    Path("/proc/self/oom_score_adj").write_text("900")  # "none" was not launched
    gc.collect()
    gc.freeze()                                         # a collection does not touch, so copy, these pages
    host.send(b"ready")
    while (received := socket.recv_fds(host, 1 << 18, 253))[0]:     # b"": the host has closed it, or has ended
        message, descriptors, _, _ = received
        with suppress(OSError):                         # too many processes: the host sees the session's socket close
            if os.fork() == 0:
                host.close()
                open_session(descriptors, json.loads(message), base is None, run_cells)
        for descriptor in descriptors:
            os.close(descriptor)
    if base is not None:                                # in bwrap this is process 1, and takes every session with it
        kill_all()
        remove_tree(base)
    os._exit(0)


def open_session(descriptors: list[int], setup: dict, isolated: bool, run_cells: Callable) -> None:
    """Set up a session and supervise it; ends this process."""
    control, attachments = socket.socket(fileno=descriptors[0]), descriptors[1:]
    try:
        if isolated:
            attached = sum(os.fstat(descriptor).st_size for descriptor in attachments)
            isolate(size=attached + (setup["disk_mb"] << 20), inodes=1000 + 16 * setup["disk_mb"])
        for name, source in zip(setup["files"], attachments, strict=True):
            path = os.path.join(setup["workdir"], name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as target, open(source, "rb") as content:
                shutil.copyfileobj(content, target)
        restrict(setup, isolated)
        Supervisor(control, setup, isolated, run_cells).loop()
    except BaseException as error:
        control.send(f"failed {type(error).__name__}: {error}".encode())
    finally:                                            # the kernel kills the runner and all below: see `lifeline`
        os._exit(0)


def isolate(size: int, inodes: int) -> None:
    """Be process 1 of new namespaces, with its own /proc, /tmp, /dev/shm and terminals, and with no network."""
    uid, gid = os.getuid(), os.getgid()
    check(libc.unshare(NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC), "unshare")
    hidden = {path: os.open(path, os.O_PATH) for path in visible_paths() if path.startswith("/tmp/")}
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    if os.fork():
        os._exit(0)
    check(libc.mount(b"proc", b"/proc", b"proc", NOSUID | NODEV, None), "mount /proc")
    options = b"mode=700,size=%d,nr_inodes=%d" % (size, inodes)
    check(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", NOSUID | NODEV, options), "mount /tmp")
    os.mkdir("/tmp/.shm")
    check(libc.mount(b"/tmp/.shm", b"/dev/shm", None, BIND, None), "bind /dev/shm")
    options = b"newinstance,ptmxmode=666,max=16"        # of the terminals that all sessions share
    check(libc.mount(b"devpts", b"/dev/pts", b"devpts", NOSUID | NOEXEC, options), "mount /dev/pts")
    for path, source in hidden.items():                 # an interpreter below /tmp
        bind(source, path)


def bind(source: int, target: str) -> None:
    """Have the file or folder of the descriptor appear at `target`, and close it."""
    origin = f"/proc/self/fd/{source}"
    os.makedirs(target if os.path.isdir(origin) else os.path.dirname(target), exist_ok=True)
    Path(target).touch()
    check(libc.mount(origin.encode(), target.encode(), None, BIND | REC, None), f"bind {target}")
    os.close(source)


def restrict(setup: dict, isolated: bool) -> None:
    """Limits and no capabilities, for this process and all that it forks."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = dict(AS=mapped + (setup["memory_mb"] << 20), FSIZE=setup["disk_mb"] << 20, NOFILE=256, CORE=0, MEMLOCK=0)
    if isolated:
        limits |= dict(NPROC=setup["processes"] + 2, SIGPENDING=1000)   # per user namespace; elsewhere all the uid's
    else:                                               # no session without a zygote; in bwrap it is process 1
        check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "parent's death")
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    os.setsid()
    Path("/proc/self/oom_score_adj").write_text("1000")     # if memory runs out, sessions go first
    check(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    check(libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)), "capset")


def confine(isolated: bool) -> None:
    """The runner and all that it starts: no signals to others, none of their memory (Landlock), fewer calls."""
    ruleset = libc.syscall(444, struct.pack("QQQ", 0, 0, 3), 24, 0)     # scopes: abstract sockets (1), signals (2)
    if ruleset >= 0:
        check(libc.syscall(446, ruleset, 0), "landlock")
        os.close(ruleset)
    program = ctypes.create_string_buffer(seccomp_program(os.uname().machine, isolated))
    filters = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(program))
    check(libc.prctl(PR_SET_SECCOMP, 2, filters, 0, 0), "seccomp")


# Refused system calls: their numbers on x86_64 and aarch64. (Those that need a capability fail without this.)
REFUSED = """socket 41 198, connect 42 203, bind 49 200, listen 50 201, ptrace 101 117, kcmp 312 272, bpf 321 280,
    process_vm_readv 310 270, process_vm_writev 311 271, perf_event_open 298 241, syslog 103 116, mount 165 40,
    userfaultfd 323 282, unshare 272 97, setns 308 268, add_key 248 217, request_key 249 218, keyctl 250 219,
    personality 135 92, memfd_create 319 279, shmget 29 194, semget 64 190, msgget 68 186, mq_open 240 180,
    fanotify_init 300 262, inotify_init 253 26, inotify_init1 294 26, ioprio_set 251 30, migrate_pages 256 238,
    move_pages 279 239"""
# Refused where an argument (its index, a mask) is or is not a value. Scheduling is for the caller (0) alone, or the
# supervisor would starve; socketpair: not SOCK_DGRAM, which sends to any name; no new namespaces; no shared anonymous
# memory, which can exist without being mapped, so without being counted.
PARTLY = """sched_setaffinity 203 122 0 ffffffff not 0, sched_setscheduler 144 119 0 ffffffff not 0,
    sched_setparam 142 118 0 ffffffff not 0, sched_setattr 314 274 0 ffffffff not 0, prlimit64 302 261 0 ffffffff not 0,
    setpriority 141 140 0 ffffffff not 0, setpriority 141 140 1 ffffffff not 0, socketpair 53 199 1 b not 1,
    clone 56 220 0 7e020000 not 0, mmap 9 222 3 21 is 21"""
IGNORED = "setsid 112 157, setpgid 109 154"     # in `none` they do nothing: one kill() reaches a session as a group
# From 424 on all numbers agree. Let through: pidfd_send_signal, pidfd_open, close_range, openat2, faccessat2,
# epoll_pwait2, futex_waitv. The rest (io_uring, clone3, new mounts, memfd_secret, ...) "does not exist".
HARMLESS = (424, 434, 436, 437, 439, 441, 449)


def seccomp_program(machine: str, isolated: bool) -> bytes:
    """Classic BPF over struct seccomp_data: the number at 0, architecture at 4, arguments from 16 on, 8 bytes each."""
    column, arch = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}[machine]
    load, equal, at_least, mask_with, give = 0x20, 0x15, 0x35, 0x54, 0x06
    allow, kill_process, errno = (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x80000000), 0x00050000
    rules = [(load, 0, 0, 4), (equal, 1, 0, arch), kill_process, (load, 0, 0, 0)]
    for number in HARMLESS:
        rules += [(equal, 0, 1, number), allow]
    rules += [(at_least, 0, 1, 424), (give, 0, 0, errno | ENOSYS)]      # the x32 numbers too, from 2^30 on
    for call in (REFUSED if isolated else f"{REFUSED}, {IGNORED}").split(","):
        code = {"socket": ENETDOWN, "setsid": 0, "setpgid": 0}.get(call.split()[0], EPERM)
        rules += [(equal, 0, 1, int(call.split()[column])), (give, 0, 0, errno | code)]
    for call in PARTLY.split(","):
        *numbers, argument, mask, relation, value = call.split()
        jumps = (1, 0) if relation == "not" else (0, 1)                 # over the refusal: if equal, if not
        rules += [(equal, 0, 5, int(numbers[column])), (load, 0, 0, 16 + 8 * int(argument)),
                  (mask_with, 0, 0, int(mask, 16)), (equal, *jumps, int(value, 16)),
                  (give, 0, 0, errno | EPERM), (load, 0, 0, 0)]
    return b"".join(struct.pack("HBBI", *rule) for rule in rules + [allow])


class Supervisor:
    """Does what the host requests ("start", "resume", "interrupt", "pause"), and watches the runner.

    Reports: "started", "crashed <reason>", "killed <reason>"; "failed <reason>": it cannot go on itself.
    `everyone` is what one kill() reaches without a race with forks: the namespace, or the runner's process group."""

    def __init__(self, control: socket.socket, setup: dict, isolated: bool, run_cells: Callable):
        self.control, self.setup, self.isolated, self.run_cells = control, setup, isolated, run_cells
        self.runner = self.everyone = None              # the runner's pid, while it is in use
        self.kept = []                                  # descriptors that are open as long as this runner is in use
        self.paused, self.stopped = True, False         # no cell may run; the runner's threads stand still
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})      # `events`: a child ends, stops, goes on
        self.events = libc.signalfd(-1, (1 << signal.SIGCHLD - 1).to_bytes(128, "little"), os.O_NONBLOCK | os.O_CLOEXEC)

    def loop(self) -> None:
        """Until the host closes its end of the control socket, or has ended."""
        while True:
            ready = select.select([self.control, self.events], [], [], None if self.paused else 0.05)[0]
            if ready != [self.control]:                 # an event, or none for 0.05 s
                self.reap()
            if self.control in ready:
                request, descriptors, _, _ = socket.recv_fds(self.control, 64, 2)
                if not request:
                    return kill_all(self.everyone)
                if request == b"start":
                    self.start(*descriptors)
                elif self.runner is not None:           # else the host will read that the runner is gone
                    getattr(self, request.decode())()
            elif not self.paused and time.monotonic() > self.next_look and (excess := self.overuse()):
                if not select.select([self.control], [], [], 0)[0]:     # else the cell is perhaps over
                    self.lose(f"killed it had too {excess}")

    def start(self, wire: int, output: int) -> None:
        """Kill every process of the session and fork a new runner, in the same namespaces and directory."""
        self.runner, self.paused = None, True
        kill_all(self.everyone)
        while self.kept:
            os.close(self.kept.pop())
        os.makedirs(self.setup["workdir"], exist_ok=True)       # code may have removed it
        os.chdir(self.setup["workdir"])
        resumed, resume = os.pipe()                     # a byte per cell: no runner begins the next one before its time
        os.set_blocking(resume, False)
        if (runner := os.fork()) == 0:
            os.setsid()                                 # a group to kill; and one to schedule (sched_autogroup)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            for descriptor in (self.control.detach(), self.events, resume):
                os.close(descriptor)
            confine(self.isolated)
            libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)     # code may look at its own /proc/self
            self.run_cells(socket.socket(fileno=wire), resumed, output, self.setup)
        self.kept = [resume, output, resumed, wire, *lifeline(runner)]  # the wire: its end shall be no sign of a death
        self.runner, self.everyone, self.stopped = runner, -1 if self.isolated else -runner, False
        self.control.send(b"started")

    def resume(self) -> None:
        """Let the runner go on with a cell. It stood still, and alone, since the pause, or `reap` has killed it."""
        self.paused, self.next_look = False, time.monotonic() + 0.1
        resume, output, *_ = self.kept
        os.ftruncate(output, 0), os.lseek(output, 0, os.SEEK_SET)       # now that nobody writes into it
        os.write(resume, b"1")
        os.kill(self.runner, signal.SIGCONT)

    def interrupt(self) -> None:                        # by tgkill the main thread: another could take it too late
        libc.syscall({"x86_64": 234, "aarch64": 131}[os.uname().machine], self.runner, self.runner, signal.SIGINT)
        os.kill(self.runner, signal.SIGCONT)            # the code may have stopped its own process

    def pause(self) -> None:
        """Stop everyone and kill all but the runner, until it stands still and is alone."""
        until = time.monotonic() + self.setup["grace"]
        while not self.paused:
            os.kill(self.everyone, signal.SIGSTOP)      # again where a timer or a child has woken it
            started = kill_others(self.runner)
            select.select([self.events], [], [], 0.001)
            self.reap()
            if self.stopped and not started:
                self.paused = True
            elif not self.paused and time.monotonic() > until:
                self.lose("killed it could not be stopped")

    def lose(self, report: str) -> None:
        """Give the runner up: tell the host, kill everyone."""
        self.runner, self.paused = None, True
        kill_all(self.everyone)
        self.control.send(report.encode())

    def reap(self) -> None:
        """Take note of what happened to children, orphans of the session included."""
        with suppress(BlockingIOError):
            os.read(self.events, 1 << 16)
        with suppress(ChildProcessError):               # there are none
            for _ in range(200):                        # a bomb leaves them faster than this could take them all
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
                if pid == 0:
                    return
                if pid == self.runner and (os.WIFSTOPPED(status) or os.WIFCONTINUED(status)):
                    self.stopped = os.WIFSTOPPED(status)
                    if self.paused:
                        self.lose("killed it went on between two cells")
                elif pid == self.runner:
                    names = {-number: number.name for number in signal.Signals}     # real-time signals have none
                    code = os.waitstatus_to_exitcode(status)
                    how = names.get(code, f"signal {-code}" if code < 0 else f"exit status {code}")
                    self.lose(f"crashed its process died ({how})")

    def overuse(self) -> str | None:
        """What the session's processes have too much of together; a process alone is held by its limits."""
        most, start = self.setup["processes"] + 1, time.process_time()
        if len(pids := descendants(most)) > most:
            return "many processes"
        too_much = memory_above(3 * self.setup["memory_mb"] << 20, pids)
        self.next_look = time.monotonic() + min(max(0.1, 10 * (time.process_time() - start)), 1.0)
        return "much memory" if too_much else None


def memory_above(limit: int, pids: set[int]) -> bool:
    """Whether these processes hold more bytes than the limit: the sum of PSS, which counts a page that several share,
    as after a fork, once. Of a process that hides this figure, all that is resident counts."""
    resident = {}
    for pid in pids:
        with suppress(OSError, ValueError):             # it has ended meanwhile
            task = Path(f"/proc/{pid}/task/{max(os.listdir(f'/proc/{pid}/task'), key=int)}")    # the first may be dead
            resident[task] = int((task / "statm").read_text().split()[1]) * resource.getpagesize()
    # As process 1 it reads the session's own count of sockets; each may buffer 512 KiB.
    total = int(Path("/proc/net/sockstat").read_text().split()[2]) << 19 if os.getpid() == 1 else 0
    if total + sum(resident.values()) <= limit:
        return False                                    # the quick way, nearly always
    for task, whole in resident.items():
        try:
            found = re.findall(r"^(?:Pss|SwapPss): +(\d+)", (task / "smaps_rollup").read_text(), re.M)
            total += sum(map(int, found)) << 10
        except OSError as error:                        # it hides, or it has ended meanwhile
            total += whole if isinstance(error, PermissionError) else 0
    return total > limit


def descendants(most: int = 1 << 22) -> set[int]:
    """All processes of this session but the supervisor, or somewhat more than `most` of them."""
    if os.getpid() == 1:
        return {int(name) for name in os.listdir("/proc") if name.isdigit()} - {1}
    found, todo = set(), [os.getpid()]
    while todo and len(found) <= most + 1:
        found.add(parent := todo.pop())
        with suppress(OSError):                         # it has ended meanwhile
            for thread in os.listdir(f"/proc/{parent}/task"):
                with suppress(OSError), open(f"/proc/{parent}/task/{thread}/children", "rb", 0) as children:
                    todo += map(int, children.read().split())
    return found - {os.getpid()}


def kill_others(runner: int) -> bool:
    """Kill the living processes of this session but the runner. Whether there were any."""
    found = False
    for pid in descendants() - {runner}:
        with suppress(OSError):                         # it has ended meanwhile
            if Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in b"ZX":
                os.kill(pid, signal.SIGKILL)
                found = True
    return found


def lifeline(group: int) -> tuple[int, int]:
    """A pipe. When one end closes, because its process was killed, the kernel kills the group, without a race."""
    ends = os.pipe()
    for end in ends:
        fcntl.fcntl(end, fcntl.F_SETOWN, -group)
        fcntl.fcntl(end, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(end, fcntl.F_SETFL, os.O_ASYNC)
    return ends


def kill_all(everyone: int | None = None) -> None:
    """Kill everyone of the session, or all descendants; wait until they are gone, at most 5 s."""
    until = time.monotonic() + 5.0
    while time.monotonic() < until:
        for pid in [everyone] if everyone else descendants():
            with suppress(ProcessLookupError):          # it has ended meanwhile
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:                       # whoever loses its parent is our child: none is left
            return
        time.sleep(0.0005)


def remove_tree(folder: str | Path) -> None:
    """Also where code has nested it deeper than Python recurses, has locked it, or still writes, while it is killed."""
    until = time.monotonic() + 5.0
    with suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    while os.path.lexists(folder) and time.monotonic() < until:
        for command in ("rm -rf", "chmod -R u+rwX"):    # a link is gone before chmod could follow it
            subprocess.run([*command.split(), "--", folder], stderr=subprocess.DEVNULL)
