"""The way out of the machine: one cache, one guard, one fetch, and documents as text. The tools stand on this.

Owns `Cache` (record and replay in SQLite), `check_address` and `Web.fetch` (what may be asked for, and how much),
`holds_benchmark` (pages that give the exam away), `chat` (an OpenAI-compatible server), `to_text` (documents).

Read in this order: `WebError`, `Cache.answer`, `Web.get` with `guarded`, `to_text`.

What the guard does not cover: what a public page says to the model, and search engines that see the query.
Proxies of the environment are not used for pages, because the guard could not see the address behind them.
"""
import base64
import hashlib
import io
import ipaddress
import json
import math
import os
import re
import resource
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from urllib.parse import unquote, urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter

VERSION = "1"                            # of what is stored: raise it when old answers no longer serve
MAX_BYTES = 20 * 2**20                   # of a page, a file, an answer; counted after decompression
AGENT = "Mozilla/5.0 (compatible; tool-r1 research agent)"


class WebError(Exception):
    """What a tool tells the model instead of an answer. keep: the same request would fail so tomorrow, too."""

    def __init__(self, kind: str, text: str, keep: bool = False):
        super().__init__(f"ERROR[{kind}]: {text}")
        self.kind, self.text, self.keep = kind, text, keep


# ------------------------------------------------------------------------------------------ record and replay
class Cache:
    """Answers of the web and of models, by tool, arguments, back end and version. Keys never enter it.

    mode "live": nothing outlives the process; "record": kept in the SQLite file `path`; "replay": only what
    is kept there, all else is WebError("cache_miss"). Thread-safe; equal requests at one time are made once.
    """

    def __init__(self, path: str | None = None, mode: str = "live"):
        self.mode, self.counts = mode, Counter(hits=0, misses=0, made=0)
        self.lock, self.flights = threading.Lock(), {}
        self.here = threading.local()    # .hits: those of this thread's tool call, which tools.py reads
        self.db = sqlite3.connect(path if mode != "live" else ":memory:", check_same_thread=False, timeout=60)
        self.db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, request TEXT, answer BLOB)")
        self.db.commit()

    def answer(self, tool: str, arguments: dict, backend: str, make: Callable):
        """The kept answer, else make() (a JSON value), kept unless it raises; a WebError with `keep` is kept too."""
        request = json.dumps([tool, arguments, backend, VERSION], sort_keys=True)
        key = hashlib.sha256(request.encode()).hexdigest()
        with self.lock:
            row = self.db.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            flight, mine = self.flights.get(key), False
            if row is None and flight is None:
                if self.mode == "replay":
                    self.counts["misses"] += 1
                    raise WebError("cache_miss", "this was not recorded, and the web is closed")
                flight, mine = self.flights.setdefault(key, Future()), True
            self.counts["made" if mine else "hits"] += 1
            self.here.hits = getattr(self.here, "hits", 0) + (not mine)
        if row is not None:
            kept = json.loads(zlib.decompress(row[0]))
            if "error" in kept:
                raise WebError(*kept["error"], keep=True)
            return kept["value"]
        return self._make(key, request, make, flight) if mine else flight.result()

    def _make(self, key: str, request: str, make: Callable, flight: Future):
        try:
            value = make()
            self._keep(key, request, {"value": value})
            flight.set_result(value)
            return value
        except BaseException as error:    # also Ctrl-C: whoever waits for this answer must not wait for ever
            if isinstance(error, WebError) and error.keep:
                self._keep(key, request, {"error": [error.kind, error.text]})
            flight.set_exception(error)
            raise
        finally:
            with self.lock:
                del self.flights[key]

    def _keep(self, key: str, request: str, row: dict):
        with self.lock:
            self.db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)",
                            (key, request, zlib.compress(json.dumps(row).encode())))
            self.db.commit()

    def backend_of(self, tool: str, live: str = "") -> str:
        """Who answers a tool: `live`, but in replay whoever was recorded, so that it needs no key."""
        if self.mode != "replay":
            return live
        with self.lock:
            row = self.db.execute("SELECT request FROM answers WHERE request LIKE ? LIMIT 1",
                                  (f'["{tool}",%',)).fetchone()
        return json.loads(row[0])[2] if row else live

    def digest(self) -> str:
        """A hash of everything kept: the same digest, the same recorded web."""
        with self.lock:
            digest = hashlib.sha256()
            for row in self.db.execute("SELECT key, answer FROM answers ORDER BY key"):
                digest.update(row[0].encode() + row[1])
            return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------- what may be reached
NEVER = [ipaddress.ip_network(n) for n in (    # metadata of two clouds; IPv6 in which an IPv4 can hide
    "168.63.129.16/32", "192.0.0.0/24", "2002::/16", "2001::/32")]
PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")    # all that is given out: the rest is reserved, local, translated
BENCHMARKS = re.compile(
    r"gaia[-_]?benchmark|(?:huggingface\.co|hf-mirror\.com)[.:\d]*/+(?:api/)?datasets|/gaia[^/]*validation", re.I)


def check_address(address: str, allow_loopback: bool = False):
    """WebError unless the address is a public one (or this machine's own, where that is opened for tests)."""
    ip = ipaddress.ip_address(address.split("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    never = ip.is_multicast or any(ip in n for n in NEVER) or ip.version == 6 and ip not in PUBLIC_IPV6
    if not (ip.is_global and not never or allow_loopback and ip.is_loopback):
        raise WebError("blocked", "this address is private or reserved; only public sites can be reached")


def benchmark_site(url: str) -> bool:
    return bool(BENCHMARKS.search(unquote(url)))


def guarded(base: type, allow_loopback: bool, deadline: float, cuts: list) -> type:
    """A connection class that checks every address of a name, then the one it has reached, before a byte is
    sent: a second DNS answer that differs from the first is no way in. It is cut at `deadline` (time.monotonic)."""
    class Guarded(base):
        def _new_conn(self):
            try:
                found = socket.getaddrinfo(self._dns_host, self.port, type=socket.SOCK_STREAM)
            except (OSError, ValueError) as error:
                raise WebError("network", "no such host") from error
            for *_, address in found:
                check_address(address[0], allow_loopback)
            sock = super()._new_conn()
            try:
                check_address(sock.getpeername()[0], allow_loopback)
            except WebError:
                sock.close()
                raise
            # A drip of bytes outlives every read timeout. TLS takes the socket over: the timer has a copy.
            copy = socket.socket(fileno=os.dup(sock.fileno()))
            timer = threading.Timer(max(deadline - time.monotonic(), 0.1), cut, [copy])
            timer.daemon = True
            timer.start()
            cuts.append((timer, copy))
            return sock
    return Guarded


def cut(sock: socket.socket):
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass    # closed already


class PublicOnly(HTTPAdapter):
    """requests' transport over guarded connections: for one request, then it is thrown away."""

    def __init__(self, allow_loopback: bool, deadline: float):
        super().__init__()
        self.cuts: list = []
        pools = self.poolmanager.pool_classes_by_scheme
        self.poolmanager.pool_classes_by_scheme = {
            scheme: type(pool.__name__, (pool,), {"ConnectionCls": guarded(
                pool.ConnectionCls, allow_loopback, deadline, self.cuts)}) for scheme, pool in pools.items()}

    def close(self):
        for timer, copy in self.cuts:
            timer.cancel()
            copy.close()
        super().close()


def body_of(response, deadline: float) -> bytes:
    """The body as it streams in, at most MAX_BYTES and not after the deadline."""
    chunks, size = [], 0
    for chunk in response.iter_content(65536):
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_BYTES:
            raise WebError("too_large", f"more than {MAX_BYTES // 2**20} MiB", keep=True)
        if time.monotonic() >= deadline:
            break
    if time.monotonic() >= deadline:    # also where the cut connection looks like the end of the page
        raise WebError("timeout", "the site is too slow")
    return b"".join(chunks)


@dataclass
class Web:
    """What the tools of a run share."""
    cache: Cache = field(default_factory=Cache)
    allow_loopback: bool = False                 # for tests with servers of their own
    seconds: float = 20.0                        # at most, for one request
    wikipedia: str = "https://{}.wikipedia.org"
    wayback: str = "https://archive.org"
    counts: Counter = field(default_factory=Counter)

    def fetch(self, url: str, seconds: float = math.inf) -> tuple[str, str, bytes]:
        """(final address, content type, body) of a public page, recorded or fetched; else WebError."""
        self.not_the_benchmark(url)
        url, kind, body = self.cache.answer("fetch", {"url": url}, "http", lambda: self.get(url, seconds))
        return url, kind, base64.b64decode(body)

    def not_the_benchmark(self, url: str):
        if benchmark_site(url):
            self.counts["benchmark"] += 1
            raise WebError("blocked", "this site holds the benchmark itself", keep=True)

    def get(self, url: str, seconds: float) -> list[str]:
        deadline = time.monotonic() + min(self.seconds, max(seconds, 1.0))
        for _ in range(6):
            try:
                parts = urlsplit(url)
                plain = parts.scheme in ("http", "https") and parts.hostname and parts.username is None
            except ValueError:
                plain = False
            if not plain:
                raise WebError("blocked", "only plain http and https addresses can be visited", keep=True)
            with requests.Session() as session:
                session.trust_env = False
                session.mount(f"{parts.scheme}://", PublicOnly(self.allow_loopback, deadline))
                try:
                    response = session.get(url, stream=True, allow_redirects=False, headers={"User-Agent": AGENT},
                                           timeout=max(deadline - time.monotonic(), 0.1))
                    if not response.is_redirect:
                        return self.answered(url, response, deadline)
                except (requests.RequestException, ValueError) as error:
                    late = time.monotonic() >= deadline or isinstance(error, requests.Timeout)
                    kind = "timeout" if late else "network"
                    raise WebError(kind, f"{parts.hostname} cannot be read") from error
            url = urljoin(url, response.headers["location"])
            self.not_the_benchmark(url)
        raise WebError("network", "too many redirects", keep=True)

    def answered(self, url: str, response, deadline: float) -> list[str]:
        if response.status_code != 200:
            passing = response.status_code == 429 or response.status_code >= 500
            raise WebError(f"http_{response.status_code}", "the site refuses", keep=not passing)
        kind = response.headers.get("content-type", "")
        return [url, kind, base64.b64encode(body_of(response, deadline)).decode()]

    def ask(self, tool: str, arguments: dict, backend: str, url: str, pick: Callable, **request):
        """pick(JSON) of an API that the user has configured, recorded by tool and arguments: keys in `request` only."""
        return self.cache.answer(tool, arguments, backend, lambda: pick(call(url, self.seconds, **request)))


def call(url: str, seconds: float, **request):
    """One POST (with `json`, `data` or `files`) or GET to a trusted API -> its JSON. Retries with backoff."""
    deadline, method = time.monotonic() + seconds, "GET" if set(request) <= {"params", "headers"} else "POST"
    for pause in (0.5, 1.0, 2.0, math.inf):
        try:
            response = requests.request(method, url, timeout=max(deadline - time.monotonic(), 0.1), **request)
            status, kind = response.status_code, f"http_{response.status_code}"
            passing = status in (200, 429) or status >= 500
            if status == 200:
                answer, kind = response.json(), "bad_answer"
                if not (isinstance(answer, dict) and answer.get("error")):    # MediaWiki, when busy, says so here
                    return answer
        except requests.exceptions.JSONDecodeError:
            kind, passing = "bad_answer", False
        except requests.RequestException as error:
            kind, passing = "timeout" if isinstance(error, requests.Timeout) else "network", True
        if not passing or time.monotonic() + pause > deadline:
            break
        time.sleep(pause)
    raise WebError(kind, f"{urlsplit(url).hostname} did not answer as it should")


def bearer(key: str) -> dict:
    return {"Authorization": f"Bearer {key}"} if key else {}


# ---------------------------------------------------------------------------------------- the benchmark guard
def ngrams(text: str, n: int = 8) -> set[tuple]:
    """The n-word sequences of a text, case and punctuation apart."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}


def holds_benchmark(text: str, question: str) -> bool:
    """Whether a page repeats the question itself: more than a quoted title, at least 40 % of its 8-grams."""
    asked = ngrams(question)
    return len(asked) >= 3 and len(asked & ngrams(text)) >= 0.4 * len(asked)


# ------------------------------------------------------------------------------------------ documents as text
def to_text(body: bytes, suffix: str, sheet: str = "", seconds: float = 60.0) -> str:
    """A document as Markdown, or the text it is. suffix: ".pdf", ".html"... WebError if it cannot be read.

    Parsed in a process of its own, without keys in its environment: a hostile file may want all there is.
    """
    if suffix not in PARSERS:
        return decode(body)
    try:
        done = subprocess.run([sys.executable, "-I", __file__, suffix, sheet], input=body, env={},
                              capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise WebError("timeout", f"the {suffix} file takes too long to read") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it needs too much memory"]
        raise WebError("unreadable", f"the {suffix} file cannot be read: {said[-1][:200]}", keep=True)
    return done.stdout.decode()


def decode(body: bytes) -> str:
    utf_16 = body[:2] in (b"\xff\xfe", b"\xfe\xff")
    if b"\0" in body[:4096] and not utf_16:
        raise WebError("unreadable", "this is a binary file of a kind that cannot be read as text", keep=True)
    try:
        return body.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError:
        return body.decode("latin-1")


def read_pdf(body: bytes, _: str) -> str:
    from pypdf import PdfReader
    pages = PdfReader(io.BytesIO(body)).pages
    texts = [f"[page {i} of {len(pages)}]\n{page.extract_text()}" for i, page in enumerate(pages, 1)]
    return "\n\n".join(texts)


def read_markdown(suffix: str) -> Callable:
    def read(body: bytes, _: str) -> str:
        from markitdown import MarkItDown, StreamInfo
        return MarkItDown(enable_plugins=False).convert_stream(
            io.BytesIO(body), stream_info=StreamInfo(extension=suffix)).text_content
    return read


def read_xlsx(body: bytes, sheet: str) -> str:
    """Every cell with a value or a fill colour: `B2=7 [fill FFFF0000]`. A formula stands where no value is kept."""
    from openpyxl import load_workbook
    values, formulas = (load_workbook(io.BytesIO(body), data_only=flag) for flag in (True, False))
    if sheet and sheet not in values.sheetnames:
        raise ValueError(f"no sheet {sheet!r}; there are {values.sheetnames}")
    lines = []
    for name in [sheet] if sheet else values.sheetnames:
        lines.append(f"## Sheet {name} ({values[name].dimensions}); sheets: {', '.join(values.sheetnames)}")
        for row in values[name].iter_rows():
            shown = []
            for cell in row:
                value = formulas[name][cell.coordinate].value if cell.value is None else cell.value
                colour = cell.fill.fgColor if cell.fill and cell.fill.fill_type else None
                fill = f" [fill {getattr(colour, colour.type)}]" if colour is not None else ""
                if value is not None or fill:
                    shown.append(f"{cell.coordinate}={'' if value is None else value}{fill}")
            if shown:
                lines.append(" | ".join(shown))
    return "\n".join(lines)


def read_zip(body: bytes, _: str) -> str:
    return "\n".join(f"{i.filename} ({i.file_size} bytes)" for i in members(body))


def members(body: bytes) -> list[zipfile.ZipInfo]:
    return zipfile.ZipFile(io.BytesIO(body)).infolist()


PARSERS = {".pdf": read_pdf, ".xlsx": read_xlsx, ".zip": read_zip,
           **{s: read_markdown(s) for s in (".html", ".docx", ".pptx")}}
PARSERS[".htm"] = PARSERS[".html"]


if __name__ == "__main__":    # the process of `to_text`: python web.py SUFFIX SHEET < document
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
    document = sys.stdin.buffer.read()
    try:
        if document[:2] == b"PK" and sum(i.file_size for i in members(document)) > 2**29:
            raise ValueError("it unpacks to more than 512 MiB")
        sys.stdout.buffer.write(PARSERS[sys.argv[1]](document, sys.argv[2]).encode(errors="replace"))
    except Exception as problem:    # whatever a parser says of a broken file, in one line
        sys.exit(f"{type(problem).__name__}: {problem}"[:200])
