"""Access to the web: one cache, one guard, one fetch, and what the built-in tools ask for.

Owns `Cache` (record and replay in SQLite), `check_address` and `Web.fetch` (what may be reached, and how much), and
`search`, `article`, `snapshot` (what the tools ask for). Read in this order: `Cache.answer`, `Web.get`, `search`.

Not covered: what a public page says to the model, and search engines that see the query. Proxies of the environment
are not used for pages, because the guard could not see the address behind them.
"""
import base64
import hashlib
import ipaddress
import json
import math
import os
import re
import socket
import sqlite3
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote, urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter

from machinery.api import bearer, call
from machinery.cli import UserError
from machinery.documents import WebError
from machinery.text import holds_benchmark

VERSION = "1"                            # of what is stored: raise it when old answers no longer serve
MAX_BYTES = 20 * 2**20                   # of a page, a file, an answer; counted after decompression
AGENT = "Mozilla/5.0 (compatible; tool-r1 research agent)"


# ------------------------------------------------------------------------------------------ record and replay
class Cache:
    """Answers of the web and of models, by tool, arguments, back end and version. Secret keys never enter it.

    mode "live": nothing outlives the process; "record": answers are kept in the SQLite file `path`; "replay": only
    what is kept there, all else is WebError("cache_miss"). Thread-safe; equal requests at one time are made once.
    """

    def __init__(self, path: str | None = None, mode: str = "live"):
        self.mode, self.counts = mode, Counter(hits=0, misses=0, made=0)
        self.lock, self.flights = threading.Lock(), {}
        try:
            self.db = sqlite3.connect(path if mode != "live" else ":memory:", check_same_thread=False, timeout=60)
            self.db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, request TEXT, answer BLOB)")
            self.db.commit()
        except sqlite3.Error as error:
            raise UserError(f"{path} cannot be used as a record: {error}") from error

    def answer(self, tool: str, arguments: dict, backend: str, make: Callable, hits: list | None = None):
        """The kept answer, else make() (a JSON value), kept unless it raises; a WebError with `keep` is kept too.
        An answer that need not be made is noted in `hits`."""
        request = json.dumps([tool, arguments, backend, VERSION], sort_keys=True)
        key = hashlib.sha256(request.encode()).hexdigest()
        with self.lock:
            row = self.db.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            mine = row is None and key not in self.flights
            if mine and self.mode == "replay":
                self.counts["misses"] += 1
                raise WebError("cache_miss", "this was not recorded, and the web is closed")
            if mine:
                self.flights[key] = Future()
            flight = self.flights.get(key)
            self.counts["made" if mine else "hits"] += 1
        if hits is not None and not mine:
            hits.append(tool)
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
        except BaseException as error:    # also Ctrl-C: nobody must wait for this answer for ever
            if isinstance(error, WebError) and error.keep:
                self._keep(key, request, {"error": [error.kind, error.text]})
            flight.set_exception(error)
            raise
        finally:
            with self.lock:
                del self.flights[key]

    def _keep(self, key: str, request: str, row: dict):
        try:
            with self.lock, self.db:
                self.db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)",
                                (key, request, zlib.compress(json.dumps(row).encode())))
        except sqlite3.Error as error:      # a full disk, say: the answer was paid for, and serves all the same
            print(f"warning: an answer is not kept in the record: {error}", file=sys.stderr)

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
    with suppress(OSError):    # closed already
        sock.shutdown(socket.SHUT_RDWR)


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
    if response.status_code != 200:
        passing = response.status_code == 429 or response.status_code >= 500
        raise WebError(f"http_{response.status_code}", "the site refuses", keep=not passing)
    chunks, size = [], 0
    for chunk in response.iter_content(65536):
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_BYTES:
            raise WebError("too_large", f"more than {MAX_BYTES // 2**20} MiB", keep=True)
    if time.monotonic() >= deadline:    # the connection is cut then, which looks like the end of the page
        raise WebError("timeout", "the site is too slow")
    return b"".join(chunks)


@dataclass
class Web:
    """What the tools of a run share. Every call of a tool gets a copy whose list of hits is empty."""
    cache: Cache = field(default_factory=Cache)
    allow_loopback: bool = False                 # for tests with servers of their own
    seconds: float = 20.0                        # at most, for one request
    wikipedia: str = "https://{}.wikipedia.org"
    wayback: str = "https://archive.org"
    counts: Counter = field(default_factory=Counter)    # "benchmark": pages and hits that gave it away
    hits: list = field(default_factory=list)            # one entry for each answer that came from the cache

    def answer(self, tool: str, arguments: dict, backend: str, make: Callable):
        return self.cache.answer(tool, arguments, backend, make, self.hits)

    def fetch(self, url: str, seconds: float = math.inf) -> tuple[str, str, bytes]:
        """(final address, content type, body) of a public page, recorded or fetched; else WebError."""
        self.refuse(url)
        url, kind, body = self.answer("fetch", {"url": url}, "http", lambda: self.get(url, seconds))
        return url, kind, base64.b64decode(body)

    def gives_away(self, url: str = "", text: str = "", question: str = "") -> bool:
        """Whether an address or a text holds the benchmark itself. It is counted."""
        found = bool(BENCHMARKS.search(unquote(url))) or holds_benchmark(text, question)
        self.counts["benchmark"] += found
        return found

    def refuse(self, url: str = "", text: str = "", question: str = "") -> None:
        if self.gives_away(url, text, question):
            raise WebError("blocked", f"this {'site' if url else 'page'} holds the benchmark itself", keep=bool(url))

    def get(self, url: str, seconds: float) -> list[str]:
        """[final address, content type, body in base64] of a page. Every address on the way is checked."""
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
                        body = base64.b64encode(body_of(response, deadline)).decode()
                        return [url, response.headers.get("content-type", ""), body]
                except (requests.RequestException, ValueError) as error:
                    late = time.monotonic() >= deadline or isinstance(error, requests.Timeout)
                    kind = "timeout" if late else "network"
                    raise WebError(kind, f"{parts.hostname} cannot be read") from error
            url = urljoin(url, response.headers["location"])
            self.refuse(url)
        raise WebError("network", "too many redirects", keep=True)

    def ask(self, tool: str, arguments: dict, backend: str, url: str, pick: Callable, **request):
        """pick(JSON) of an API that the user has configured, recorded by tool and arguments: keys in `request` only."""
        return self.answer(tool, arguments, backend, lambda: pick(call(url, self.seconds, **request)))


def open_web(spec: str) -> Web:
    """The web of a run, from a flag: live, record[:FILE] or replay[:FILE]. UserError for anything else."""
    mode, _, file = spec.partition(":")
    if mode not in ("live", "record", "replay"):
        raise UserError(f"--cache {spec}: it is live, record[:FILE] or replay[:FILE]")
    if mode == "replay" and not Path(file or "web.sqlite").is_file():
        raise UserError(f"--cache {spec}: there is no such record")
    return Web(Cache(file or "web.sqlite", mode))


# ------------------------------------------------------------------------------------- what the tools ask for
# In the order of preference: variable of the environment that holds the key or the address; address; where in its
# answer the hits are; their names for title, link and text.
SEARCHES = {
    "serper": ("SERPER_API_KEY", "https://google.serper.dev/search", ["organic"], ("title", "link", "snippet")),
    "brave": ("BRAVE_API_KEY", "https://api.search.brave.com/res/v1/web/search", ["web", "results"],
              ("title", "url", "description")),
    "tavily": ("TAVILY_API_KEY", "https://api.tavily.com/search", ["results"], ("title", "url", "content")),
    "searxng": ("SEARXNG_URL", "", ["results"], ("title", "url", "content")),
    "wikipedia": ("", "", ["query", "search"], ("title", "title", "snippet")),    # needs no key, and so is the last
}


def search(web: Web, query: str, k: int, year: int, site: str) -> list[list[str]]:
    """The k best hits [title, link, text] of the first back end that has a key, else of Wikipedia."""
    live = next((name for name, (variable, *_) in SEARCHES.items() if os.environ.get(variable)), "wikipedia")
    backend = web.cache.backend_of("web_search", live)
    url, request = search_request(web, backend, query, min(k, 20), year, site)

    def pick(answer: dict) -> list:
        _, _, path, names = SEARCHES[backend]
        for name in path:
            answer = answer.get(name) or {}
        return [[str(hit.get(name) or "") for name in names] for hit in answer]
    arguments = {"query": query, "k": k, "year": year, "site": site}
    hits = web.ask("web_search", arguments, backend, url, pick, **request)[:k]
    if backend == "wikipedia":
        folder = web.wikipedia.format("en") + "/wiki/"
        hits = [[title, folder + quote(title.replace(" ", "_")), re.sub("<.*?>", "", text)] for title, _, text in hits]
    return hits


def search_request(web: Web, backend: str, query: str, k: int, year: int, site: str) -> tuple[str, dict]:
    """(address, request) of a search."""
    variable, url, *_ = SEARCHES[backend]
    key, full = os.environ.get(variable, ""), f"{query} site:{site}" if site else query
    if backend == "serper":
        span = {"tbs": f"cdr:1,cd_min:1/1/{year},cd_max:12/31/{year}"} if year else {}
        return url, {"json": {"q": full, "num": k, **span}, "headers": {"X-API-KEY": key}}
    if backend == "brave":
        span = {"freshness": f"{year}-01-01to{year}-12-31"} if year else {}
        return url, {"params": {"q": full, "count": k, **span}, "headers": {"X-Subscription-Token": key}}
    if backend == "tavily":
        span = {"start_date": f"{year}-01-01", "end_date": f"{year}-12-31"} if year else {}
        sites = {"include_domains": [site]} if site else {}
        return url, {"json": {"query": query, "max_results": k, **span, **sites}, "headers": bearer(key)}
    dated = f"{full} {year}" if year else full    # these two cannot be asked for a year: it becomes a word
    if backend == "searxng":
        return key.rstrip("/") + "/search", {"params": {"q": dated, "format": "json"}}
    asked = {"list": "search", "srsearch": dated.replace(" site:", " "), "srlimit": k}
    return web.wikipedia.format("en") + "/w/api.php", {
        "headers": {"User-Agent": AGENT}, "params": {"action": "query", "format": "json", **asked}}


def article(web: Web, title: str, date: str) -> tuple[str, str]:
    """(title and date, HTML) of a Wikipedia article as it stood at the end of a day, or stands now."""
    language, name = re.fullmatch(r"(?:([a-z]{2,3}):)?(.*)", title, re.DOTALL).groups()
    api = web.wikipedia.format(language or "en") + "/w/api.php"
    common = {"format": "json", "formatversion": 2}
    until = {"rvstart": f"{date}T23:59:59Z", "rvdir": "older"} if date else {}

    def newest(answer: dict) -> list:
        found = (answer.get("query", {}).get("pages") or [{}])[0]
        if not found.get("revisions"):
            raise WebError("not_found", f"no article {name!r}" + (f" on {date}" if date else ""), keep=True)
        return [found["title"], found["revisions"][0]["revid"], found["revisions"][0]["timestamp"]]
    found, revision, stamp = web.ask(
        "wiki", {"title": title, "date": date}, "mediawiki", api, newest, headers={"User-Agent": AGENT},
        params={"action": "query", "prop": "revisions", "titles": name, "redirects": 1, "rvlimit": 1,
                "rvprop": "ids|timestamp", **until, **common})
    html = web.ask("wiki", {"revision": revision, "language": language}, "mediawiki", api,
                   lambda answer: answer["parse"]["text"], headers={"User-Agent": AGENT},
                   params={"action": "parse", "oldid": revision, "prop": "text", **common})
    return f"{found}, revision of {stamp}", html


def snapshot(web: Web, url: str, date: str) -> str:
    """The address of the Wayback Machine's copy of a page that is nearest to a date."""
    def closest(answer: dict) -> str:
        found = (answer.get("archived_snapshots") or {}).get("closest") or {}
        if not found.get("url"):
            raise WebError("not_found", "the archive has no copy", keep=True)
        return re.sub(r"(/web/\d+)/", r"\1id_/", found["url"])    # id_: without the archive's frame
    return web.ask("archive", {"url": url, "date": date}, "wayback", web.wayback + "/wayback/available", closest,
                   params={"url": url, "timestamp": re.sub(r"\D", "", date)})
