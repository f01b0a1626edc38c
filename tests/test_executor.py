"""The executor's contract: what persists, what a cell returns, tools, limits, shutdown; and the soak (slow).

The hostile programs are in test_executor_hostile.py. Here every test that can runs in both sandboxes.
"""
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

import executor as module
from executor import Executor, Limits, SandboxError, CellResult
from machinery.cli import UserError
from tools import ToolError

LIMITS = Limits(30.0, 3.0, memory_mb=256, output_chars=2000, tool_calls=5, disk_mb=16, processes=24)


@pytest.fixture(scope="module", params=["bwrap", "none"])
def executor(request):
    with Executor(request.param, LIMITS) as executor:
        yield executor


def tree(pid: int) -> set[int]:
    """The living descendants of pid, as the host sees them."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                after_name = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue
            if after_name[0] != b"Z":
                parents[int(entry.name)] = int(after_name[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def gone(pids: set[int], seconds: float = 10.0) -> bool:
    """Whether all these processes end within some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not pids & tree(0):
            return True
        time.sleep(0.05)
    return False


def test_state_persists(executor):
    with executor.session(files={"a.txt": b"one\ntwo\n"}) as session:
        code = "import math\nf = open('a.txt')\ndef area(r): return math.pi * r ** 2"
        assert session.execute(code).status == "ok"
        assert session.execute("f.readline()").value == "'one\\n'"
        assert session.execute("f.readline(), round(area(1), 2)").value == "('two\\n', 3.14)"
        assert session.execute("None").value is None
        assert session.execute("import pickle; pickle.loads(pickle.dumps(area)) is area").value == "True"
        code = "from dataclasses import dataclass\n@dataclass\nclass P:\n x: int\nP(1)"
        assert session.execute(code).value == "P(x=1)"


def test_traceback_shows_the_models_lines_of_all_cells(executor):
    with executor.session() as session:
        session.execute("def half(x):\n    return 1 / x")
        result = session.execute("import json\ntry:\n    half(0)\nexcept ZeroDivisionError:\n    json.loads('{')")
    lines = result.error.splitlines()
    assert result.status == "error" and lines[-1].startswith("json.decoder.JSONDecodeError")
    assert '  File "<cell 1>", line 2, in half' in lines and "    return 1 / x" in lines
    assert "    json.loads('{')" in lines and "During handling" in result.error
    assert not any("json/" in line or "executor" in line for line in lines)


def test_observation():
    assert CellResult().observation() == "(no output)"
    assert CellResult(output="a\n", value="1", error="E\n").observation() == "a\n1\nE"


def test_what_was_printed_before_a_timeout_is_kept(executor):
    with executor.session() as session:
        result = session.execute("x = 1\nprint('a', end='')\nwhile True: pass", 0.3)
        assert (result.status, result.output) == ("timeout", "a") and "Variables set so far" in result.error
        assert 0.3 <= result.seconds <= 0.3 + LIMITS.grace + 0.5
        assert session.execute("x").value == "1"


def test_a_pause_does_not_reach_into_the_next_cell(executor):
    """The host goes on while the session is paused: kept busy by 15 children here. Those of the next cell live."""
    leave = "import os\nfor _ in range(15): os.posix_spawn('/bin/sleep', ['sleep', '60'], {})"
    spawn = "os.waitstatus_to_exitcode(os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)[1])"
    for _ in range(10):
        with executor.session() as session:
            assert session.execute(leave).status == "ok"
            assert session.execute(spawn).value == "0"


def test_what_a_cell_leaves_running_writes_nothing_into_the_next_one(executor):
    leave = "import os, time\nfor _ in 'ab': os.posix_spawn('/bin/sh', ['sh', '-c', 'while :; do echo y; done'], {})"
    for _ in range(30):
        with executor.session() as session:
            assert session.execute(f"{leave}\ntime.sleep(0.01)").status == "ok"
            assert session.execute("print('two')").output == "two\n"


def test_threads_that_call_tools_leave_later_cells_alone(executor, monkeypatch):
    monkeypatch.setattr(executor, "limits", replace(LIMITS, tool_calls=10 ** 6))
    work = ("import threading, time\ndef work():\n while True:\n  try: same(1)\n  except Exception: pass\n"
            "  time.sleep(0.0003)\nfor _ in range(3): threading.Thread(target=work, daemon=True).start()\n")
    for _ in range(10):
        with executor.session({"same": lambda value: value}) as session:
            assert session.execute(f"{work}time.sleep(0.02)").status == "ok"
            for _ in range(6):
                assert session.execute("[same(i) for i in range(5)]; same(7)", 5.0).value == "7"


def test_threads_go_on_from_cell_to_cell(executor, monkeypatch):
    """They print and call tools; what stands between cells waits, nothing of it fails."""
    monkeypatch.setattr(executor, "limits", replace(LIMITS, tool_calls=10 ** 6))
    code = """import sys, threading, time
failed = []
def work(act):
    try:
        while True: act()
    except BaseException as error: failed.append(repr(error))
for act in (lambda: (sys.stdout.write('.'), sys.stdout.flush()), lambda: (same(1), time.sleep(0.001))):
    threading.Thread(target=work, args=(act,), daemon=True).start()"""
    for _ in range(10):
        with executor.session({"same": lambda value: value}) as session:
            assert session.execute(code).status == "ok"
            for _ in range(10):
                assert session.execute("time.sleep(0.005); failed").value == "[]"


def test_threads_that_always_call_keep_no_cell_waiting(executor, monkeypatch):
    """A cell's end comes after one call of each of the four threads, not after any number."""
    monkeypatch.setattr(executor, "limits", replace(LIMITS, tool_calls=10 ** 6))
    code = """import threading
def work():
    while True: tick()
for _ in range(4): threading.Thread(target=work, daemon=True).start()"""
    with executor.session({"tick": lambda: time.sleep(0.02)}) as session:
        session.execute(code)
        assert median(session.execute("1").tool_calls for _ in range(40)) <= 5


@pytest.mark.parametrize("wait", [
    "slow()",
    "import threading; thread = threading.Thread(target=slow); thread.start(); thread.join()",
    "import concurrent.futures as f\nwith f.ThreadPoolExecutor(4) as pool: list(pool.map(lambda i: slow(), range(4)))",
    "import asyncio; asyncio.run(asyncio.to_thread(slow))",
    "while True: large()"])
def test_a_tool_that_outlasts_the_cell_leaves_the_variables(executor, monkeypatch, wait):
    monkeypatch.setattr(executor, "limits", replace(LIMITS, tool_calls=10 ** 6))
    tools = {"slow": lambda: time.sleep(1.0), "large": lambda: "r" * 300_000}
    for _ in range(10 if "large" in wait else 1):
        with executor.session(tools) as session:
            assert session.execute(f"x = 1\n{wait}", 0.1).status == "timeout"
            assert session.execute("x").value == "1"


def test_an_interrupt_does_not_reach_the_next_cell(executor):
    """Of a cell that ends at about the time when it is up, beside threads that could take the signal."""
    with executor.session() as session:
        session.execute("import threading, time\n"
                        "for _ in range(4): threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()")
        for i in range(100):
            busy = f"end = time.perf_counter() + {0.0096 + i % 10 * 0.0001}\nwhile time.perf_counter() < end: pass"
            assert session.execute(busy, 0.0105).status in ("ok", "timeout")
            assert session.execute("for _ in range(2000): pass\ntime.sleep(0.001); 5").value == "5"


@pytest.mark.parametrize("own", [
    "sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')",
    "sys.stdout = open(1, 'w', closefd=False)",
    "sys.stdout = open(sys.stdout.fileno(), mode='w', encoding='utf8', buffering=1)"])
def test_streams_of_the_codes_own_end_with_their_cell(executor, own):
    with executor.session() as session:
        for _ in range(10):
            assert session.execute(f"import io, sys\n{own}\nprint('one')").output == "one\n"
            result = session.execute("import subprocess; print('two', flush=True); subprocess.run(['echo', 'three'])")
            assert result.output == "two\nthree\n"


def test_an_alarm_ends_with_its_cell(executor):
    code = "import signal\ndef late(*_): raise TimeoutError\nsignal.signal(signal.SIGALRM, late)\n"
    with executor.session() as session:
        for seconds in (0.002, 0.05):
            assert session.execute(f"{code}x = signal.setitimer(signal.ITIMER_REAL, {seconds})").status == "ok"
            time.sleep(0.1)
            assert session.execute("signal.pause() if signal.getitimer(signal.ITIMER_REAL)[0] else 1").value == "1"


def test_a_process_whose_name_is_no_text_is_killed_like_any_other(executor):
    """The kernel cuts a name after 15 bytes, so perhaps within a character."""
    with executor.session() as session:
        before = tree(executor.zygote.process.pid)
        code = ("import os, shutil, subprocess, time; shutil.copy('/bin/sleep', '\u00e9' * 8)\n"
                "x = subprocess.Popen(['./' + '\u00e9' * 8, '60']); time.sleep(0.05)")
        assert session.execute(code).status == "ok"
        assert session.execute("os.path.exists('\u00e9' * 8)").value == "True"
        assert gone(tree(executor.zygote.process.pid) - before)


def test_a_large_cell_runs(executor):
    with executor.session() as session:
        for _ in range(2):
            assert session.execute(f"x = {'a' * 1_000_000!r}; len(x)").value == "1000000"


def test_a_death_between_cells_keeps_the_files(executor):
    """A thread ends the process at about the time of the pause: the next cell crashes, or the one after it."""
    with executor.session() as session:
        session.execute("open('kept', 'w').close()")
        for i in range(60):
            session.execute(f"import os, threading; threading.Timer({i % 10} / 10_000, os._exit, [1]).start()")
            assert session.execute("1").status in ("ok", "crashed")
            assert session.execute("import os; os.path.exists('kept')").value in ("True", None)     # None: it crashed
        assert "True" in [session.execute("import os; os.path.exists('kept')").value for _ in range(5)]


SPOIL = "open('made', 'w').write('by code'); open('changed', 'w').write('by code'); os.remove('removed')"


@pytest.mark.parametrize("end, status", [("sum(range(10 ** 12))", "killed"), ("os._exit(1)", "crashed")])
def test_a_lost_cell_loses_variables_and_keeps_files(executor, end, status):
    """The files that code has written, and the attachments as it left them."""
    with executor.session(files={"untouched": b"given", "changed": b"given", "removed": b"given"}) as session:
        session.execute("x = 1; import os; open('earlier', 'w').write('by code')")
        result = session.execute(f"{SPOIL}; y = 2\n{end}", 0.5)
        assert result.status == status
        assert "variables are lost, files in the working directory are kept" in result.error
        assert session.execute("[name for name in ('x', 'y', 'os') if name in globals()]").value == "[]"
        found = session.execute("import os; {name: open(name).read() for name in sorted(os.listdir())}").value
        assert found == str({"changed": "by code", "earlier": "by code", "made": "by code", "untouched": "given"})
        assert session.execute("open('untouched').read(), os.getcwd() == os.environ['HOME']").value == "('given', True)"


STATUSES = ("ok", "error", "timeout", "killed", "crashed")


def ways_to_die():
    """(name, code): every signal, exit codes, descriptors, limits, and what a restart may stumble on."""
    for number in range(1, 65):
        yield f"signal {number}", f"os.kill(os.getpid(), {number})"
        if number % 8 == 0:
            yield f"signal {number} in a thread", ("import threading\nthreading.Thread(target=lambda: os.kill("
                                                   f"os.getpid(), {number})).start()\nimport time; time.sleep(0.1)")
    for code in (0, 1, 2, 126, 127, 128, 137, 255, -1):
        yield f"exit {code}", f"os._exit({code})"
    for name, code in (("close all", "os.closerange(0, 256)"), ("close the wire", "os.closerange(3, 256)"),
                       ("cover all", "n = os.open('/dev/null', 2)\nfor i in range(256): os.dup2(n, i)"),
                       ("odd output", "import fcntl; fcntl.fcntl(1, fcntl.F_SETFL, os.O_DIRECT | os.O_APPEND)")):
        yield name, code
    for limit, value in (("AS", 1), ("DATA", 1), ("STACK", 1), ("CPU", 0), ("NOFILE", 0), ("FSIZE", 0), ("NPROC", 0)):
        code = f"import resource as r; r.setrlimit(r.RLIMIT_{limit}, ({value}, {value})); x = [0] * 10**7"
        yield f"limit {limit}", code
    here = "import shutil; c = os.getcwd()\n"
    yield "directory is a file", here + "os.chdir('/'); shutil.rmtree(c); open(c, 'w').close(); os._exit(1)"
    yield "directory is a dead link", here + "os.chdir('/'); shutil.rmtree(c); os.symlink('/nowhere/a', c); os._exit(1)"
    yield "directory is closed", "os.chmod('.', 0); os._exit(1)"
    yield "huge tool call", "same('x' * (900 << 10)); same([[]] * 10**5); os._exit(1)"
    yield "nested tool call", "l = []\nfor i in range(900): l = [l]\nsame(l)"
    yield "halves of pairs", r"print('\ud800'); same('\ud800'); raise ValueError('\udfff')"


def test_what_code_does_is_never_a_host_failure(executor):
    """A model that could end in SessionLost could leave its reward, and with it a wrong answer given before."""
    for name, code in ways_to_die():
        with executor.session({"same": lambda value: value}) as session:
            result = session.execute(f"import os; final_answer('wrong\\ud800')\n{code}", 1.0)
            assert result.answer == "wrong?" and result.status in STATUSES, name
            (result.observation() + result.answer).encode()                 # nothing that a file could not hold
            result = session.execute("1 + 1")
            if result.status != "ok":                                       # its limits, its pending signals
                session.execute("import os; os._exit(0)")
                result = session.execute("1 + 1")
            assert result.value == "2" or name.startswith("directory"), (name, result)
    with pytest.raises(module.SessionLost):
        session.execute("1")


def test_a_session_without_a_process_is_the_cells_failure(executor, monkeypatch):
    with executor.session() as session:
        monkeypatch.setattr(executor.zygote, "fork_session", lambda *_: (_ for _ in ()).throw(OSError("no process")))
        monkeypatch.setattr(session, "_start_runner", lambda: (_ for _ in ()).throw(OSError("no process")))
        assert session.execute("final_answer(1); import os; os._exit(1)").status == "crashed"
        assert session.execute("1").status == "crashed"
        monkeypatch.undo()
        assert "was restarted" in session.execute("1").error and session.execute("1").value == "1"


# The runner's descriptor of the wire, and a way to write frames to it.
WIRE = """import gc, json, os, struct, threading, time
runner = next(o for o in gc.get_objects() if type(o).__name__ == 'Runner')
def send(frame):
    data = json.dumps(frame).encode()
    os.write(runner.wire.fileno(), struct.pack('>I', len(data)) + data)
end = {'end': 'ok', 'value': 'forged', 'error': None}
answer = {'answer': 'forged', 'id': 1}
token = {'token': runner.token} if hasattr(runner, 'token') else {}
"""


@pytest.mark.parametrize("frames", [
    "for i in range(10): send(end)", "send(end | token); [send(end) for i in range(9)]",
    "[send(end | token) for i in range(9)]", "send(end | token); send(answer | token)", "send(end); send(answer)",
    "send(end | token); os.write(runner.wire.fileno(), b'\\0')"])
def test_a_frame_counts_in_its_own_cell_only(executor, frames):
    with executor.session() as session:
        session.execute(WIRE + frames + "\ntime.sleep(0.1)")
        for _ in range(8):
            result = session.execute("1 / 0")
            assert result.status in ("error", "crashed") and not result.answered and result.value is None


def test_a_frame_of_nested_json_is_cheap_for_the_host():
    inbox = bytearray((6 << 20).to_bytes(4, "big") + b"[" + b"[]," * ((6 << 20) // 3 - 1) + b"]")
    with pytest.raises(ValueError):
        module.take_frame(inbox)


def test_a_removed_working_directory_is_made_again(executor):
    with executor.session(files={"a": b"1"}) as session:
        session.execute("import os, shutil; shutil.rmtree(os.getcwd())")
        assert session.execute("os._exit(1)").status == "crashed"
        assert session.execute("import os; os.listdir()").value == "[]"


def test_restarts_leave_nothing(executor):
    with executor.session() as session:
        session.execute("import os; os._exit(1)")
        before = len(os.listdir("/proc/self/fd")), len(tree(executor.zygote.process.pid))
        for _ in range(20):
            assert session.execute("import os; os.fork() or os.fork(); os._exit(1)").status == "crashed"
        inside = session.execute("import os; len(os.listdir('/proc/self/fd'))").value
        assert (len(os.listdir("/proc/self/fd")), len(tree(executor.zygote.process.pid))) == before
        assert int(inside) <= 7         # 0, 1, 2, the wire, the output, the pipe of `resume`, and the listing itself


def test_code_has_its_children_signals_and_random_state_to_itself(executor):
    with executor.session() as session:
        code = "import os\nif (pid := os.fork()) == 0: os._exit(3)\nos.wait() == (pid, 3 << 8)"
        assert session.execute(code).value == "True"
        assert "ChildProcessError" in session.execute("os.wait()").error
        code = "if (pid := os.fork()) == 0: os._exit(4)\nos.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])"
        assert session.execute(code).value == "4"
        assert session.execute(code.replace("os._exit(4)", "1 / 0")).value == "1"      # as of plain Python
        session.execute("import signal, subprocess, time; seen = []\n"
                        "signal.signal(signal.SIGCHLD, lambda *received: seen.append(1))")
        assert session.execute("seen").value == "[]"
        code = "subprocess.run(['true'])\nfor _ in range(300):\n    if not seen: time.sleep(0.01)\nbool(seen)"
        assert session.execute(code).value == "True"    # on a busy machine the signal may come late
        session.execute("import random; random.seed(7)\nimport numpy as np; np.random.seed(7)")
        drawn = [session.execute("random.random(), np.random.rand()").value for _ in range(2)]
        session.execute("random.seed(7); np.random.seed(7)")
        again = session.execute("[(random.random(), np.random.rand()) for _ in range(2)]").value
        assert again == f"[{', '.join(drawn)}]"


def test_files(executor, tmp_path):
    (tmp_path / "b").write_bytes(b"from disk")
    with executor.session(files={"a.txt": b"bytes", "deep/er/b": tmp_path / "b"}) as session:
        code = "import os; sorted(os.listdir('.')), open('a.txt').read(), open('deep/er/b').read()"
        assert session.execute(code).value == "(['a.txt', 'deep'], 'bytes', 'from disk')"
        assert (session.workdir is None) == (executor.sandbox == "bwrap")
        if session.workdir:
            assert (session.workdir / "a.txt").read_bytes() == b"bytes"
    with executor.session() as session:
        assert session.execute("os = __import__('os'); os.listdir('.')").value == "[]"


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "", ".", "a\0b"])
def test_file_names_stay_inside(executor, name):
    with pytest.raises(UserError):
        executor.session(files={name: b""})


def test_final_answer(executor):
    with executor.session() as session:
        first = session.execute("final_answer(42); final_answer('late'); print('runs on')")
        assert (first.answered, first.answer, first.output, first.status) == (True, "42", "runs on\n", "ok")
        assert not session.execute("1").answered
        assert session.execute("final_answer('x' * 10 ** 6)").answer == "x" * module.MAX_ANSWER
        killed = session.execute("final_answer(1); import os; os._exit(1)")
        assert (killed.status, killed.answer) == ("crashed", "1")


def test_tools(executor):
    def add(a: int, b: int = 1) -> int:
        """Add two numbers."""
        return a + b

    def refuse():
        raise ToolError("not that one")

    with executor.session({"add": add, "refuse": refuse}) as session:
        code = "import numpy as np; add(np.int64(2), b=3), add.__doc__"
        assert session.execute(code).value == "(5, 'Add two numbers.')"
        assert session.execute("try: refuse()\nexcept ToolError as e: print(e)").output == "not that one\n"
        result = session.execute("[add(i) for i in range(9)]")
        assert (result.status, result.tool_calls) == ("error", 4) and "no more than 5 tool" in result.error


def test_tools_know_the_time_left(executor):
    left = []
    with executor.session({"look": lambda: left.append(session.seconds_left())}) as session:
        session.execute("look(); import time; time.sleep(0.3); look()", 10.0)
        assert 7.0 < left[0] <= 10.0 and 0.25 < left[0] - left[1] < 5.0
        start = time.monotonic()
        assert session.execute("import time; time.sleep(60)", 0.2).status == "timeout"
        assert time.monotonic() - start < 0.2 + LIMITS.grace


def test_clock_starts_with_the_slot_and_tools_hold_none():
    released = threading.Event()
    with Executor("bwrap", LIMITS, max_running=1) as executor, ThreadPoolExecutor(8) as pool:
        sessions = [executor.session({"wait": lambda: released.wait(5) and 1}) for _ in range(8)]
        results = list(pool.map(lambda s: s.execute("import time; time.sleep(0.5)", 3.0), sessions))
        assert [r.status for r in results] == ["ok"] * 8
        waiting = pool.submit(sessions[0].execute, "wait()")
        assert sessions[1].execute("1 + 1").value == "2"            # while the tool of another session is at work
        released.set()
        assert waiting.result().value == "1"


def test_many_sessions_from_many_threads(executor):
    def trajectory(number):
        with executor.session({"same": lambda v: v}) as session:
            session.execute(f"n = {number}")
            return [session.execute("n = same(n + 1); n").value for _ in range(3)]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(trajectory, range(48))) == [[str(n + k) for k in (1, 2, 3)] for n in range(48)]


def test_a_session_stands_still_between_cells(executor):
    watch = """import threading, time
    gaps = [0]
    def tick():
        last = time.monotonic()
        while True:
            now = time.monotonic()
            gaps.append(now - last) if now - last > 0.5 else time.sleep(0.01)
            last = now
    threading.Thread(target=tick, daemon=True).start()"""
    with executor.session() as session:
        assert session.execute(textwrap.dedent(watch).replace("\n    ", "\n")).status == "ok"
        time.sleep(1.0)
        assert float(session.execute("time.sleep(0.1); max(gaps)").value) > 0.8


def test_leftovers_are_killed_with_the_cell(executor):
    daemon = "import os, time\nif not os.fork():\n os.setsid()\n if os.fork(): os._exit(0)\n time.sleep(60)"
    with executor.session() as session:
        before = tree(executor.zygote.process.pid)
        assert session.execute(daemon).status == "ok"
        assert gone(tree(executor.zygote.process.pid) - before)


def test_a_closed_session_is_gone_while_others_live(executor):
    """Also right after a cell."""
    with executor.session() as witness:
        before = tree(executor.zygote.process.pid)
        for _ in range(10):
            with executor.session() as session:
                session.execute("x = 1")
        assert gone(tree(executor.zygote.process.pid) - before, 3.0)
        assert witness.execute("1").value == "1"


def test_a_session_that_cannot_start_leaves_nothing(executor):
    folders = ["/proc/self/fd", *filter(None, [executor.base])]
    before = [len(os.listdir(folder)) for folder in folders]
    for _ in range(3):
        with pytest.raises(module.SessionLost, match="could not start"):
            executor.session(files={"a.csv": Path("/no/such/file")})
        with pytest.raises(UserError):
            executor.session(files={"../a.csv": b""})
    assert [len(os.listdir(folder)) for folder in folders] == before


def test_none_keeps_the_trainers_memory_and_environment_closed(monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    with Executor("none", LIMITS) as executor, executor.session() as session:
        for name in ("mem", "environ", "maps"):
            assert "PermissionError" in session.execute(f"open('/proc/{os.getpid()}/{name}', 'rb').read(1)").error
        assert session.execute("import os; 'A_KEY' in os.environ").value == "False"
        if module.libc.syscall(444, None, 0, 1) >= 6:            # Landlock's version; since Linux 6.12
            with subprocess.Popen(["sleep", "60"]) as other:            # it has the key, too, and is not the trainer
                reading = session.execute(f"open('/proc/{other.pid}/environ', 'rb').read()")
                signalling = session.execute(f"os.kill({other.pid}, 9)")
                other.kill()
            assert "PermissionError" in reading.error and "PermissionError" in signalling.error
        connect = "import socket; socket.create_connection(('127.0.0.1', 80))"
        assert "Network is down" in session.execute(connect).error
        many = "import os, time\nfor i in range(100): os.fork() or time.sleep(60)\ntime.sleep(60)"
        result = session.execute(many)
        assert result.status == "killed" and "it had too m" in result.error  # many processes, or much memory


def test_an_interpreter_below_tmp_is_visible(tmp_path):
    """The session's own /tmp would hide a virtual environment there."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    site, = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "found_late.py").write_text("v = 5")
    script = f"""
    import sys; sys.path.insert(0, {str(Path(module.__file__).parent)!r})
    from executor import Executor
    with Executor("bwrap") as executor, executor.session() as session:
        print(session.execute("import found_late; found_late.v").observation())
        print(session.execute("open(found_late.__file__, 'w')").observation())"""
    done = subprocess.run([tmp_path / "venv" / "bin" / "python", "-c", textwrap.dedent(script)], text=True,
                          capture_output=True, timeout=60)
    assert done.stdout.startswith("5\n") and "Read-only" in done.stdout, done


def test_bwrap_missing_is_said_loudly(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxError, match="not installed"):
        Executor("bwrap")
    with Executor("auto", LIMITS) as executor:
        assert executor.sandbox == "none"
        assert "NO SANDBOX" in capsys.readouterr().err
        assert executor.session().execute("1 + 1").value == "2"
    with pytest.raises(UserError):
        Executor("docker")


def test_a_sandbox_in_which_no_session_starts_is_refused(monkeypatch, tmp_path):
    """All trajectories would fail on the host, for hours."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module.Session, "_start_runner", lambda _: (_ for _ in ()).throw(OSError("no process")))
    for kind, last in (("none", "none"), ("bwrap", "bwrap"), ("auto", "none")):
        with pytest.raises(SandboxError, match=f"--sandbox {last} fails here: a session could not start: no process"):
            Executor(kind, LIMITS)
    assert not os.listdir(tmp_path)


def test_close_leaves_nothing():
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for sandbox in ("bwrap", "none"):
        executor = Executor(sandbox, LIMITS)
        sessions = [executor.session(files={"a": b"1"}) for _ in range(10)]
        for session in sessions:
            session.execute("import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)")
        pids = tree(executor.zygote.process.pid) | {executor.zygote.process.pid}
        assert len(pids) >= 20
        for session in sessions[:5]:
            session.close()
        executor.close()
        executor.close()                                        # twice is not wrong
        assert gone(pids) and not (executor.base and os.path.exists(executor.base))
        for session in sessions:
            session.close()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


@pytest.mark.parametrize("sandbox", ["bwrap", "none"])
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_the_trainer(sandbox, blow):
    script = f"""
    import sys; sys.path.insert(0, {str(Path(module.__file__).parent)!r})
    from executor import Executor
    executor = Executor({sandbox!r})
    sessions = [executor.session() for _ in range(3)]
    sessions[0].execute("import threading as t\\ndef spin():\\n while True: pass\\nt.Thread(target=spin).start()")
    sessions[1].execute("import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)")
    print(executor.zygote.process.pid, executor.base, flush=True)
    sessions[2].execute("import time; time.sleep(60)", 60)"""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               start_new_session=True)
    zygote, base = trainer.stdout.readline().split()
    time.sleep(0.3)
    pids = tree(trainer.pid)
    assert int(zygote) in pids and len(pids) >= 7
    os.killpg(trainer.pid, blow)                            # as a terminal's Ctrl-C does: to the group
    trainer.wait(10)
    assert gone(pids)
    assert base == "None" or not os.path.exists(base)


def test_a_dead_zygote_is_replaced():
    with Executor("bwrap", LIMITS) as executor:
        session = executor.session(files={"a": b"1"})
        pids = tree(executor.zygote.process.pid) | {executor.zygote.process.pid}
        for pid in pids:
            with suppress(ProcessLookupError):      # the kernel ends the others with the first
                os.kill(pid, signal.SIGKILL)
        assert gone(pids)
        result = session.execute("1")
        assert result.status == "crashed" and "variables and files are lost" in result.error
        assert session.execute("open('a').read()").value == "'1'"
        assert session.execute("2").value == "2" and executor.session().execute("3").value == "3"


@pytest.mark.slow
@pytest.mark.parametrize("sandbox", ["bwrap", "none"])
def test_soak(sandbox):
    """1,000 sessions x 5 cells from 8 threads, 10 % of the cells hostile. Prints its figures: run with -s."""
    bomb = ("import os, time\nuntil = time.time() + 20\nfor i in range(5): os.fork()\n"       # 32 lines
            "while time.time() < until:\n if os.fork(): os._exit(0)\nos._exit(0)")
    hostile = ["import os; os._exit(1)", "while True: pass", bomb, f"import os\nif os.fork() == 0:\n exec({bomb!r})",
               "import os; os.kill(os.getpid(), 40)", "import mmap; mmap.mmap(-1, 1 << 28)",
               "sum(range(10 ** 12))", "print('x' * 10_000_000)", "import os; os.closerange(3, 256)",
               "raise SystemExit", "z = [0] * 10 ** 10",
               "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)"]

    def trajectory(number):
        rng, count = random.Random(number), 0
        with executor.session({"same": lambda v: v}, {"n.txt": str(number).encode()}) as session:
            for cell in range(5):
                if rng.random() < 0.1:
                    assert session.execute(rng.choice(hostile), 0.2).status in STATUSES
                    count += 1
                else:
                    result = session.execute("k = same(int(open('n.txt').read())); k")
                    assert result.value == str(number), (number, cell, result)
        return count

    def resident(pid):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20

    limits = Limits(seconds=60.0, grace=1.0, memory_mb=256, disk_mb=16, processes=24)
    with Executor(sandbox, limits) as executor, ThreadPoolExecutor(8) as pool:
        list(pool.map(trajectory, range(100)))                  # warm
        zygote = executor.zygote.process.pid
        resting = 1 if sandbox == "bwrap" else 0
        while len(tree(zygote)) > resting:
            time.sleep(0.1)
        inside, = tree(zygote) or {zygote}
        mounts = len(Path("/proc/self/mounts").read_text().splitlines())
        before = len(os.listdir("/proc/self/fd")), resident(os.getpid()), resident(inside)
        start = time.monotonic()
        count = sum(pool.map(trajectory, range(1000)))
        seconds = time.monotonic() - start
        until = time.monotonic() + 30
        while len(tree(zygote)) > resting and time.monotonic() < until:
            time.sleep(0.1)
        after = len(os.listdir("/proc/self/fd")), resident(os.getpid()), resident(inside)
        left = (len(tree(zygote)) - resting, len(Path("/proc/self/mounts").read_text().splitlines()) - mounts,
                len(os.listdir(executor.base)) if executor.base else 0)
        print(f"\nsoak, {sandbox}: 5,000 cells ({count} hostile) in {seconds:.0f} s;",
              "{} processes, {} mounts, {} directories left;".format(*left),
              "descriptors {}, host {:.1f} MB, zygote {:.1f} MB;".format(*before),
              "descriptors {}, host {:.1f} MB, zygote {:.1f} MB".format(*after))
        assert left == (0, 0, 0) and after[0] == before[0]
        assert after[1] < before[1] + 30 and after[2] < before[2] + 5
