"""The hostile suite: what model-written code does by accident or by reward hacking, and what comes of it.

Each row of TABLE is `name, expected, code`. A fresh session has run `x = 1` and written a file; then `y = 1` and the
row's code run as one cell. `expected` names the statuses that may result (`|` between) and the state afterwards:
    kept    x and y are there: the cell's effects hold      unrun   only x is there: the code was refused as a whole
    lost    neither: the session was restarted              any     the code broke its session: it must work again
and, after `=`, a text that must be in the result; after `~`, one that must not. After every row: the cell took at most
limit + grace, the file of a restarted session is still there, a witness session is unharmed, and of the row's session
no process is left.
"""
# ruff: noqa: E501
import ctypes
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from executor import Executor, Limits
from test_executor import tree
from tools import ToolError

LIMITS = Limits(0.4, 0.8, memory_mb=256, output_chars=2000, tool_calls=50, disk_mb=16, processes=24)
ROOMY = 20.0                    # seconds for the rows that are not about time: the machine may be busy
PATIENT = 5.0                   # seconds of grace for code that reacts to an interrupt, as soon as it gets a core
SLACK = 2.0                     # how far a busy machine may let the host's own clock slip
SECRET = secrets.token_hex(8)   # stands for an expected answer; the code below gets it in two halves only

# The runner's descriptor of the wire, and ways to write to it: bytes, a frame, a frame with the cell's token.
WIRE = """import os, stat, struct, json, time, socket, gc
w = [int(f) for f in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{f}')]
w = [f for f in w if stat.S_ISSOCK(os.fstat(f).st_mode)][0]
def raw(data): os.write(w, struct.pack('>I', len(data)) + data)
def send(frame): raw(json.dumps(frame).encode())
token = next(o.token for o in gc.get_objects() if type(o).__name__ == 'Runner')
def forge(frame): send(frame | {'token': token})
"""
LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
CHILD = "import os, time\nif os.fork() == 0: time.sleep(60)\n"
SPIN = "import threading, time, os\ndef spin():\n while True: pass\n"

TABLE = {
    "timeouts that keep the state": [
        ("loop",                 "timeout kept", "while True: pass"),
        ("sleep",                "timeout kept", "import time; time.sleep(60)"),
        ("printed before",       "timeout kept = early", "print('early'); import time; time.sleep(60)"),
        ("regex",                "timeout kept", "import re; re.match(r'(a+)+$', 'a' * 40 + 'b')"),
        ("huge pow",             "timeout|killed any", "z = 3 ** 10 ** 8"),
        ("swallowed",            "timeout kept",
         "while True:\n try:\n  while True: pass\n except BaseException: pass"),
        ("swallowed at once",    "timeout kept",
         "import time\nwhile True:\n try: time.sleep(9)\n except: continue"),
        ("finally",              "timeout kept", "try:\n while True: pass\nfinally:\n while True: pass"),
        ("repr",                 "timeout kept", "class R:\n def __repr__(self):\n  while True: pass\nR()"),
        ("str of an exception",  "timeout kept",
         "class E(Exception):\n def __str__(self):\n  while True: pass\nraise E"),
        ("del",                  "timeout kept",
         "class D:\n def __del__(self):\n  while True: pass\nd = D(); del d"),
        ("asyncio",              "timeout kept", "import asyncio; asyncio.run(asyncio.sleep(60))"),
        ("lock",                 "timeout kept",
         "import threading; l = threading.Lock(); l.acquire(); l.acquire()"),
        ("pipe",                 "timeout kept", "import os; os.read(os.pipe()[0], 1)"),
        ("subprocess",           "timeout kept", "import subprocess; subprocess.run(['sleep', '60'])"),
        ("join",                 "timeout kept",
         SPIN + "t = threading.Thread(target=spin); t.start(); t.join()"),
        ("sort key",             "timeout kept", "def key(v):\n while True: pass\nsorted([2, 1], key=key)"),
        ("pause",                "timeout kept", "import signal; signal.pause()"),
        ("stops itself",         "timeout kept", "import os; os.kill(os.getpid(), 19)"),
        ("stops everybody",      "timeout kept", CHILD + "os.kill(-1, 19); os.kill(os.getpid(), 19)"),
    ],
    "kills that restart the session": [
        ("C loop",               "killed lost", "sum(range(10 ** 12))"),
        ("C loop in a thread",   "killed lost",
         SPIN + "threading.Thread(target=sum, args=(range(10 ** 12),)).start(); spin()"),
        ("endless iterator",     "killed lost",
         "import collections, itertools; collections.deque(itertools.repeat(0), 0)"),
        ("signals blocked",      "killed lost",
         "import signal\nsignal.pthread_sigmask(0, range(1, 32))\nwhile True: pass"),
        ("signals ignored",      "killed lost",
         "import signal\nsignal.signal(2, signal.SIG_IGN)\nwhile True: pass"),
        ("handler of its own",   "killed lost",
         "import signal\nsignal.signal(2, lambda *a: None)\nwhile True: pass"),
        ("swallowed thrice",     "killed lost",
         "def f(n):\n while True:\n  try:\n   f(n - 1) if n else time.sleep(9)\n  except: pass\n"
                                                "import time; f(9)"),
        ("exec",                 "killed lost", "import os; os.execvp('sleep', ['sleep', '60'])"),
        ("recursion unlimited",  "killed|crashed|error|timeout any",
         "import sys; sys.setrecursionlimit(10 ** 9)\ndef f(): return [f()]\nf()"),
    ],
    "crashes": [
        ("_exit 0",              "crashed lost", "import os; os._exit(0)"),
        ("_exit 3",              "crashed lost = exit status 3", "import os; os._exit(3)"),
        ("abort",                "crashed lost = SIGABRT", "import os; os.abort()"),
        ("segfault",             "crashed lost = SIGSEGV", "import ctypes; ctypes.string_at(0)"),
        ("kill -9",              "crashed lost = SIGKILL", "import os; os.kill(os.getpid(), 9)"),
        ("kills all others",     "ok kept", CHILD + "os.kill(-1, 9)"),
        ("all others, then it",  "crashed lost", CHILD + "os.kill(-1, 9); os._exit(1)"),
        ("alarm",                "crashed lost = SIGALRM",
         "import signal; signal.setitimer(signal.ITIMER_REAL, 0.01)\nwhile True: pass"),
        ("_exit in a thread",    "crashed lost",
         SPIN + "threading.Thread(target=os._exit, args=(1,)).start(); spin()"),
        ("C stack",              "crashed|error any",
         "import pickle\nclass A: pass\nf = lambda s: s\nx2 = []\nfor i in range(10 ** 5): x2 = [x2]\n"
         "import ctypes\n"
                                 "ctypes.memmove(ctypes.addressof(ctypes.c_int()), 1, 10)"),
        ("thread bomb",          "error any",
         "import threading, time\n"
         "while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"),
        ("descriptor bomb",      "error kept", "l = []\nwhile True: l.append(open('/dev/null'))"),
        ("32-bit system call",   "crashed|error any",
         LIBC + "libc.syscall(0x80000000); import signal; os.kill(os.getpid(), signal.SIGSYS)"),
    ],
    "ordinary errors": [
        ("SystemExit",           "ok kept = the session goes on", "import sys; sys.exit(0)"),
        ("SystemExit, failed",   "error kept = SystemExit", "import sys; sys.exit(1)"),
        ("KeyboardInterrupt",    "error kept = KeyboardInterrupt", "raise KeyboardInterrupt"),
        ("GeneratorExit",        "error kept = GeneratorExit", "raise GeneratorExit"),
        ("not an exception",     "error kept = TypeError", "raise 5"),
        ("syntax",               "error unrun = SyntaxError", "a = ("),
        ("null byte",            "error unrun = null", "a = 1\0"),
        ("lone surrogate",       "error unrun = Unicode", "a = '\ud800'"),
        ("deep brackets",        "error unrun", "(" * 10_000),
        ("deep expression",      "error|crashed any", "z = " + "-" * 100_000 + "1"),
        ("wide expression",      "error|crashed any", "z = 1" + "+1" * 100_000),
        ("recursion",            "error kept = RecursionError", "def f(): return f()\nf()"),
        ("input",                "error kept = EOFError", "input()"),
        ("hostile exception",    "error kept",
         "class E(Exception):\n __str__ = __repr__ = lambda self: 1 / 0\nraise E"),
        ("hostile metaclass",    "error kept",
         "class M(type):\n def __instancecheck__(c, o): 1 / 0\nclass E(Exception, metaclass=M): pass\n"
         "raise E"),
        ("value of wrong type",  "error kept = TypeError", "class R:\n __repr__ = lambda self: 5\nR()"),
        ("long message",         "error kept = cut", "raise ValueError('x' * 10 ** 6)"),
        ("huge int to str",      "error kept = ValueError", "print(10 ** 10 ** 5)"),
        ("list memory",          "error kept = MemoryError", "z = [0] * 10 ** 10"),
        ("growing memory",       "error kept = MemoryError",
         "z = []\nwhile True: z.append(bytearray(1 << 20))"),
        ("numpy memory",         "error kept = MemoryError", "import numpy as np; z = np.ones(10 ** 9)"),
        ("memory by children",   "killed any = memory",
         "import os, time\nfor i in range(20):\n if os.fork() == 0:\n  z = b'x' * (200 << 20)\n "
         " time.sleep(60)\ntime.sleep(60)"),
        ("memfd",                "error kept = PermissionError", "import os; os.memfd_create('a')"),
        ("disk",                 "error kept = OSError",
         "n = 0\nwhile True:\n n += 1\n open(f'f{n}', 'wb').write(bytes(8 << 20))"),
        ("large file",           "error kept = OSError",
         "f = open('f', 'wb')\nwhile True: f.write(bytes(1 << 20))"),
        ("inodes",               "error kept = OSError",
         "for i in range(10 ** 6): open(f'f{i}', 'w').close()"),
        ("shared memory",        "error|crashed any",
         "from multiprocessing.shared_memory import SharedMemory\n"
         "s = SharedMemory('a', True, 64 << 20)\ns.buf[::4096] = bytes(16384)"),
        ("fork bomb",            "error|killed|timeout any", "import os\nwhile True: os.fork()"),
        ("fork bomb by shell",   "ok|error|killed|timeout any",
         "import subprocess; subprocess.run(['sh', '-c', ':() { : | : & }; :'])"),
        ("setrlimit",            "error kept", "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))"),
        ("setrlimit nproc",      "error kept",
         "import resource as r; r.setrlimit(r.RLIMIT_NPROC, (10 ** 6, 10 ** 6))"),
    ],
    "output": [
        ("10 MB",                "ok kept = cut", "print('x' * 10_000_000)"),
        ("endless",              "error|timeout any = cut", "while True: print('y' * 10_000)"),
        ("binary",               "ok kept", "import os; os.write(1, bytes(range(256)))"),
        ("surrogate",            "ok kept = ud800", r"print('\ud800')"),
        ("ANSI",                 "ok kept = [2J", r"print('\x1b[2J\x1b]0;title\x07')"),
        ("order",                "ok kept = 1\n2\n3\n4\n",
         "import sys, subprocess\nprint(1); print(2, file=sys.stderr); subprocess.run(['echo', '3']); "
         "print(4)"),
        ("C printf",             "ok kept = from C", LIBC + "n = libc.printf(b'from C\\n')"),
        ("closed",               "ok kept", "import sys; sys.stdout.close()"),
        ("closed, then print",   "error kept = ValueError", "import sys; sys.stdout.close(); print(1)"),
        ("descriptor closed",    "ok kept", "import os; os.close(1); os.close(2)"),
        ("replaced",             "ok kept ~ hidden",
         "import sys, io; sys.stdout = io.StringIO(); print('hidden')"),
        ("removed",              "ok kept", "import sys; sys.stdout = sys.stderr = None; print(1)"),
        ("truncated",            "ok kept", "import os; print('a'); os.ftruncate(1, 0); os.lseek(1, 0, 0)"),
        ("sparse",               "ok kept = cut", "import os; os.ftruncate(1, 15 << 20)"),
        ("long value",           "ok kept = cut", "'a' * 10 ** 7"),
        ("hostile str value",    "ok|error kept",
         "class S(str):\n def __len__(self): return 0\n def __getitem__(self, i): return self\n"
                                 "class R:\n def __repr__(self): return S('b' * 10 ** 7)\nR()"),
        ("sealed",               "error kept = PermissionError",
         "import fcntl; fcntl.fcntl(1, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)"),
        ("mapped output",        "ok|error kept",
         "import mmap, os; os.ftruncate(1, 4096); m = mmap.mmap(1, 4096); m[:2] = b'hi'"),
    ],
    "attacks on the protocol": [
        ("garbage",              "crashed lost = protocol", WIRE + "raw(b'hello')"),
        ("oversized",            "crashed lost = protocol",
         WIRE + "os.write(w, b'\\xff' * 4); time.sleep(60)"),
        ("deep",                 "crashed lost = protocol", WIRE + "raw(b'[' * 100_000)"),
        ("not an object",        "crashed lost = protocol", WIRE + "raw(b'[1]')"),
        ("null",                 "crashed lost = protocol", WIRE + "raw(b'null')"),
        ("huge integer",         "crashed lost = protocol",
         WIRE + "raw(b'{\"answer\": ' + b'9' * 10_000 + b'}')"),
        ("not UTF-8",            "crashed lost = protocol", WIRE + "raw(b'{\"answer\": \"\\xff\\xfe\"}')"),
        ("unknown kind",         "crashed lost = protocol", WIRE + "forge({'verdict': 'right'})"),
        ("wrong type",           "crashed lost = protocol", WIRE + "forge({'answer': 5, 'id': 1})"),
        ("one key too many",     "crashed lost = protocol", WIRE + "forge({'answer': 'a', 'id': 1, 'reward': 1})"),
        ("forged run",           "crashed lost = protocol", WIRE + "forge({'run': 'y = 2'})"),
        ("forged reply",         "crashed lost = protocol",
         WIRE + "forge({'reply': 1, 'value': 1, 'error': None})"),
        ("forged ok",            "ok any", WIRE + "forge({'end': 'ok', 'value': None, 'error': None}); 1 / 0"),
        ("forged ok, then loop", "ok any",
         WIRE + "forge({'end': 'ok', 'value': None, 'error': None})\nwhile True: pass"),
        ("forged long value",    "ok any = cut",
         WIRE + "forge({'end': 'ok', 'value': 'v' * 10 ** 6, 'error': None}); time.sleep(60)"),
        ("forged status",        "error any",
         WIRE + "forge({'end': 'timeout', 'value': None, 'error': None}); time.sleep(60)"),
        ("no token",             "crashed lost = protocol",
         WIRE + "send({'end': 'ok', 'value': None, 'error': None}); time.sleep(60)"),
        ("half a frame",         "crashed lost", WIRE + "os.write(w, b'\\0\\0\\1\\0{'); os._exit(0)"),
        ("half a frame, waits",  "timeout|killed|crashed any",
         WIRE + "os.write(w, b'\\0\\0\\1\\0{'); time.sleep(60)"),
        ("descriptors closed",   "crashed lost", "import os; os.closerange(3, 256)"),
        ("wire shut down",       "crashed lost", WIRE + "socket.socket(fileno=os.dup(w)).shutdown(2)"),
        ("wire not blocking",    "ok kept", WIRE + "os.set_blocking(w, False)"),
        ("wire read by code",    "timeout kept", WIRE + "os.read(w, 100)"),
        ("patched builtins",     "crashed lost",
         "import builtins\n"
         "for n in ('len', 'isinstance', 'bytes', 'str', 'open', 'int'): setattr(builtins, n, None)"),
        ("patched json",         "ok kept",
         "import json, json.encoder, json.decoder; json.dumps = json.loads = None"),
        ("patched os",           "ok kept",
         "import os\nfor n in dir(os):\n "
         "if n[0] != '_' and callable(getattr(os, n)) and n != 'PathLike': setattr(os, n, None)"),
        ("patched socket",       "crashed|ok any",
         "import socket; socket.socket.sendall = socket.socket.recv = None"),
        ("modules cleared",      "ok|error|crashed any", "import sys; sys.modules.clear()"),
        ("namespace cleared",    "ok lost", "globals().clear()"),
        ("runner found by gc",   "crashed lost",
         "import gc\nfor o in gc.get_objects():\n if type(o).__name__ == 'Runner': o.wire = None"),
        ("frames above",         "crashed|error|ok any",
         "import sys; sys._getframe(2).f_locals['self'].lock = None"),
        ("trace",                "ok|error|crashed any",
         "import sys; sys.settrace(lambda *a: 1 / 0); sys.setprofile(lambda *a: 1 / 0)"),
        ("fork handlers",        "ok any",
         "import os\ndef hang():\n while True: pass\nos.register_at_fork(before=hang)"),
        ("flood of answers",     "timeout kept", "while True: final_answer(1)"),
        ("kills process 1",      "ok|error kept", "import os\nfor s in (9, 15, 2, 19, 1): os.kill(1, s)"),
    ],
    "leftovers": [
        ("spinning thread",      "ok kept", SPIN + "threading.Thread(target=spin, daemon=True).start()"),
        ("thread not daemon",    "ok kept", SPIN + "threading.Thread(target=spin).start()"),
        ("forked child",         "ok kept", "import os, time\nif os.fork() == 0: time.sleep(60)"),
        ("child comes back",     "ok kept = once",
         "import os\npid = os.fork()\nif pid: os.waitpid(pid, 0); print('once')"),
        ("daemon",               "ok kept",
         "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork(): os._exit(0)\n time.sleep(60)"),
        ("nohup",                "ok kept",
         "import subprocess; p = subprocess.Popen(['nohup', 'sleep', '60'], start_new_session=True)"),
        ("stopped child",        "ok kept",
         "import os, time\npid = os.fork()\nif pid == 0: time.sleep(60)\nos.kill(pid, 19)"),
        ("child of a crash",     "crashed lost",
         "import os, time\nif os.fork() == 0: time.sleep(60)\nos._exit(1)"),
        ("zombies",              "ok kept",
         "import os\nfor i in range(10):\n if os.fork() == 0: os._exit(0)"),
        ("pool",                 "ok kept = [1, 4]",
         "import multiprocessing as mp\nclass P(mp.Process): pass\np = mp.get_context('fork').Pool(2)\n"
                                 "print(p.map((2).__rpow__, [1, 2]))"),
    ],
    "escapes": [
        ("environment",          "ok kept = []", "import os; [k for k in os.environ if 'SECRET' in k]"),
        ("/proc of others",      "ok kept = True",
         "import os; len([p for p in os.listdir('/proc') if p.isdigit()]) <= 3"),
        ("environment of 1",     "error kept", "open('/proc/1/environ').read()"),
        ("memory of 1",          "error kept", "open('/proc/1/mem', 'rb')"),
        ("root of 1",            "error kept", "import os; os.listdir('/proc/1/root')"),
        ("home",                 "ok kept = []",
         "import glob; glob.glob('/home/*') + glob.glob('/root/.[a-oq-z]*')"),
        ("users",                "error kept", "open('/etc/passwd').read()"),
        ("project",              "error kept", f"open({os.path.abspath('executor.py')!r}).read()"),
        ("answer by gc",         "ok kept = False",
         f"import gc; s = {SECRET[:8]!r} + {SECRET[8:]!r}\n"
         f"any(s in str(o)[:10 ** 6] for o in gc.get_objects() "
                                 "if o is not globals())"),
        ("answer by frames",     "ok kept = False",
         f"import sys; a, b = {SECRET[:8]!r}, {SECRET[8:]!r}; f = sys._getframe(); found = False\n"
         "while f: found |= a + b in str(f.f_locals) + str(f.f_globals); f = f.f_back\nfound"),
        ("loopback",             "error kept = Network is down",
         "import socket; socket.create_connection(('127.0.0.1', PORT), 1)"),
        ("metadata address",     "error kept",
         "import urllib.request; urllib.request.urlopen('http://169.254.169.254/', timeout=1)"),
        ("DNS",                  "error kept", "import socket; socket.getaddrinfo('example.com', 80)"),
        ("UDP",                  "error kept",
         "import socket; socket.socket(2, 2).sendto(b'x', ('8.8.8.8', 53))"),
        ("abstract socket",      "error kept",
         "import socket; socket.socket(1, 1).connect('\\0/tmp/.X11-unix/X0')"),
        ("named socket pair",    "error kept",
         "import socket; a, b = socket.socketpair(1, 2); a.bind('\\0meet')"),
        ("vsock",                "error kept", "import socket; socket.socket(40, 1)"),
        ("netlink",              "error kept", "import socket; socket.socket(16, 3)"),
        ("raw socket",           "error kept", "import socket; socket.socket(17, 3)"),
        ("write /usr",           "error kept", "open('/usr/x', 'w')"),
        ("write /etc",           "error kept", "open('/etc/x', 'w')"),
        ("write /",              "error kept", "open('/x', 'w')"),
        ("write /dev",           "error kept", "open('/dev/x', 'w')"),
        ("write the interpreter", "error kept", "import os; open(os.__file__, 'a')"),
        ("write /proc/sys",      "error kept", "open('/proc/sys/kernel/core_pattern', 'w')"),
        ("terminal",             "error kept", "open('/dev/tty')"),
        ("mount",                "ok kept = -1", LIBC + "libc.mount(b't', b'/tmp', b'tmpfs', 0, None)"),
        ("unshare",              "ok kept = -1", LIBC + "libc.unshare(0x10000000)"),
        ("clone user namespace", "ok kept = -1",
         LIBC + "libc.syscall({'x86_64': 56, 'aarch64': 220}[os.uname().machine], 0x10000011, 0, 0, 0, 0)"),
        ("clone3",               "ok kept = -1", LIBC + "libc.syscall(435, 0, 0)"),
        ("setns",                "ok kept = -1", LIBC + "libc.setns(os.open('/proc/self/ns/user', 0), 0)"),
        ("ptrace",               "ok kept = -1", LIBC + "libc.ptrace(16, os.getppid(), 0, 0)"),
        ("process_vm_readv",     "ok kept = -1", LIBC + "libc.process_vm_readv(os.getppid(), 0, 0, 0, 0, 0)"),
        ("io_uring",             "ok kept = -1",
         LIBC + "libc.syscall(425, 8, ctypes.create_string_buffer(256))"),
        ("bpf",                  "ok kept = -1",
         LIBC + "libc.syscall({'x86_64': 321, 'aarch64': 280}[os.uname().machine], 0, 0, 0)"),
        ("keyctl",               "ok kept = -1",
         LIBC + "libc.syscall({'x86_64': 250, 'aarch64': 219}[os.uname().machine], 0, -3, 1)"),
        ("x32 numbers",          "ok kept = -1", LIBC + "libc.syscall(0x40000000 + 39)"),
        ("SysV memory",          "ok kept = -1", LIBC + "libc.shmget(0, 4096, 0o1600)"),
        ("setuid",               "error kept", "import os; os.setuid(0)"),
        ("chroot",               "error kept", "import os; os.chroot('/tmp')"),
        ("kernel log",           "ok kept = -1", LIBC + "libc.klogctl(10, 0, 0)"),
        ("capabilities",         "ok kept = 0000000000000000",
         "[l for l in open('/proc/self/status') if l.startswith('CapEff')][0]"),
        ("files of others",      "ok kept = []",
         "import glob; glob.glob('/tmp/**/witness*', recursive=True) + glob.glob('/dev/shm/*')"),
        ("processes of others",  "ok kept = []",
         "import os\ndef there(p):\n try: os.kill(p, 0); return True\n except OSError: return False\n"
         "[p for p in range(2, 3000) if there(p) and not os.path.exists(f'/proc/{p}')]"),
    ],
    "tools": [
        ("set",                  "error kept = ToolError", "echo({1})"),
        ("bytes",                "error kept = ToolError", "echo(b'a')"),
        ("cycle",                "error kept = ToolError", "l = []; l.append(l); echo(l)"),
        ("deep",                 "error kept = ToolError",
         "l = []\nfor i in range(10 ** 5): l = [l]\necho(l)"),
        ("NaN",                  "error kept = ToolError", "echo(float('nan'))"),
        ("huge",                 "error kept = ToolError", "echo('a' * (9 << 20))"),
        ("surrogate",            "ok kept = ud800", r"echo('\ud800')"),
        ("hostile tolist",       "error kept", "class T:\n def tolist(self): return self\necho(T())"),
        ("wrong arguments",      "error kept = TypeError", "echo(1, 2, 3)"),
        ("wrong keyword",        "error kept = TypeError", "echo(self=1)"),
        ("unknown name",         "error kept = NameError", "nothing()"),
        ("unknown name, forged", "ok kept",
         WIRE + "forge({'call': '__class__', 'id': 99, 'args': [], 'kwargs': {}}); time.sleep(0.05)"),
        ("flood",                "error kept = 50 tool calls", "for i in range(1000): echo(i)"),
        ("flood, swallowed",     "timeout kept", "while True:\n try: echo(1)\n except Exception: pass"),
        ("slow tool",            "timeout kept", "slow()"),
        ("slow, then another",   "timeout kept", "try: slow()\nexcept BaseException: pass\necho(1); slow()"),
        ("tool says no",         "error kept = ToolError: not today", "no()"),
        ("tool raises",          "error kept = ToolError: KeyError", "raises()"),
        ("tool exits",           "error kept = ToolError: SystemExit", "exits()"),
        ("result not JSON",      "error kept = ToolError", "odd()"),
        ("result huge",          "error kept = ToolError", "large()"),
        ("error caught",         "ok kept = caught", "try: no()\nexcept ToolError: print('caught')"),
        ("from threads",         "ok kept = 28",
         "import threading; l = []\n"
         "ts = [threading.Thread(target=lambda i=i: l.append(echo(i))) for i in range(8)]\n"
                                 "[t.start() for t in ts]; [t.join() for t in ts]; sum(l)"),
        ("from a child",         "ok kept = main process",
         "import os, time\nif os.fork() == 0:\n try: echo(1)\n except ToolError as e: print(e)\n "
         "os._exit(0)\nos.wait() and None"),
        ("after the answer",     "ok kept = 7", "final_answer(1); echo(7)"),
        ("outside a cell",       "ok kept",
         "import threading, time\ndef late():\n time.sleep(0.2)\n echo(1)\n"
         "threading.Thread(target=late).start()"),
        ("answer cannot be str", "error kept", "class S:\n __str__ = lambda self: 1 / 0\nfinal_answer(S())"),
        ("answer loops",         "timeout kept",
         "class S:\n def __str__(self):\n  while True: pass\nfinal_answer(S())"),
        ("answer and crash",     "crashed lost", "final_answer(1); import os; os._exit(1)"),
    ],
}
ROWS = [pytest.param(*row, id=f"{group}: {row[0]}") for group, rows in TABLE.items() for row in rows]


def no():
    raise ToolError("not today")


def exits():
    raise SystemExit(1)


TOOLS = {"echo": lambda value: value, "slow": lambda: time.sleep(2), "no": no, "raises": lambda: {}["a"],
         "exits": exits, "odd": lambda: object(), "large": lambda: "x" * (9 << 20)}


# What `none` does not cover: files, what the host shows of itself, bombs that its watch only ends (there is a test of
# its own), and, before Linux 6.12, signals.
BWRAP_ONLY = {"/proc of others", "environment of 1", "memory of 1", "root of 1", "home", "users", "project", "disk",
              "inodes", "shared memory", "terminal", "setns", "setuid", "files of others", "processes of others",
              "setrlimit nproc", "fork bomb", "fork bomb by shell", "kills process 1", "write /usr", "write /etc",
              "write /", "write /dev", "write the interpreter", "write /proc/sys"}
SCOPED = ctypes.CDLL(None).syscall(444, None, 0, 1) >= 6        # Landlock knows signals


@pytest.fixture(scope="module", params=["bwrap", "none"])
def executor(request):
    os.environ["TOOL_R1_SECRET"] = SECRET
    with Executor(request.param, LIMITS) as executor:
        yield executor
    del os.environ["TOOL_R1_SECRET"]


@pytest.fixture(scope="module")
def witness(executor):
    with executor.session(files={"witness.txt": b"w"}) as session:
        shared = "open('/dev/shm/witness', 'w').close()" if executor.sandbox == "bwrap" else ""
        assert session.execute(f"w = 1; {shared}", 5.0).status == "ok"
        yield session


@pytest.fixture(scope="module")
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("name, expected, code", ROWS)
def test_hostile(executor, witness, port, name, expected, code):
    if executor.sandbox == "none" and (name in BWRAP_ONLY or not SCOPED and "os.kill(-1" in code):
        pytest.skip("not covered by none")
    resting = len(tree(executor.zygote.process.pid))
    expected, _, wanted = expected.partition(" = ")
    expected, _, unwanted = expected.partition(" ~ ")
    statuses, state = expected.split()
    short = "timeout" in statuses or statuses == "killed" and "memory" not in wanted
    limit = LIMITS.seconds if short else ROOMY
    with executor.session(TOOLS) as session:
        if "timeout" in statuses:
            session.limits = replace(LIMITS, grace=PATIENT)
        assert session.execute("x = 1; open('before', 'w').close()", ROOMY).status == "ok"
        start = time.monotonic()
        result = session.execute("y = 1\n" + code.replace("PORT", str(port)), limit)
        took = time.monotonic() - start
        assert result.status in statuses.split("|"), result
        assert took <= limit + session.limits.grace + SLACK
        assert wanted in result.output + (result.value or "") + (result.error or ""), result
        assert not unwanted or unwanted not in result.observation()
        assert len(result.observation()) <= 3 * LIMITS.output_chars + 1000
        after = session.execute("[n for n in ('x', 'y') if n in globals()]", ROOMY if state != "any" else 1.0)
        if state == "any" and after.status != "ok":
            after = session.execute("[]", ROOMY)    # it broke its session for one more cell, not for two
        assert after.status == "ok", after
        assert state == "any" or after.value == {"kept": "['x', 'y']", "unrun": "['x']", "lost": "[]"}[state]
        if state == "lost":
            assert session.execute("open('before').read()", ROOMY).value == "''"
            assert result.status == "ok" or "files in the working directory are kept" in result.error
    until = time.monotonic() + 5.0
    while len(tree(executor.zygote.process.pid)) > resting and time.monotonic() < until:
        time.sleep(0.01)
    assert len(tree(executor.zygote.process.pid)) == resting == (3 if executor.sandbox == "bwrap" else 2)
    beside = witness.execute("import os; (w, os.listdir())", ROOMY)     # (zygote,) and supervisor and runner of it
    assert beside.value == "(1, ['witness.txt'])", beside


# A bomb of bounded size and time that no list of processes catches: 32 lines of processes, each of which forks and ends.
BOMB = """import os, time
until = time.time() + 20
if os.fork() == 0:
 SETSID
 for i in range(5): os.fork()
 while time.time() < until:
  try: os.fork() and os._exit(0)
  except OSError: pass
 os._exit(0)
time.sleep(0.2)
"""
ROOM = Limits(0.3, 0.8, memory_mb=256, disk_mb=16, processes=200)
BUSY = 6.0                      # seconds that 32 processes, which use the cores all the time, may cost the others


@pytest.mark.parametrize("sandbox", ["bwrap", "none"])
@pytest.mark.parametrize("setsid", ["pass", "os.setsid()"])
def test_a_live_fork_bomb_ends_with_its_cell_and_with_its_session(sandbox, setsid):
    """Pause, restart, timeout, and close while 32 lines of processes fork on."""
    with Executor(sandbox, ROOM) as executor, executor.session() as witness:
        zygote = executor.zygote.process.pid
        resting = tree(zygote)
        for end in ("1", "os._exit(1)", "time.sleep(60)"):
            with executor.session() as session:
                result = session.execute(BOMB.replace("SETSID", setsid) + end, 1.0)
                assert result.seconds < 1.0 + ROOM.grace + BUSY
                assert settled(lambda: len(tree(zygote) - resting) <= 2), "supervisor and runner"
                assert session.execute("1 + 1", ROOMY).value == "2"
        session = executor.session()
        thread = threading.Thread(target=session.execute, args=(BOMB.replace("SETSID", setsid) + "time.sleep(60)", 5.0))
        thread.start()
        time.sleep(0.5)
        session._control.shutdown(socket.SHUT_RDWR)     # as if the trainer had died
        assert settled(lambda: len(tree(zygote) - resting) <= 2)
        thread.join()
        session.close()
        assert settled(lambda: not tree(zygote) - resting)
        assert witness.execute("1", ROOMY).value == "1"
    assert settled(lambda: not tree(zygote))


@pytest.mark.parametrize("sandbox", ["bwrap", "none"])
@pytest.mark.parametrize("killed", ["the trainer", "all but the bomb"])
def test_a_live_fork_bomb_dies_with_its_trainer(sandbox, killed):
    """With SIGKILL, which nobody can handle. Who kills all that he sees still misses those that have just been forked:
    then no process of ours is left to end them, and the kernel does."""
    name = f"bomb-{secrets.token_hex(4)}"
    code = f"open('/proc/self/comm', 'w').write({name!r})\n{BOMB.replace('SETSID', 'os.setsid()')}time.sleep(60)"
    script = f"""import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from executor import Executor, Limits
Executor({sandbox!r}, Limits(60.0, processes=200)).session().execute({code!r})"""

    def bomb():
        found = set()
        for comm in Path("/proc").glob("[0-9]*/comm"):
            with suppress(OSError):                     # it has ended meanwhile
                if comm.read_text().strip() == name and " Z " not in (comm.parent / "stat").read_text():
                    found.add(int(comm.parent.name))
        return found

    with subprocess.Popen([sys.executable, "-c", script], start_new_session=True) as trainer:
        assert settled(lambda: len(bomb()) > 4, 15.0)
        ours = [trainer.pid, *sorted(tree(trainer.pid) - bomb())] if killed != "the trainer" else [trainer.pid]
        for pid in ours:
            with suppress(ProcessLookupError):          # one of the bomb that has not been named yet
                os.kill(pid, signal.SIGKILL)
        assert settled(lambda: not bomb())


def settled(condition, seconds: float = ROOM.grace + BUSY) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


AWAKE = {
    "a timer": LIBC + "import threading, time\ndef work():\n while True: open('ticks', 'a').write('x'); time.sleep(0.001)\n"
               "threading.Thread(target=work, daemon=True).start()\n"
               "event = (ctypes.c_int * 16)(0, 0, 18, 0)\ntimer = ctypes.c_void_p()\n"
               "assert libc.timer_create(1, event, ctypes.byref(timer)) == 0\n"
               "every = (ctypes.c_long * 4)(0, 2_000_000, 0, 100_000_000)\n"
               "assert libc.timer_settime(timer, 0, every, None) == 0\n",
    "children": "import os, threading, time\nme = os.getpid()\n"
                "def work():\n while True: open('ticks', 'a').write('x'); time.sleep(0.001)\n"
                "for i in range(4):\n if os.fork() == 0:\n  os.setsid()\n  while True: os.kill(me, 18)\n"
                "threading.Thread(target=work, daemon=True).start()\n",
    "the death of a child": LIBC + "import fcntl, threading, time\n"
                "def work():\n while True: open('ticks', 'a').write('x'); time.sleep(0.001)\n"
                "r, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getpid()); fcntl.fcntl(r, 10, 18)\n"
                "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\n"
                "if os.fork() == 0: os.close(r); time.sleep(60)\nos.close(w)\n"
                "threading.Thread(target=work, daemon=True).start()\n",
}


@pytest.mark.parametrize("by", AWAKE)
def test_nothing_runs_between_cells(executor, by):
    """Whatever wakes the runner: at most it is killed for it."""
    with executor.session() as session:
        session.execute(AWAKE[by], ROOMY)
        time.sleep(1.0)
        session.execute("1", ROOMY)
        assert int(session.execute("import os; os.path.getsize('ticks')", ROOMY).value) < 300     # of 1000


MEMORY = {
    # 3,000 MB in 15 children; then 3,000 MB of which only the first page is still mapped
    "shared, not resident": "import os, mmap, time\nmmap.mmap(-1, 4096)\nfor i in range(15):\n if os.fork() == 0: break\n"
                            "else: time.sleep(60)\nm = mmap.mmap(-1, 200 << 20)\nfor o in range(0, 200 << 20, 1 << 20):\n"
                            " m[o:o + (1 << 20)] = bytes(1 << 20); m.madvise(mmap.MADV_DONTNEED, o, 1 << 20)\ntime.sleep(60)",
    "shared, unmapped": LIBC + "import time\nlibc.mmap.restype = ctypes.c_long\nfor i in range(15):\n"
                        " a = libc.mmap(0, 200 << 20, 3, 0x21, -1, 0)\n if a == -1: raise MemoryError\n"
                        " ctypes.memset(a, 1, 200 << 20); libc.munmap(ctypes.c_long(a + 4096), (200 << 20) - 4096)",
    "hidden from PSS": LIBC + "import time\nlibc.prctl(4, 0, 0, 0, 0)\nfor i in range(15):\n if os.fork() == 0:\n"
                       "  x = b'x' * (200 << 20); time.sleep(60)\ntime.sleep(60)",
    "main thread ended": LIBC + "import threading, time\ndef work():\n x = b'x' * (200 << 20); time.sleep(60)\n"
                         "for i in range(15):\n if os.fork() == 0:\n  threading.Thread(target=work).start(); time.sleep(1)\n"
                         "  libc.pthread_exit(0)\ntime.sleep(60)",
    "in a tool": "import os, time\nfor i in range(15):\n if os.fork() == 0: x = b'x' * (200 << 20); time.sleep(60)\nwait()",
    "sockets": "import os, socket, time\nfor i in range(20):\n if os.fork() == 0: break\nl = []\ntry:\n"
               " while True:\n  a, b = socket.socketpair(); l += [a, b]\n  for s in l[-2:]:\n   s.setblocking(False)\n   try:\n"
               "    while s.send(bytes(1 << 16)): pass\n   except BlockingIOError: pass\nexcept OSError: time.sleep(60)",
}


@pytest.mark.parametrize("kind", MEMORY)
def test_memory_of_all_processes_together_is_bounded(executor, kind):
    """768 MB and what is taken within a glance of the supervisor; also while a tool runs, and it ends the cell."""
    if kind == "sockets" and executor.sandbox == "none":
        pytest.skip("not covered by none")

    def available():
        return int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) >> 10     # MB

    def taken():
        before, lowest, done = available(), [10 ** 9], threading.Event()

        def watch():
            while not done.wait(0.01):
                lowest[0] = min(lowest[0], available())
        watcher = threading.Thread(target=watch)
        watcher.start()
        with executor.session({"wait": lambda: time.sleep(ROOMY)}) as session:
            result = session.execute(MEMORY[kind], ROOMY)
        done.set()
        watcher.join()
        assert result.status in ("killed", "error") and result.seconds < ROOMY / 2, result
        return before - lowest[0]
    assert any(taken() < 2000 for _ in range(3))        # another program may take some at the same time


def test_memory_that_processes_share_counts_once():
    """700 MB and Pool(4): ordinary. In all limits it is one array."""
    limits = Limits(60.0, 1.0, memory_mb=1024, processes=24)
    code = """import numpy as np, time, multiprocessing as mp
a = np.ones(700 << 17)
def part(i): time.sleep(0.5); return float(a[i::4].sum())
with mp.Pool(4) as pool: print(sum(pool.map(part, range(4))) == a.sum())"""
    with Executor("bwrap", limits) as executor, executor.session() as session:
        assert session.execute(code).output == "True\n"


def test_memory_runs_out_for_sessions_first(executor):
    """Where root has started it, with CAP_SYS_RESOURCE, code cannot lower its score to the trainer's."""
    capabilities = int(re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[1], 16)
    with executor.session() as session:
        score = "p = '/proc/self/oom_score_adj'\nopen(p).read().strip()"
        assert session.execute(score, ROOMY).value == "'1000'"
        session.execute("open(p, 'w').write('0')", ROOMY)
        lowest = int(session.execute("open(p).read()", ROOMY).value.strip("'\\n"))
    assert lowest == (900 if capabilities >> 24 & 1 else 0)


def test_sessions_do_not_reach_each_other(executor):
    """No names of sockets, no terminals, no switches of the kernel, no counters that one can use up for all."""
    find = ("import os\ndef inside(k):\n try: return os.readlink(f'/proc/self/ns/{k}')\n except OSError: return k\n"
            "[inside(k) for k in ('net', 'ipc', 'mnt', 'pid', 'user')]")
    with executor.session() as one, executor.session() as other:
        for kind in ("DGRAM", "RAW"):
            result = one.execute(f"import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_{kind})", ROOMY)
            assert "PermissionError" in result.error
        for kind in ("STREAM", "SEQPACKET"):
            assert one.execute(f"socket.socketpair(socket.AF_UNIX, socket.SOCK_{kind}); 1", ROOMY).status == "ok"
        for _ in range(150):
            one.execute(LIBC + "libc.inotify_init1(0)", ROOMY)
        assert one.execute(LIBC + "libc.inotify_init1(0)", ROOMY).value == "-1"
        if executor.sandbox == "bwrap":
            ours, theirs = (eval(session.execute(find, ROOMY).value) for session in (one, other))
            assert all(a != b for a, b in zip(ours, theirs)), (ours, theirs)
            assert one.execute("import os, pty; a, b = pty.openpty(); os.ttyname(b)", ROOMY).value == "'/dev/pts/0'"
            assert other.execute("import os; os.listdir('/dev/pts')", ROOMY).value == "['ptmx']"
            one.execute("l = []\nwhile True: l.append(os.open('/dev/ptmx', os.O_RDWR))", ROOMY)
            assert other.execute("import pty; a, b = pty.openpty()", ROOMY).status == "ok"
            assert int(one.execute("len(l)", ROOMY).value) < 20                # of 4096 on the whole machine
            one.execute(LIBC + "event, timer, n = (ctypes.c_int * 16)(0, 0, 12, 0), ctypes.c_void_p(), 0\n"
                        "while n < 5000 and libc.timer_create(1, event, ctypes.byref(timer)) == 0: n += 1", ROOMY)
            assert int(one.execute("n", ROOMY).value) <= 1000                  # and so with signals in a queue
            for name in ("shmmax", "msgmni", "sem", "shm_rmid_forced"):
                assert "PermissionError" in one.execute(f"open('/proc/sys/kernel/{name}', 'r+')", ROOMY).error


def test_the_supervisor_cannot_be_starved(executor):
    """The schedulers' calls are for the caller itself."""
    with executor.session() as session:
        refused = ["os.sched_setaffinity(p, {0})", "os.sched_setscheduler(p, os.SCHED_IDLE, os.sched_param(0))",
                   "os.sched_setparam(p, os.sched_param(0))", "resource.prlimit(p, resource.RLIMIT_NOFILE, (1, 1))",
                   "os.setpriority(os.PRIO_PROCESS, p, 19)", "os.setpriority(os.PRIO_USER, 0, 19)"]
        for call in refused:
            error = session.execute(f"import os, resource; p = os.getppid()\n{call}", ROOMY).error
            assert "PermissionError" in error, call
        for call in ("os.sched_setaffinity(0, {0})", "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))",
                     "os.nice(1)", "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))"):
            assert session.execute(call, ROOMY).status == "ok", call


def test_a_deep_folder_is_removed(executor):
    base = Path(executor.base or "/nowhere")
    before = set(base.glob("*"))
    with executor.session() as session:
        code = "import os\nos.mkdir('locked', 0)\nfor i in range(1500): os.mkdir('directory'); os.chdir('directory')"
        assert session.execute(code, ROOMY).status == ("ok" if executor.sandbox == "none" else "error")     # inodes
    assert set(base.glob("*")) == before


def test_a_link_in_place_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "target").mkdir(mode=0o500)
    with Executor("none", LIMITS) as executor:
        with executor.session() as session:
            code = f"import os; here = os.getcwd(); os.rmdir(here); os.symlink({str(tmp_path / 'target')!r}, here)"
            assert session.execute(code, ROOMY).status == "ok"
        assert not os.path.lexists(session.workdir) and (tmp_path / "target").stat().st_mode & 0o777 == 0o500
