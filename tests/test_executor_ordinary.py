"""Ordinary programs print the same in a session as in plain Python on the same machine.

PROGRAMS holds them, with an empty line between two. DIFFERENT names what is known
and documented (at the top of executor.py) to come out differently.
"""
# ruff: noqa: E501
import subprocess
import sys

import pytest

from executor import Executor, Limits

PROGRAMS = r"""
print(1 + 1)

print("a", "b", sep="-", end="!\n")

x = [i * i for i in range(10)]; print(x, sum(x))

print({k: v for k, v in zip("abc", range(3))})

print(sorted({3, 1, 2}), max([1, 5, 2]), min("hello"))

print(f"{3.14159:.2f} {42:>5} {'x':^5}|")

print("%s is %d" % ("a", 3), "{:,}".format(1234567))

def f(n): return 1 if n < 2 else n * f(n - 1)
print(f(50))

print(2 ** 200, 7 // 2, -7 // 2, -7 % 3, divmod(17, 5))

print(0.1 + 0.2, round(2.5), 1e308 * 10, float("nan"))

print(complex(1, 2) * 3j, abs(3 + 4j))

print("héllo wörld ✓ 日本".upper(), len("✓"))

print("a,b;c".replace(";", ",").split(","), " x ".strip())

print(bytes(range(5)), "é".encode(), b"ab".hex())

print([*range(3)], (lambda a, *b, **c: (a, b, c))(1, 2, d=3))

a, *b = "hello"; print(a, b)

print(any([0, 1]), all([]), list(enumerate("ab")), list(reversed([1, 2])))

import math; print(math.pi, math.gcd(12, 18), math.comb(50, 5), math.isclose(0.1 + 0.2, 0.3))

import statistics; print(statistics.mean([1, 2, 3]), statistics.stdev([1, 2, 3, 4]))

import random; random.seed(1); print(random.random(), random.sample(range(100), 5))

import itertools; print(list(itertools.combinations("abc", 2)), list(itertools.accumulate([1, 2, 3])))

import functools; print(functools.reduce(lambda a, b: a * b, range(1, 6)))

import collections; print(collections.Counter("mississippi").most_common(2))

from collections import defaultdict, deque, OrderedDict, namedtuple; print(deque([1], 3), namedtuple("P", "x y")(1, 2))

import heapq, bisect; h = [3, 1, 2]; heapq.heapify(h); print(heapq.heappop(h), bisect.bisect([1, 3, 5], 3))

import datetime; print(datetime.date(2024, 2, 28) + datetime.timedelta(2), datetime.datetime(2020, 1, 1).strftime("%A %d %B"))

import datetime as d; print((d.datetime(2024, 3, 1) - d.datetime(2023, 3, 1)).days, d.date.fromisoformat("2024-01-02").isocalendar())

import calendar; print(calendar.month(2024, 2), calendar.isleap(1900))

from zoneinfo import ZoneInfo; import datetime; print(datetime.datetime(2024, 7, 1, tzinfo=ZoneInfo("UTC")).isoformat())

import time; t = time.perf_counter(); time.sleep(0.01); print(time.perf_counter() > t, time.gmtime(0).tm_year)

import re; print(re.findall(r"\d+", "a1b22c333"), re.sub(r"(\w)(\d)", r"\2\1", "a1 b2"))

import json; print(json.dumps({"a": [1, None, True, "é"]}, indent=1), json.loads('{"x": 1.5}'))

import csv, io; print(list(csv.reader(io.StringIO('a,b\n1,"2,3"'))))

import decimal; print(decimal.Decimal("0.1") + decimal.Decimal("0.2"), decimal.Decimal(2).sqrt())

import fractions; print(fractions.Fraction(1, 3) + fractions.Fraction(1, 6))

import string; print(string.ascii_lowercase, string.Template("$x").substitute(x=1))

import textwrap; print(textwrap.fill("word " * 20, 30))

import hashlib; print(hashlib.sha256(b"a").hexdigest(), hashlib.md5(b"a").hexdigest())

import base64, binascii; print(base64.b64encode(b"abc"), binascii.crc32(b"abc"))

import zlib, gzip, bz2, lzma; print([len(m.compress(b"a" * 1000)) < 100 for m in (zlib, gzip, bz2, lzma)])

import struct; print(struct.pack(">IH", 1, 2), struct.unpack("<d", bytes(8)))

import pickle; print(pickle.loads(pickle.dumps({"a": (1, 2)})))

import copy; a = [[1]]; b = copy.deepcopy(a); b[0][0] = 2; print(a, b)

import operator; print(sorted([(2, "a"), (1, "b")], key=operator.itemgetter(0)))

import enum; C = enum.Enum("C", "RED BLUE"); print(C.RED, list(C))

import uuid; print(uuid.uuid5(uuid.NAMESPACE_DNS, "a.b"), len(str(uuid.uuid4())))

import secrets; print(len(secrets.token_hex(8)))

import os; print(os.path.join("a", "b"), os.listdir("."), os.sep)

import os; os.mkdir("d"); open("d/f", "w").write("x"); print(os.walk(".").__next__(), os.path.getsize("d/f"))

from pathlib import Path; Path("a.txt").write_text("one\ntwo\n"); print(Path("a.txt").read_text().split(), Path("a.txt").suffix)

with open("f", "w") as f: f.write("1\n2\n3\n")
with open("f") as f: print([int(x) for x in f])

import shutil; open("a", "w").write("x"); shutil.copy("a", "b"); print(open("b").read()); shutil.rmtree("nothing", ignore_errors=True)

import tempfile; f = tempfile.NamedTemporaryFile("w+"); f.write("hi"); f.seek(0); print(f.read())

import tempfile, os; d = tempfile.mkdtemp(); print(os.path.isdir(d))

import tempfile; f = tempfile.TemporaryFile(); print(f.write(b"abc"))

import glob; open("x.py", "w").close(); print(glob.glob("*.py"))

import zipfile; z = zipfile.ZipFile("z.zip", "w"); z.writestr("a", "b"); z.close(); print(zipfile.ZipFile("z.zip").namelist())

import tarfile, io; t = tarfile.open("t.tar", "w"); t.addfile(tarfile.TarInfo("a"), io.BytesIO()); t.close(); print(tarfile.open("t.tar").getnames())

import sqlite3; c = sqlite3.connect(":memory:"); c.execute("create table t(a)"); c.execute("insert into t values(1)"); print(c.execute("select * from t").fetchall())

import sqlite3; c = sqlite3.connect("db"); c.execute("create table t(a)"); c.commit(); print(c.execute("select count(*) from t").fetchone())

import dbm.dumb; d = dbm.dumb.open("db"); d[b"a"] = b"1"; print(d[b"a"]); d.close()

import shelve; s = shelve.open("s"); s["a"] = [1]; s.close(); print(shelve.open("s")["a"])

import subprocess; print(subprocess.run(["echo", "hi"], capture_output=True, text=True).stdout)

import subprocess; print(subprocess.check_output("echo $((1+2)) | cat", shell=True, text=True))

import subprocess; subprocess.run(["echo", "direct"], check=True)

import subprocess; p = subprocess.Popen(["cat"], stdin=-1, stdout=-1, text=True); print(p.communicate("in")[0], p.returncode)

import subprocess, sys; print(subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True).stdout)

import subprocess; print(subprocess.run(["sleep", "0"], start_new_session=True).returncode)

import subprocess
try: subprocess.run(["sleep", "9"], timeout=0.1)
except subprocess.TimeoutExpired: print("late")

import os; print(os.system("exit 3") >> 8, os.popen("echo popen").read())

import shlex, shutil; print(shlex.split("a 'b c'"), shutil.which("sh") is not None)

import threading; l = []; t = threading.Thread(target=l.append, args=(1,)); t.start(); t.join(); print(l)

from concurrent.futures import ThreadPoolExecutor as E
with E(8) as p: print(list(p.map(lambda x: x * x, range(10))))

from concurrent.futures import ThreadPoolExecutor as E; import time
with E(40) as p: print(sum(p.map(lambda i: time.sleep(0.01) or i, range(80))))

import threading, time; t = [threading.Thread(target=time.sleep, args=(0.2,)) for _ in range(60)]; [x.start() for x in t]; [x.join() for x in t]; print(len(t))

import queue, threading; q = queue.Queue(); threading.Thread(target=lambda: q.put(5)).start(); print(q.get())

import threading; e = threading.Event(); threading.Timer(0.01, e.set).start(); print(e.wait(5))

import multiprocessing as mp, math
with mp.Pool(2) as p: print(p.map(math.sqrt, [1, 4, 9]))

import multiprocessing as mp
def f(x): return x + 1
with mp.get_context("fork").Pool(3) as p: print(p.map(f, range(5)))

import multiprocessing as mp; q = mp.Queue(); p = mp.Process(target=q.put, args=(7,)); p.start(); print(q.get()); p.join()

import multiprocessing as mp; a = mp.Array("i", 3); p = mp.Process(target=a.__setitem__, args=(0, 5)); p.start(); p.join(); print(list(a))

import multiprocessing as mp; a, b = mp.Pipe(); a.send([1]); print(b.recv(), mp.Value("d", 1.5).value, mp.Lock().acquire())

from multiprocessing.shared_memory import SharedMemory as S; s = S(create=True, size=9); s.buf[0] = 7; print(s.buf[0]); s.close(); s.unlink()

import concurrent.futures as c, math
with c.ProcessPoolExecutor(2) as p: print(list(p.map(math.factorial, [5, 6])))

import multiprocessing as mp, math
if __name__ == "__main__":
 with mp.get_context("spawn").Pool(1) as p: print(p.map(math.sqrt, [16]))

import os
if os.fork() == 0: os._exit(4)
print(os.waitstatus_to_exitcode(os.wait()[1]))

import os; r, w = os.pipe(); os.write(w, b"x"); print(os.read(r, 1))

import signal, os; signal.signal(signal.SIGUSR1, lambda *a: print("got")); os.kill(os.getpid(), signal.SIGUSR1)

import signal, time
def h(*a): raise TimeoutError("alarm")
signal.signal(signal.SIGALRM, h); signal.setitimer(signal.ITIMER_REAL, 0.05)
try: time.sleep(5)
except TimeoutError as e: print(e)

import asyncio
async def f(): await asyncio.sleep(0.01); return 3
print(asyncio.run(f()))

import asyncio
async def f(i): return i
async def main(): return await asyncio.gather(*map(f, range(4)))
print(asyncio.run(main()))

import asyncio
async def f():
 p = await asyncio.create_subprocess_exec("echo", "sub", stdout=-1); return (await p.communicate())[0]
print(asyncio.run(f()))

import socket; a, b = socket.socketpair(); a.send(b"hi"); print(b.recv(9))

import selectors, socket; s = selectors.DefaultSelector(); a, b = socket.socketpair(); s.register(a, 1); b.send(b"x"); print(len(s.select(1)))

import fcntl; f = open("l", "w"); fcntl.flock(f, fcntl.LOCK_EX); print("locked")

import mmap; f = open("m", "w+b"); f.write(bytes(4096)); f.flush(); m = mmap.mmap(f.fileno(), 0); m[:2] = b"ok"; print(m[:2])

import pty, os; a, b = pty.openpty(); os.write(b, b"x"); print(os.read(a, 1), os.isatty(b))

import ctypes; print(ctypes.CDLL(None).abs(-3), ctypes.c_int(5).value)

import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0)

import gc, weakref, sys; print(gc.isenabled(), sys.getrecursionlimit(), sys.byteorder)

import sys; print(sys.version_info[:2], sys.maxsize, __name__)

import platform; print(platform.system(), platform.python_version())

import io, contextlib; b = io.StringIO()
with contextlib.redirect_stdout(b): print("in")
print(b.getvalue())

import io, sys; sys.stdout = io.StringIO(); print("hidden"); sys.stdout = sys.__stdout__; print("shown")

import sys; sys.stdout.write("w\n"); sys.stdout.flush(); sys.stdout.buffer.write(b"bytes\n")

import logging; logging.basicConfig(format="%(message)s"); logging.warning("warned"); print("done")

import warnings; warnings.simplefilter("ignore"); warnings.warn("x"); print("quiet")

import traceback
try: 1 / 0
except ZeroDivisionError: print(traceback.format_exc().splitlines()[-1])

try: {}["a"]
except KeyError as e: print(repr(e))
finally: print("end")

import inspect
def f(a, b=1): return a
print(inspect.signature(f))

import inspect
def f(a):
    return a
print(inspect.getsource(f))

import inspect
class A:
    x = 1
    def m(self): pass
print(inspect.getsource(A))

import getpass, os; print(bool(getpass.getuser()), bool(os.path.expanduser("~")))

import os; print(os.path.dirname(os.path.abspath(__file__)) == os.getcwd())

import ast; print(ast.literal_eval("[1, {'a': 2}]"), ast.dump(ast.parse("1")))

import dis, timeit; print(timeit.timeit("1", number=10) >= 0)

from dataclasses import dataclass, field
@dataclass(order=True)
class P:
 x: int
 y: list = field(default_factory=list)
print(P(1) < P(2), P(1))

from typing import *
def f(x: Optional[int] = None) -> List[int]: return [x or 0]
print(f(), get_type_hints(f))

class A:
 def __repr__(self): return "A!"
print(A(), [A()])

class A:
 def __enter__(self): return 1
 def __exit__(self, *a): return True
with A() as a: raise ValueError
print(a)

def g():
 x = yield 1
 print(x)
i = g(); next(i); next(i, None) or i.close()

match [1, 2, {"k": 3}]:
 case [a, b, {"k": c}]: print(a, b, c)

print((n := 10) + n, [y for x in range(3) if (y := x * 2)])

global z
z = 1
def f():
 global z
 z += 1
f(); print(z)

from __future__ import annotations
def f(a: nothing): return 1
print(f(1))

exec("q = 5"); print(q, eval("q + 1"), compile("1", "", "eval") is not None)

import importlib; print(importlib.import_module("math").floor(2.7))

open("mymodule.py", "w").write("v = 3"); import sys; sys.path.insert(0, "."); import mymodule; print(mymodule.v)

print(input.__name__, callable(print), id(1) == id(1), hash("a") == hash("a"), vars().__class__)

import locale, unicodedata; print(unicodedata.name("é"), locale.getpreferredencoding())

import xml.etree.ElementTree as E; print(E.fromstring("<a><b t='1'/></a>").find("b").attrib)

import html, urllib.parse as u; print(html.escape("<&>"), u.quote("a b/é"), u.urlparse("http://a/b?c=1").query)

from html.parser import HTMLParser
class P(HTMLParser):
 def handle_data(self, d): print(d)
P().feed("<p>text</p>")

import configparser; c = configparser.ConfigParser(); c.read_string("[a]\nb=1"); print(c["a"]["b"])

import argparse; p = argparse.ArgumentParser(); p.add_argument("--n", type=int); print(p.parse_args(["--n", "3"]))

import difflib; print(list(difflib.ndiff(["a"], ["b"])), difflib.get_close_matches("appel", ["apple"]))

import unittest
class T(unittest.TestCase):
 def test(self): self.assertEqual(1, 1)
print(unittest.TextTestRunner(stream=open("o", "w")).run(unittest.defaultTestLoader.loadTestsFromTestCase(T)).testsRun)

import numpy as np; print(np.arange(6).reshape(2, 3).sum(0), np.linalg.inv(np.eye(2)), np.pi)

import numpy as np; np.random.seed(0); print(np.random.rand(2), np.random.default_rng(1).integers(9, size=3))

import numpy as np; a = np.ones((500, 500)); print((a @ a).sum(), np.linalg.svd(np.eye(3))[1], np.fft.fft([1, 0]))

import numpy as np; np.save("a.npy", np.arange(3)); print(np.load("a.npy"), np.load("a.npy", mmap_mode="r")[1])

import numpy as np; a = np.zeros(30_000_000); a[::1000] = 1; print(a.sum())

big = "x" * 300_000_000; print(len(big))

l = list(range(5_000_000)); print(sum(l), len({i for i in range(500_000)}))

print(sum(i * i for i in range(10 ** 6)))

import sys; sys.exit(0)

exit()

quit()

import sys; sys.exit("message")

1 / 0

undefined

import nothing_like_this

int("x")

raise ValueError("mine")

assert 1 == 2, "no"

[][0]

def f(): return f()
f()

a = (

if True:
print(1)

open("missing")

input()

import urllib.request; urllib.request.urlopen("http://127.0.0.1:9/", timeout=1)

import socket; socket.create_connection(("localhost", 9), 1)

import atexit; atexit.register(print, "bye"); print("first")

from multiprocessing import Manager
with Manager() as m: d = m.dict(); d[1] = 2; print(dict(d))

import mmap; m = mmap.mmap(-1, 4096); m[:1] = b"x"; print(m[:1])

import os; os.sched_setaffinity(os.getpid(), os.sched_getaffinity(0)); print("set")

import os; print(os.memfd_create("a") > 0)
"""
# What is documented to differ: no network, no named sockets, no shared anonymous memory, nothing at the exit.
DIFFERENT = {"urlopen": "URLError", "create_connection": "gaierror", "Manager()": "EOFError", "atexit": "first",
             "mmap.mmap(-1": "PermissionError", "sched_setaffinity(os.getpid()": "PermissionError",
             "memfd_create": "PermissionError"}
SNIPPETS = ["\ufeffprint('a byte order mark')", *PROGRAMS.strip("\n").split("\n\n")]


@pytest.fixture(scope="module")
def executor():
    with Executor("bwrap", Limits(60.0, 3.0)) as executor:
        yield executor


def test_there_are_enough_of_them():
    assert len(SNIPPETS) >= 140


@pytest.mark.parametrize("code", SNIPPETS, ids=lambda code: code[:50])
def test_ordinary(executor, tmp_path, code):
    with executor.session() as session:
        result = session.execute(code)
    for part, expected in DIFFERENT.items():
        if part in code:
            assert expected in result.observation()
            return
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "cell.py").write_text(code, "utf-8")
    plain = subprocess.run([sys.executable, "-u", "cell.py"], cwd=tmp_path / "work", text=True, timeout=60,
                           stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (result.status == "ok") == (plain.returncode == 0), result
    if plain.returncode == 0:
        theirs = plain.stdout.replace("'cell.py', ", "").replace(", 'cell.py'", "").replace("'cell.py'", "")
        assert result.output == theirs
    else:
        kind = plain.stdout.strip().splitlines()[-1].split(":")[0]
        assert kind in result.error, result
