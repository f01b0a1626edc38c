"""The sandbox: what keeps a session's processes away from the host and from each other. executor.py uses it.

Skip this file on a first reading. Read it in this order: `Zygote` (what the host starts), `bubblewrap`; then what runs
inside: `launch`, `zygote`, `open_session`, `isolate`, `restrict`, and `Supervisor` (pause, interrupt, kill, limits).

  host --> bwrap --> zygote: Python with the usual libraries imported; it forks one process tree per session
                       `-- supervisor: process 1 of the session's own namespaces; it never runs model code
                             `-- runner: runs the model's code (executor.Runner); whatever that code starts is below

`bwrap` covers: an unprivileged uid without capabilities; user, mount, pid, ipc, uts and network namespaces; only /usr
  and the interpreter with its packages are visible, read-only; a private tmpfs per session (/tmp, /dev/shm); no sockets
  (seccomp: no loopback, vsock, netlink, abstract names); no ptrace, mount, unshare, io_uring, bpf, keyctl, memfd, SysV
  memory (seccomp); limits on memory, processes, open files, disk, output. It does not cover bugs of the kernel, side
  channels, kernel buffers (pipes), or the use of the cores.
`none` covers: an empty environment, the limits, the same seccomp filter, no capabilities, no access to the trainer's
  memory, and the killing of what a cell leaves. It does not cover files: code reads and writes what the trainer's uid
  may, files with expected answers too; it sees and may signal other processes. Expected answers never enter either.
"""
import ctypes
import gc
import importlib
import json
import os
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
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath

from machinery.cli import UserError

UNPRIVILEGED = 65534                            # the uid that a root trainer drops to before anything else
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 22, 36, 38
NEWNS, NEWUSER, NEWPID, ANY_NAMESPACE = 0x20000, 0x10000000, 0x20000000, 0x7E020000
NOSUID, NODEV, BIND, REC, PRIVATE = 2, 4, 4096, 16384, 1 << 18
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
                       "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
                       "MALLOC_ARENA_MAX": "1"}         # else each thread reserves 64 MB of the address space
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
            "--ro-bind", "/usr", "/usr"]
    for path in ("/bin", "/sbin", "/lib", "/lib64"):
        if os.path.islink(path):
            argv += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            argv += ["--ro-bind", path, path]
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


# --- inside: launch (as root only), zygote, session. Trusted: they never run model code ---

PRELOAD = ("collections", "csv", "datetime", "decimal", "fractions", "heapq", "itertools", "math",
           "multiprocessing", "random", "re", "statistics", "string", "numpy")


def launch(uid: int, paths: list[str], command: list[str]) -> None:
    """As root: bind the interpreter where any uid can read it (a home may be 0700); drop to uid; become bwrap."""
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
    gc.collect()
    gc.freeze()                                         # a collection does not touch, so copy, these pages
    host.send(b"ready")
    while (received := socket.recv_fds(host, 1 << 18, 253))[0]:     # b"": the host has closed it, or has ended
        message, descriptors, _, _ = received
        if os.fork() == 0:
            host.close()
            open_session(descriptors, json.loads(message), base is None, run_cells)
        for descriptor in descriptors:
            os.close(descriptor)
    if base is not None:                                # in bwrap this is process 1, and takes every session with it
        kill_all()
        with suppress(ChildProcessError):
            os.wait()                                   # until all have ended: none is left as a zombie
        shutil.rmtree(base, ignore_errors=True)
    os._exit(0)


def open_session(descriptors: list[int], setup: dict, isolated: bool, run_cells: Callable) -> None:
    """Set up a session and supervise it; ends this process."""
    control, attachments = socket.socket(fileno=descriptors[0]), descriptors[1:]
    try:
        if isolated:
            attached = sum(os.fstat(descriptor).st_size for descriptor in attachments)
            isolate(size=attached + (setup["disk_mb"] << 20), inodes=1000 + 16 * setup["disk_mb"])
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # or nothing could be waited for
        for name, source in zip(setup["files"], attachments, strict=True):
            path = os.path.join(setup["workdir"], name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as target, open(source, "rb") as content:
                shutil.copyfileobj(content, target)
        restrict(setup, isolated)
        Supervisor(control, setup, run_cells).loop()
    except BaseException as error:
        control.send(f"failed {type(error).__name__}: {error}".encode())
    finally:                                            # also where the host does not listen any more
        kill_all()
        os._exit(0)


def isolate(size: int, inodes: int) -> None:
    """Be process 1 of new user, mount and pid namespaces, with its own /proc, /tmp and /dev/shm."""
    uid, gid = os.getuid(), os.getgid()
    check(libc.unshare(NEWUSER | NEWNS | NEWPID), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    if os.fork():
        os._exit(0)
    check(libc.mount(b"proc", b"/proc", b"proc", NOSUID | NODEV, None), "mount /proc")
    options = b"mode=700,size=%d,nr_inodes=%d" % (size, inodes)
    check(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", NOSUID | NODEV, options), "mount /tmp")
    os.mkdir("/tmp/.shm")
    check(libc.mount(b"/tmp/.shm", b"/dev/shm", None, BIND, None), "bind /dev/shm")


def restrict(setup: dict, isolated: bool) -> None:
    """Limits, no capabilities, fewer system calls, for this process and all that it forks."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = dict(AS=mapped + (setup["memory_mb"] << 20), FSIZE=setup["disk_mb"] << 20, NOFILE=256, CORE=0, MEMLOCK=0)
    if isolated:
        limits["NPROC"] = setup["processes"] + 2        # per user namespace; elsewhere it is all the uid's
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    os.setsid()
    Path("/proc/self/oom_score_adj").write_text("1000")     # if memory runs out, sessions go first
    check(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    check(libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)), "capset")
    rules = seccomp_rules(os.uname().machine)
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    filters = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(program))
    check(libc.prctl(PR_SET_SECCOMP, 2, filters, 0, 0), "seccomp")


# Refused system calls: their numbers on x86_64 and aarch64.
REFUSED = """socket 41 198, connect 42 203, bind 49 200, listen 50 201, ptrace 101 117, kcmp 312 272, bpf 321 280,
    process_vm_readv 310 270, process_vm_writev 311 271, perf_event_open 298 241, syslog 103 116, chroot 161 51,
    userfaultfd 323 282, unshare 272 97, setns 308 268, mount 165 40, umount2 166 39, pivot_root 155 41,
    name_to_handle_at 303 264, open_by_handle_at 304 265, add_key 248 217, request_key 249 218, keyctl 250 219,
    init_module 175 105, finit_module 313 273, kexec_load 246 104, personality 135 92, memfd_create 319 279,
    shmget 29 194, semget 64 190, msgget 68 186, mq_open 240 180, fanotify_init 300 262"""
# From 424 on all numbers agree. Let through: pidfd_send_signal, pidfd_open, close_range, openat2, faccessat2,
# epoll_pwait2, futex_waitv. The rest (io_uring, clone3, new mounts, memfd_secret, ...) "does not exist".
HARMLESS = (424, 434, 436, 437, 439, 441, 449)


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


class Supervisor:
    """Does what the host requests ("start", "resume", "interrupt", "pause"), and watches the runner.

    Reports: "started", "paused", "crashed <reason>", "killed <reason>"; "failed <reason>": it cannot go on itself."""
    signals = {b"resume": [signal.SIGCONT], b"pause": [signal.SIGSTOP],
               b"interrupt": [signal.SIGINT, signal.SIGCONT]}       # the code may have stopped its own process

    def __init__(self, control: socket.socket, setup: dict, run_cells: Callable):
        self.control, self.setup, self.run_cells = control, setup, run_cells
        self.runner = self.death = self.wire = None     # the runner: its pid; a pidfd, while it lives; its wire
        self.busy = False                               # a cell is running

    def loop(self) -> None:
        """Until the host closes its end of the control socket, or has ended."""
        while True:
            watched = [self.control] if self.death is None else [self.control, self.death]
            ready = select.select(watched, [], [], 0.1 if self.busy else None)[0]
            self.reap()
            if self.busy and not ready and (excess := self.overuse()):
                self.busy = False
                self.control.send(f"killed it had too {excess}".encode())
            if self.control not in ready:
                continue
            request, descriptors, _, _ = socket.recv_fds(self.control, 64, 2)
            if not request:
                return
            if request == b"start":
                self.start(*descriptors)
            elif self.death is not None:                # else the host will read that the runner has died
                for number in self.signals[request]:
                    os.kill(self.runner, number)
                self.busy = request != b"pause"
                if not self.busy:
                    kill_all(keep=self.runner)
                    self.control.send(b"paused")

    def start(self, wire: int, output: int) -> None:
        """Kill every process of the session and fork a new runner, in the same namespaces and directory."""
        with suppress(ChildProcessError):               # until none is left
            while True:
                kill_all()
                os.wait()                               # for one of those just killed
                self.reap()
        for descriptor in filter(None, (self.death, self.wire)):
            os.close(descriptor)
        os.makedirs(self.setup["workdir"], exist_ok=True)       # code may have removed it
        os.chdir(self.setup["workdir"])
        self.runner, self.wire = os.fork(), wire        # open here, too: so its end is not the sign of a death
        if self.runner == 0:
            self.control.close()
            libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)     # code may look at its own /proc/self
            self.run_cells(socket.socket(fileno=wire), output, self.setup)
        os.close(output)
        self.death = os.pidfd_open(self.runner)
        self.control.send(b"started")

    def reap(self) -> None:
        """Collect the dead, orphans of the session included, and report the runner's death."""
        with suppress(ChildProcessError):               # there are none
            while (dead := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                if dead[0] == self.runner:
                    os.close(self.death)
                    self.death, self.busy, code = None, False, os.waitstatus_to_exitcode(dead[1])
                    names = {-number: number.name for number in signal.Signals}     # real-time signals have none
                    self.control.send(f"crashed its process died ({names.get(code, f'exit status {code}')})".encode())

    def overuse(self) -> str | None:
        """What the session's processes have too much of together; a process alone is held by its limits."""
        pages, pids = 0, descendants()
        for pid in pids:
            with suppress(OSError, IndexError):         # it has ended meanwhile
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        if pages * resource.getpagesize() > 3 * self.setup["memory_mb"] << 20:
            return "much memory"
        return "many processes" if len(pids) > self.setup["processes"] + 1 else None


def descendants() -> set[int]:
    """All processes of this session but the supervisor. In its own pid namespace that is everybody."""
    if os.getpid() == 1:
        return {int(name) for name in os.listdir("/proc") if name.isdigit()} - {1}
    found, todo = set(), [os.getpid()]
    while todo:
        found.add(parent := todo.pop())
        for children in Path("/proc").glob(f"{parent}/task/*/children"):
            with suppress(OSError):                     # it has ended meanwhile
                todo += [int(pid) for pid in children.read_text().split()]
    return found - {os.getpid()}


def kill_all(keep: int = 0) -> None:
    """Kill all processes of the session but `keep`, until no new ones turn up."""
    killed = set()
    while found := descendants() - killed - {keep}:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= found
