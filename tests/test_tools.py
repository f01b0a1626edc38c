"""tools.py and what it stands on in machinery/ (web, documents, api): definitions, checked calls, and the built-in
tools against real servers and real files."""
import base64
import gzip
import hashlib
import io
import json
import mimetypes
import os
import resource
import socket
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Optional
from urllib.parse import parse_qs, urlsplit

import pytest

import tools
from machinery import documents, web
from machinery.cli import UserError, exit_status
from machinery.documents import WebError, to_text
from machinery.text import holds_benchmark
from machinery.web import Cache, Web, check_address, open_web
from tools import (
    Tool, ToolContext, ToolError, fits, known, load_tools, preflight, preflight_table, prompt_text, tool, visit)

for package in ("markitdown", "pypdf", "openpyxl"):
    pytest.importorskip(package, reason="pip install -r requirements-gaia.txt")


# ------------------------------------------------------------------------------------------------ definitions and calls
@tool
def shout(text: str, times: int = 1, context: ToolContext = None, marks: list[str] | None = None) -> str:
    """Say it louder."""
    context.state["shouts"] = context.state.get("shouts", 0) + times
    return text.upper() + "!" * context.state["shouts"] + "".join(marks or [])


def test_a_tool_is_described_by_its_signature_without_the_context():
    assert prompt_text([shout]) == ("shout(text: str, times: int = 1, marks: list[str] | None = None) -> str: "
                                    "Say it louder.")


def test_state_belongs_to_the_trajectory():
    one, other = ToolContext(), ToolContext()
    first, second = shout.bind(one), shout.bind(other)
    assert [first("a"), first("a", times=2), second("b", marks=["?"])] == ["A!", "A!!!", "B!?"]
    assert one.state["shouts"] == 3 and other.state["shouts"] == 1
    assert ToolContext().seconds_left() == 30.0                     # where no cell runs


@pytest.mark.parametrize("args, kwargs, complaint", [
    ((), {}, "missing"), ((1,), {}, "must be str, not int"), (("a", "b"), {}, "must be int"),
    (("a", True), {}, "not bool"), (("a", 1.0), {}, "not float"), (("a",), {"marks": [1]}, "list"),
    (("a",), {"loud": 1}, "unexpected"),
    (("a",), {"context": {}}, "unexpected"), (("a", 1, None, 4), {}, "too many")])
def test_arguments_are_checked(args, kwargs, complaint):
    with pytest.raises(ToolError, match=complaint):
        shout.bind(ToolContext())(*args, **kwargs)


@pytest.mark.parametrize("hint, fitting, others", [
    (Any, [1, None, "a", [{}]], []), (str, ["a"], [1, None]), (int, [1], [True, 1.0, "1"]),
    (float, [1.0, 1], [True, "1"]), (bool, [True], [1, None]), (type(None), [None], [0]),
    (int | None, [1, None], [True, "1"]), (Optional[str], ["a", None], [1]),
    (Literal[1, "a"], [1, "a"], [True, 1.0, 2, "b"]),
    (list, [[], ["a", 1]], ["a", None]), (list[int], [[], [1, 2]], [["a"], [1, "a"], 1, "a"]),
    (list[list[int]], [[[1], []]], [[1], [["a"]]]), (dict, [{}, {"a": 1}], [[]]),
    (dict[str, int], [{}, {"a": 1}], [{"a": "b"}, {1: 1}, {"a": 1, "b": "c"}, "a", []])])
def test_values_of_each_type_by_hand(hint, fitting, others):
    assert known(hint) and all(fits(value, hint) for value in fitting)
    assert not any(fits(value, hint) for value in others)


def test_types_that_cannot_be_checked():
    assert not any(known(hint) for hint in (Path, bytes, set, list[Path], dict[str, bytes], int | Path, Literal[b"x"]))


def no_docstring(x: str) -> str:
    return x


def no_hint(x) -> str:
    """Do."""


def no_return(x: str):
    """Do."""


def odd_type(x: Path) -> str:
    """Do."""


def star(*x: str) -> str:
    """Do."""


def final_answer(x: str) -> str:
    """Do."""


def print(x: str) -> str:    # noqa: A001  a builtin's name
    """Do."""


def Upper(x: str) -> str:
    """Do."""


def bad_default(x: int = "three") -> str:
    """Do."""


def test_keyword_only_arguments_stay_so():
    @tool
    def scale(x: int = 1, *, by: int) -> int:
        """Scale."""
        return x * by
    assert scale.prompt == "scale(x: int = 1, *, by: int) -> int: Scale." and scale.bind(ToolContext())(by=3) == 3


@pytest.mark.parametrize("function", [
    no_docstring, no_hint, no_return, odd_type, star, final_answer, print, Upper, bad_default])
def test_wrong_definitions_fail_at_once(function):
    with pytest.raises(UserError, match=f"tool {function.__name__}: "):
        tool(function)


def test_a_users_own_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from tools import tool, ToolContext\n"
                    "@tool\ndef note(text: str, context: ToolContext) -> int:\n    'Keep a note.'\n"
                    "    context.state.setdefault('notes', []).append(text)\n    return len(context.state['notes'])\n")
    (mine,) = load_tools(str(file))
    call = mine.bind(ToolContext())
    assert isinstance(mine, Tool) and [call("a"), call("b")] == [1, 2] and load_tools(None) == load_tools("") == []
    for text, complaint in [("x = 1\n", "no function"), ("1 / 0\n", "ZeroDivisionError"), ("def f(:\n", "SyntaxError"),
                            ("from tools import tool\n@tool\ndef f(x: str) -> str:\n    return x\n", "docstring")]:
        file.write_text(text)
        with pytest.raises(UserError, match=complaint):
            load_tools(str(file))
    with pytest.raises(UserError, match="no such file"):
        load_tools(str(tmp_path / "none.py"))
    (tmp_path / "again.py").write_text(
        "from tools import tool\n@tool\ndef shout(x: str) -> str:\n    'Do.'\n    return x\n")
    assert [t.name for t in load_tools(str(tmp_path / "again.py"), beside=[mine])] == ["note", "shout"]
    file.write_text("from tools import tool\n@tool\ndef visit(url: str) -> str:\n    'Do.'\n    return url\n")
    with pytest.raises(UserError, match="two tools are called visit"):
        load_tools(f"web,{file}")
    with pytest.raises(UserError, match="two tools are called shout"):
        load_tools(str(tmp_path / "again.py"), beside=[shout])


@pytest.mark.parametrize("problem, status, said", [
    (None, 0, ""), (UserError("--x: no"), 2, "error: --x: no\n"),
    (KeyboardInterrupt("go on"), 130, "\ninterrupted: go on\n")])
def test_command_lines_end_alike(capsys, problem, status, said):
    def command():
        if problem:
            raise problem
    assert exit_status(command) == status and capsys.readouterr().err == said


def test_a_warning_is_one_line():
    code = "import warnings; from machinery.cli import exit_status; exit_status(lambda: warnings.warn('it is\\nslow'))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (ended.stdout, ended.stderr) == ("", "warning: it is slow\n")


# ------------------------------------------------------------------------------------------------ the test's own web
QUESTION = ("If Ada Brunner could row her record-making lake crossing pace without ever resting, how many whole days "
            "would she need to row the distance around the coast of Iceland at its longest measured course?")
HTML = ("<html><head><title>Test page</title><script>var x = 1</script></head><body><h1>Heading</h1><p>Some text "
        "with a <a href='/other'>relative link</a>.</p><table><tr><th>Name</th><th>Age</th></tr><tr><td>Ann</td>"
        "<td>41</td></tr></table></body></html>")


def pdf_bytes(*pages):
    from fpdf import FPDF
    pdf = FPDF()
    for text in pages:
        pdf.add_page()
        pdf.set_font("helvetica", size=12)
        pdf.multi_cell(0, 8, text)
    return bytes(pdf.output())


def docx_bytes(text):
    from docx import Document
    document, out = Document(), io.BytesIO()
    document.add_heading("A report", 1)
    document.add_paragraph(text)
    table = document.add_table(1, 2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "left", "right"
    document.save(out)
    return out.getvalue()


class Site:
    """A web site on loopback. `seen` holds what it was asked."""

    def __init__(self):
        self.seen, site = [], self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                url = urlsplit(self.path)
                site.seen.append((self.command, self.path, dict(self.headers), body))
                name = url.path.removeprefix("/en/").removeprefix("/de/").strip("/")       # Wikipedia's languages
                page = "page_" + name.replace("/", "_").replace(".", "_")
                try:
                    getattr(site, page, site.missing)(self, url)
                except (BrokenPipeError, ConnectionResetError):
                    pass
            do_GET = do_POST = handle_any

            def log_message(self, *_):
                pass
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    @staticmethod
    def send(h, body, kind="text/html; charset=utf-8", status=200, **headers):
        data = body.encode() if isinstance(body, str) else body
        h.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(data)), **headers}.items():
            h.send_header(name, value)
        h.end_headers()
        h.wfile.write(data)

    def redirect(self, h, to):
        self.send(h, "", status=302, location=to)

    def missing(self, h, url):
        if url.path.startswith("/web/20100101000000id_/"):
            self.send(h, "<p>How it was in 2010.</p>")
        else:
            self.send(h, "no", status=404)

    def page_page_html(self, h, url):
        self.send(h, HTML)

    def page_doc_pdf(self, h, url):
        self.send(h, pdf_bytes("The first page is about cats.", "The second page is about dogs."), "application/pdf")

    def page_doc(self, h, url):
        kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
        self.send(h, docx_bytes("A paragraph about owls."), kind)

    def page_long(self, h, url):
        self.send(h, "".join(f"line {i} of a long text\n" for i in range(1000)), "text/plain")

    def page_hop(self, h, url):
        self.redirect(h, "/page.html")

    def page_loop(self, h, url):
        self.redirect(h, "/loop")

    def page_away(self, h, url):
        self.redirect(h, parse_qs(url.query)["to"][0])

    def page_leak(self, h, url):
        self.redirect(h, "https://huggingface.co/datasets/gaia-benchmark/GAIA")

    def page_slow(self, h, url):
        time.sleep(60)
        self.send(h, "late")

    def page_drip(self, h, url):
        h.send_response(200)
        h.end_headers()
        for _ in range(600):
            h.wfile.write(b"a")
            h.wfile.flush()
            time.sleep(0.1)

    def page_headers(self, h, url):
        h.wfile.write(b"HTTP/1.0 200 OK\r\n")
        for i in range(90):
            h.wfile.write(b"x-%d: 1\r\n" % i)
            h.wfile.flush()
            time.sleep(0.7)

    def page_endless(self, h, url):
        h.send_response(200)
        h.end_headers()
        while True:
            h.wfile.write(b"a" * 2**20)

    def page_bomb(self, h, url):
        self.send(h, gzip.compress(b"a" * 2**26), "text/plain", **{"content-encoding": "gzip"})

    def page_busy(self, h, url):
        self.send(h, "busy" if len([s for s in self.seen if s[1] == "/busy"]) == 1 else "fine", "text/plain",
                  status=429 if len([s for s in self.seen if s[1] == "/busy"]) == 1 else 200)

    def page_answers(self, h, url):
        self.send(h, f"<p>A leaked benchmark. {QUESTION} Answer: 9</p>")

    def page_quotes(self, h, url):
        self.send(h, "<p>Ada Brunner holds a record-making lake crossing pace; the coast of Iceland is long.</p>")

    def page_w_api_php(self, h, url):
        q = {k: v[0] for k, v in parse_qs(url.query).items()}
        if q.get("list") == "search":
            hit = {"title": "Ada Lovelace", "snippet": "an <span>English</span> mathematician"}
            answer = {"query": {"search": [hit]}}
        elif q["action"] == "parse":
            answer = {"parse": {"text": f"<p>Text of revision {q['oldid']} with a <a href='/wiki/B'>link</a>.</p>"}}
        elif q["titles"] == "Busy":                                    # so MediaWiki says it: with status 200
            answer = {"error": {"code": "ratelimited", "info": "..."}}
        elif q["titles"] == "Nothing":
            answer = {"query": {"pages": [{"title": "Nothing", "missing": True}]}}
        else:
            revision = 7 if q.get("rvstart") == "2015-06-30T23:59:59Z" and q["rvdir"] == "older" else 9
            answer = {"query": {"pages": [{"title": "Ada Lovelace", "revisions": [
                {"revid": revision, "timestamp": "2015-06-01T00:00:00Z"}]}]}}
        self.send(h, json.dumps(answer), "application/json")

    def page_wayback_available(self, h, url):
        copies = {"closest": {"url": f"{self.url}/web/20100101000000/http://x.org/"}} if "x.org" in url.query else {}
        self.send(h, json.dumps({"archived_snapshots": copies}), "application/json")

    def search(self, answer):
        return lambda h, url: self.send(h, json.dumps(answer), "application/json")


@pytest.fixture(scope="module")
def site():
    site = Site()
    yield site
    site.http.shutdown()
    site.http.server_close()


@pytest.fixture
def call(site, tmp_path):
    """call(tool, *arguments): the tool as a trajectory calls it, over the test's web."""
    made = Web(Cache(), allow_loopback=True, seconds=5, wikipedia=site.url + "/{}", wayback=site.url)
    context = ToolContext(workdir=tmp_path, question=QUESTION)

    def call(name, *args, over=None, **kwargs):
        from dataclasses import replace
        return replace(getattr(tools, name), web=over or made).bind(context)(*args, **kwargs)
    call.web, call.context, call.folder = made, context, tmp_path
    return call


# ------------------------------------------------------------------------------------------------ visiting
def test_html_becomes_markdown_with_absolute_links(call, site):
    text = call("visit", site.url + "/page.html")
    assert text.startswith(f"{site.url}/page.html (page 1/1)\n") and "# Heading" in text and "var x" not in text
    assert f"[relative link]({site.url}/other)" in text and "| Ann | 41 |" in text


def test_pdf_and_office_pages(call, site):
    text = call("visit", site.url + "/doc.pdf")
    assert "[page 1 of 2]\nThe first page is about cats." in text and "[page 2 of 2]" in text
    text = call("visit", site.url + "/doc")
    assert "A paragraph about owls." in text and "| left | right |" in text


@pytest.mark.parametrize("kind, suffix", [
    ("wordprocessingml.document", ".docx"), ("presentationml.presentation", ".pptx"), ("spreadsheetml.sheet", ".xlsx")])
def test_office_types_are_known_without_the_systems_list(monkeypatch, kind, suffix):
    as_in_a_slim_container = mimetypes.MimeTypes().guess_extension
    monkeypatch.setattr(documents.mimetypes, "guess_extension", as_in_a_slim_container)
    kind = f"application/vnd.openxmlformats-officedocument.{kind}; x=1"
    assert documents.suffix_of(kind, "http://a.org/b", b"PK") == suffix


def test_long_pages_are_cut_at_lines_and_counted(call, site):
    pages, n = [], 1
    while True:
        head, _, body = call("visit", site.url + "/long", n).partition("\n")
        if head.startswith("ERROR[no_page]"):
            break
        assert len(body) <= documents.PAGE and body.startswith("line ") and body.endswith("of a long text")
        pages.append(body)
        n += 1
    assert "\n".join(pages).splitlines() == [f"line {i} of a long text" for i in range(1000)] and len(pages) == 3


def test_find_shows_the_places(call, site):
    text = call("find", site.url + "/doc.pdf", "PAGE IS ABOUT")
    assert text.startswith("2 places") and "cats" in text and "dogs" in text
    assert call("find", site.url + "/doc.pdf", "zebra") == "0 places"


@pytest.mark.parametrize("path, error", [
    ("/nothing", "ERROR[http_404]"), ("/loop", "ERROR[network]: too many redirects"), ("/slow", "ERROR[timeout]"),
    ("/drip", "ERROR[timeout]"), ("/headers", "ERROR[timeout]"), ("/endless", "ERROR[too_large]"),
    ("/bomb", "ERROR[too_large]"), ("/away?to=http://10.0.0.1/", "ERROR[blocked]"),
    ("/away?to=https://10.0.0.1/", "ERROR[blocked]"),
    ("/away?to=http://169.254.169.254/latest", "ERROR[blocked]"),
    ("/away?to=file:///etc/passwd", "ERROR[blocked]"), ("/away?to=ftp://example.org/", "ERROR[blocked]"),
    ("/leak", "ERROR[blocked]: this site holds the benchmark")])
def test_what_goes_wrong_is_text(call, site, path, error):
    call.web.seconds = 1 if "timeout" in error else 30
    begin = time.monotonic()
    assert call("visit", site.url + path).startswith(error)
    assert time.monotonic() - begin < 30                                   # the slow ones would take a minute


def test_redirects_are_followed(call, site):
    assert call("visit", site.url + "/hop").startswith(site.url + "/page.html")


@pytest.mark.parametrize("url", [
    "http://127.0.0.1:1/", "http://localhost/", "http://[::1]/", "http://0.0.0.0/", "http://10.1.2.3/",
    "http://2130706433/", "http://0x7f.1/", "http://[::ffff:127.0.0.1]/", "http://192.168.1.1/",
    "http://172.16.0.1/", "http://169.254.169.254/", "http://100.64.0.1/", "http://[fd00:ec2::254]/",
    "http://[fe80::1]/", "http://[2002:7f00:1::]/", "http://224.0.0.1/",
    "file:///etc/passwd", "gopher://example.org/", "http://user:pw@example.org/", "http://", "javascript:1",
    "//example.org"])
def test_private_addresses_and_other_schemes_are_refused(url):
    with pytest.raises(WebError, match="blocked"):
        Web(seconds=2).fetch(url)


@pytest.mark.parametrize("address, allowed", [
    ("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("168.63.129.16", False),
    ("100.100.100.200", False), ("192.0.0.192", False), ("198.18.0.1", False), ("::", False),
    ("64:ff9b::7f00:1", False), ("fe80::1%eth0", False), ("255.255.255.255", False), ("fec0::1", False),
    ("::7f00:1", False), ("64:ff9b:1::7f00:1", False), ("::ffff:10.0.0.1", False), ("::ffff:8.8.8.8", True)])
def test_addresses(address, allowed):
    if allowed:
        check_address(address)
    else:
        with pytest.raises(WebError):
            check_address(address)


def test_a_second_dns_answer_is_no_way_in(site, monkeypatch):
    """DNS rebinding: public when checked, loopback when connected. No real name server does that for a test."""
    real, answers, before = socket.getaddrinfo, ["8.8.8.8", "127.0.0.1"], len(site.seen)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, *a, **k: real(answers.pop(0), port, *a, **k))
    port = urlsplit(site.url).port
    with pytest.raises(WebError, match="blocked"):
        Web(seconds=2).fetch(f"http://rebind.example:{port}/page.html")
    assert answers == [] and len(site.seen) == before                      # connected, and not a byte was sent


def test_a_proxy_of_the_environment_is_no_way_around(site, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", site.url)
    before = len(site.seen)
    with pytest.raises(WebError, match="blocked"):
        Web(seconds=2).fetch("http://10.0.0.1/")
    assert len(site.seen) == before


# ------------------------------------------------------------------------------------------------ the benchmark guard
def test_pages_that_hold_the_benchmark_are_dropped_and_counted(call, site):
    assert call("visit", site.url + "/answers").startswith("ERROR[blocked]: this page holds the benchmark")
    assert call("find", site.url + "/answers", "Answer").startswith("ERROR[blocked]")
    for url in ("https://hf-mirror.com/datasets/x/GAIA", "https://huggingface.co/%64atasets/x",
                "https://huggingface.co:443/datasets/x", "https://huggingface.co/api/datasets/x",
                "https://a.org/gaia%2Dbenchmark"):
        assert call("visit", url).startswith("ERROR[blocked]: this site holds the benchmark")
    assert call("download", site.url + "/answers").startswith("ERROR[blocked]") and not os.listdir(call.folder)
    assert call.web.counts["benchmark"] == 8
    assert "record-making" in call("visit", site.url + "/quotes")          # a page about the matter is none


def test_overlap_by_hand():
    question = " ".join(f"w{i}" for i in range(20))                        # 13 8-grams
    assert holds_benchmark("before " + question.upper() + "!", question)
    assert not holds_benchmark(" ".join(f"w{i}" for i in range(12)), question)     # 5 of 13
    assert holds_benchmark(" ".join(f"w{i}" for i in range(13)), question)         # 6 of 13
    assert not holds_benchmark("who is it", "who is it")                   # too short to tell


# ------------------------------------------------------------------------------------------------ searching
SEARCHES = {    # API answer, request that must arrive: (method, what its body or query holds, header)
    "serper": ({"organic": [{"title": "T", "link": "http://a.org", "snippet": "S"}]},
               {"q": "cats site:a.org", "num": 3, "tbs": "cdr:1,cd_min:1/1/2020,cd_max:12/31/2020"}, "X-API-KEY"),
    "brave": ({"web": {"results": [{"title": "T", "url": "http://a.org", "description": "S"}]}},
              {"q": ["cats site:a.org"], "count": ["3"], "freshness": ["2020-01-01to2020-12-31"]},
              "X-Subscription-Token"),
    "tavily": ({"results": [{"title": "T", "url": "http://a.org", "content": "S"}]},
               {"query": "cats", "max_results": 3, "start_date": "2020-01-01", "end_date": "2020-12-31",
                "include_domains": ["a.org"]}, "Authorization"),
    "searxng": ({"results": [{"title": "T", "url": "http://a.org", "content": "S"}]},
                {"q": ["cats site:a.org 2020"], "format": ["json"]}, None)}


def point(monkeypatch, backend, url):
    """An API at another address."""
    variable, _, *form = web.SEARCHES[backend]
    monkeypatch.setitem(web.SEARCHES, backend, (variable, url, *form))


@pytest.mark.parametrize("backend", SEARCHES)
def test_search_apis(call, site, monkeypatch, backend):
    answer, wanted, header = SEARCHES[backend]
    for variable, *_ in web.SEARCHES.values():
        monkeypatch.delenv(variable or "NONE", raising=False)
    monkeypatch.setattr(site, f"page_{backend}", site.search(answer), raising=False)
    monkeypatch.setattr(site, "page_search", site.search(answer), raising=False)
    variable = web.SEARCHES[backend][0]
    monkeypatch.setenv(variable, site.url if backend == "searxng" else "the-secret-key")
    point(monkeypatch, backend, f"{site.url}/{backend}")
    assert call("web_search", "cats", 3, 2020, "a.org") == "1. T\n   http://a.org\n   S"
    method, path, headers, body = site.seen[-1]
    sent = json.loads(body) if method == "POST" else parse_qs(urlsplit(path).query)
    assert sent == wanted and (header is None or "the-secret-key" in headers[header])
    assert "the-secret-key" not in path


def test_search_without_a_key_is_wikipedias(call, site, monkeypatch):
    for variable, *_ in web.SEARCHES.values():
        monkeypatch.delenv(variable or "NONE", raising=False)
    found = f"1. Ada Lovelace\n   {site.url}/en/wiki/Ada_Lovelace\n   an English mathematician"
    assert call("web_search", "Ada") == found
    assert "tool-r1" in site.seen[-1][2]["User-Agent"]


def test_hits_that_hold_the_benchmark_are_dropped(call, site, monkeypatch):
    hits = [{"title": "T", "link": "https://huggingface.co/datasets/gaia-benchmark/GAIA", "snippet": ""},
            {"title": "T", "link": "http://a.org", "snippet": QUESTION},
            {"title": "good", "link": "http://b.org", "snippet": "S"}]
    monkeypatch.setenv("SERPER_API_KEY", "k")
    monkeypatch.setattr(site, "page_serper", site.search({"organic": hits}), raising=False)
    point(monkeypatch, "serper", site.url + "/serper")
    assert call("web_search", "cats") == "1. good\n   http://b.org\n   S" and call.web.counts["benchmark"] == 2


def test_no_more_hits_than_asked_for(call, site, monkeypatch):
    hits = [{"title": f"T{i}", "link": f"http://a.org/{i}", "snippet": "S"} for i in range(30)]
    monkeypatch.setenv("SERPER_API_KEY", "k")
    monkeypatch.setattr(site, "page_serper", site.search({"organic": hits}), raising=False)
    point(monkeypatch, "serper", site.url + "/serper")
    assert call("web_search", "cats", 2) == "1. T0\n   http://a.org/0\n   S\n2. T1\n   http://a.org/1\n   S"
    call("web_search", "cats", 500)
    assert json.loads(site.seen[-1][3])["num"] == 20                       # what the APIs allow


def test_wiki_as_it_was(call, site):
    text = call("wiki", "Ada Lovelace", "2015-06-30")
    assert text.startswith("Ada Lovelace, revision of 2015-06-01") and "Text of revision 7" in text
    assert "revision 9" in call("wiki", "de:Ada Lovelace") and site.seen[-1][1].startswith("/de/w/api.php?")
    assert call("wiki", "Nothing", "2001-01-01") == "ERROR[not_found]: no article 'Nothing' on 2001-01-01"
    assert call("wiki", "Ada", "last year").startswith("ERROR[bad_date]")
    assert call("wiki", "Busy").startswith("ERROR[bad_answer]")            # and is not kept as "no article"
    assert all("Busy" not in r for r, in call.web.cache.db.execute("SELECT request FROM answers"))


def test_archive(call, site):
    assert "How it was in 2010." in call("archive", "http://x.org/", "2010-01-01")
    assert parse_qs(urlsplit(site.seen[-2][1]).query) == {"url": ["http://x.org/"], "timestamp": ["20100101"]}
    assert call("archive", "http://y.org/", "2010-01-01").startswith("ERROR[not_found]")


# ------------------------------------------------------------------------------------------------ files
def xlsx_bytes():
    from openpyxl import Workbook
    from openpyxl.styles import PatternFill
    book, out = Workbook(), io.BytesIO()
    book.active.title = "Plots"
    book.active["A1"], book.active["B1"], book.active["B2"] = "Ann", 7, "=B1*2"
    book.active["C3"].fill = PatternFill("solid", fgColor="FF00FF00")
    book.create_sheet("Other")["A1"] = "elsewhere"
    book.save(out)
    return out.getvalue()


def pptx_bytes():
    from pptx import Presentation
    show, out = Presentation(), io.BytesIO()
    slide = show.slides.add_slide(show.slide_layouts[1])
    slide.shapes.title.text, slide.placeholders[1].text = "A title", "with crustaceans"
    show.save(out)
    return out.getvalue()


def zip_bytes():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("inner/a.txt", "12345")
    return out.getvalue()


FILES = {
    "a.txt": (b"plain \xc3\xa9", ["plain \u00e9"]), "latin.txt": ("caf\u00e9".encode("latin-1"), ["caf\u00e9"]),
    "utf16.txt": ("caf\u00e9".encode("utf-16"), ["caf\u00e9"]), "a.csv": (b"x,y\n1,2\n", ["x,y\n1,2"]),
    "a.json": (b'{"k": [1]}', ['{"k": [1]}']), "a.jsonl": (b'{"k": 1}\n{"k": 2}\n', ['{"k": 2}']),
    "a.xml": (b"<a><b>t</b></a>", ["<b>t</b>"]), "a.html": (HTML.encode(), ["# Heading", "| Ann | 41 |"]),
    "a.py": (b"print(1)\n", ["print(1)"]), "a.pdb": (b"ATOM      1  N   GLY A   1", ["ATOM      1  N"]),
    "a.jsonld": (b'{"@id": "x"}', ['"@id"']), "a.pdf": (lambda: pdf_bytes("Cats.", "Dogs."), ["[page 2 of 2]\nDogs."]),
    "a.docx": (lambda: docx_bytes("Owls."), ["# A report", "Owls.", "| left | right |"]),
    "a.pptx": (pptx_bytes, ["# A title", "with crustaceans"]), "a.zip": (zip_bytes, ["inner/a.txt (5 bytes)"]),
    "a.xlsx": (xlsx_bytes,
               ["A1=Ann | B1=7", "B2==B1*2", "C3= [fill FF00FF00]", "A1=elsewhere", "sheets: Plots, Other"])}


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_type(call, name):
    content, expected = FILES[name]
    (call.folder / name).write_bytes(content() if callable(content) else content)
    text = call("read_file", name)
    assert text.startswith(f"{name} (page 1/1)\n") and all(part in text for part in expected), text


def test_one_sheet_and_its_absence(call):
    (call.folder / "a.xlsx").write_bytes(xlsx_bytes())
    assert "Ann" not in call("read_file", "a.xlsx", sheet="Other")
    assert call("read_file", "a.xlsx", sheet="Nope").startswith("ERROR[unreadable]")


@pytest.mark.parametrize("name, content", [
    ("a.pdf", b"%PDF-1.4 broken"), ("a.docx", b"PK broken"), ("a.xlsx", b""), ("a.zip", b"x"), ("a.bin", b"\0\1\2"),
    ("a.png", b"\x89PNG\0")])
def test_broken_files_are_text(call, name, content):
    (call.folder / name).write_bytes(content)
    assert call("read_file", name).startswith("ERROR[unreadable]")


def test_a_zip_bomb_is_not_unpacked():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(11):
            archive.writestr(f"word/{i}.xml", b"\0" * 50 * 2**20)
    with pytest.raises(WebError, match="unpacks to more"):
        to_text(out.getvalue(), ".docx")


def test_a_parser_that_hangs_is_ended():
    with pytest.raises(WebError, match="timeout"):
        to_text(pdf_bytes("x"), ".pdf", seconds=0.01)


@pytest.mark.parametrize("path", [
    "../secret", "/etc/passwd", "link", "folder/../../secret", "linked/secret", "pipe", "", ".", "folder", "nothing"])
def test_only_files_below_the_folder(call, path, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret").write_text("s3cret")
    (call.folder / "link").symlink_to(outside / "secret")
    (call.folder / "linked").symlink_to(outside)
    (call.folder / "folder").mkdir()
    os.mkfifo(call.folder / "pipe")
    for name, more in [("read_file", ()), ("ask_image", ("what?",))]:
        assert call(name, path, *more).startswith("ERROR[no_file]")


def test_where_the_sandbox_hides_the_folder_attachments_and_downloads_are_read_by_name(call, site):
    call.context.workdir, call.context.files = None, {"a.txt": b"from memory", "b.csv": call.folder / "host.csv"}
    (call.folder / "host.csv").write_text("x,y")
    assert "from memory" in call("read_file", "a.txt") and "x,y" in call("read_file", "b.csv")
    assert call("read_file", "host.csv").startswith("ERROR[no_file]: host.csv: only attachments and downloads")
    assert call("download", site.url + "/doc.pdf").startswith("kept as doc.pdf")
    assert "about cats" in call("read_file", "doc.pdf") and call("read_file", "../a.txt").startswith("ERROR[no_file]")


def test_what_the_rollout_fills_in_after_binding_reaches_the_tool(call):
    context = ToolContext()
    bound = tools.replace(tools.read_file, web=call.web).bind(context)
    context.workdir = call.folder
    (call.folder / "a.txt").write_text("late")
    assert "late" in bound("a.txt")


def test_download_writes_only_new_files_in_the_folder(call, site, monkeypatch):
    said = call("download", site.url + "/doc.pdf")
    assert said == f"saved as doc.pdf ({(call.folder / 'doc.pdf').stat().st_size} bytes)"
    assert "about cats" in call("read_file", "doc.pdf")
    monkeypatch.setattr(site, f"page_{'ab' * 50}_txt", site.page_long, raising=False)
    assert call("download", f"{site.url}/{'ab' * 50}.txt").startswith(f"saved as {'ab' * 38}.txt ")    # 80 characters
    assert call("download", site.url + "/doc.pdf").startswith("ERROR[no_file]: doc.pdf: File exists")
    outside = Path("/tmp/should-not-exist-tool-r1")
    (call.folder / "page.html").symlink_to(outside)
    assert call("download", site.url + "/hop").startswith("ERROR[no_file]") and not outside.exists()


# ------------------------------------------------------------------------------------------------ image and sound
def test_image_and_audio_requests_byte_for_byte(call, site, monkeypatch):
    chat = {"choices": [{"message": {"content": "a red cube"}}]}
    monkeypatch.setattr(site, "page_v1_chat_completions", site.search(chat), raising=False)
    monkeypatch.setattr(site, "page_v1_audio_transcriptions", site.search({"text": "hello"}), raising=False)
    for kind in ("VISION", "AUDIO"):
        monkeypatch.setenv(f"{kind}_URL", site.url + "/v1")
        monkeypatch.setenv(f"{kind}_MODEL", f"{kind.lower()}-model")
        monkeypatch.setenv(f"{kind}_API_KEY", "the-secret-key")
    image, sound = bytes(range(256)), b"ID3\0sound"
    (call.folder / "a.jpg").write_bytes(image)
    (call.folder / "a.mp3").write_bytes(sound)
    assert call("ask_image", "a.jpg", "What is it?") == "a red cube"
    *_, headers, body = site.seen[-1]
    assert headers["Authorization"] == "Bearer the-secret-key"
    fixed = {"model": "vision-model", "temperature": 0, "max_tokens": 512}
    assert json.loads(body) == fixed | {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(image).decode()}}]}]}
    assert call("transcribe", "a.mp3") == "hello"
    _, path, headers, body = site.seen[-1]
    edge = headers["Content-Type"].split("boundary=")[1].encode()
    parts = body.split(b"--" + edge)
    assert path == "/v1/audio/transcriptions" and headers["Authorization"] == "Bearer the-secret-key"
    assert parts[-1] == b"--\r\n"
    assert parts[1] == b'\r\nContent-Disposition: form-data; name="model"\r\n\r\naudio-model\r\n'
    assert parts[2] == (b'\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\n\r\n' + sound + b"\r\n")
    before = len(site.seen)
    assert call("ask_image", "a.jpg", "What is it?") == "a red cube" and len(site.seen) == before      # kept


# ------------------------------------------------------------------------------------------------ record and replay
def test_record_then_replay_without_the_web_and_without_keys(site, tmp_path, monkeypatch):
    from dataclasses import replace
    file = str(tmp_path / "web.sqlite")
    monkeypatch.setenv("SERPER_API_KEY", "the-secret-key")
    hit = {"title": "T", "link": "http://a.org", "snippet": "S"}
    monkeypatch.setattr(site, "page_serper", site.search({"organic": [hit]}), raising=False)
    point(monkeypatch, "serper", site.url + "/serper")

    def answers(mode):
        made, log = Web(Cache(file, mode), allow_loopback=True, seconds=2), []
        calls = [("web_search", ("cats",)), ("visit", (site.url + "/page.html",)), ("visit", (site.url + "/nothing",))]
        return [replace(getattr(tools, n), web=made, log=log).bind(ToolContext())(*a) for n, a in calls], made, log
    recorded, made, log = answers("record")
    assert [c.hits for c in log] == [0, 0, 0] and [c.outcome for c in log] == ["ok", "ok", "http_404"]
    again, _, log = answers("record")
    assert again == recorded and [c.hits for c in log] == [1, 1, 1]
    monkeypatch.delenv("SERPER_API_KEY")
    before = len(site.seen)
    replayed, replay, _ = answers("replay")
    assert replayed == recorded and len(site.seen) == before and replay.cache.digest() == made.cache.digest()
    missed = replace(visit, web=replay).bind(ToolContext())(site.url + "/long")
    assert missed == "ERROR[cache_miss]: this was not recorded, and the web is closed"
    assert replay.cache.counts["misses"] == 1 and len(site.seen) == before
    assert b"the-secret-key" not in Path(file).read_bytes()


def test_hits_are_counted_for_each_call_alone(call):
    @tool
    def twice(key: str, context: ToolContext) -> str:
        """Ask for one thing two times."""
        return "".join(context.web.answer("t", {"key": key}, "b", lambda: key) for _ in range(2))
    log = []
    own, shared = ToolContext(web=call.web), ToolContext()
    bound = [tools.replace(twice, log=log).bind(own), tools.replace(twice, log=log, web=call.web).bind(shared)]
    assert [made(key) for made in bound for key in "ab"] == ["aa", "bb"] * 2
    assert [c.hits for c in log] == [1, 1, 2, 2] and not call.web.hits


def test_429_and_5xx_are_never_kept(site, tmp_path):
    made = Web(Cache(str(tmp_path / "c.sqlite"), "record"), allow_loopback=True, seconds=2)
    with pytest.raises(WebError, match="http_429"):
        made.fetch(site.url + "/busy")
    assert made.fetch(site.url + "/busy")[2] == b"fine"
    with pytest.raises(WebError, match="timeout|network"):
        Web(made.cache, allow_loopback=True, seconds=0.3).fetch(site.url + "/slow")
    assert made.cache.db.execute("SELECT count(*) FROM answers").fetchone() == (1,)


def test_equal_requests_at_once_are_made_once(tmp_path):
    cache, made, results = Cache(str(tmp_path / "c.sqlite"), "record"), [], []

    def make():
        made.append(1)
        time.sleep(0.2)
        return "answer"

    def fail():
        made.append(1)
        time.sleep(0.2)
        raise WebError("http_500", "x")

    def ask():
        results.append(cache.answer("t", {"a": 1}, "b", make))
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == ["answer"] * 8 and len(made) == 1

    def failing():
        with pytest.raises(WebError):
            cache.answer("t", {"a": 2}, "b", fail)
        results.append("failed")
    threads = [threading.Thread(target=failing) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results[8:] == ["failed"] * 4 and len(made) == 2 and not cache.flights
    assert cache.answer("t", {"a": 2}, "b", lambda: "later") == "later"     # a failure is not kept


def test_the_key_of_an_answer_is_all_of_tool_arguments_backend_and_version(tmp_path, monkeypatch):
    cache = Cache(str(tmp_path / "c.sqlite"), "record")
    assert [cache.answer(t, {"a": a}, b, lambda: f"{t}{a}{b}") for t in "xy" for a in "xy" for b in "xy"] == [
        t + a + b for t in "xy" for a in "xy" for b in "xy"]
    monkeypatch.setattr(web, "VERSION", "2")
    assert cache.answer("x", {"a": "x"}, "x", lambda: "new") == "new"


def test_the_preflight_says_what_is_live_and_why_not(monkeypatch):
    for variable in ("VISION_URL", "VISION_MODEL", "AUDIO_URL", "AUDIO_MODEL"):
        monkeypatch.delenv(variable, raising=False)
    rows = {t.name: why for t, why in preflight(Web())}
    assert list(rows) == ["web_search", "visit", "find", "wiki", "archive", "download", "read_file", "ask_image",
                          "transcribe"]
    assert rows["ask_image"] == "VISION_URL is not set; VISION_MODEL is not set" and not rows["visit"]
    monkeypatch.setattr(tools, "find_spec", lambda name: None)              # as where the package is not installed
    rows = {t.name: why for t, why in preflight(Web())}
    assert rows["visit"] == "no markitdown, pypdf, openpyxl: pip install -r requirements-gaia.txt"
    assert not rows["web_search"] and not rows["download"]
    assert [t.name for t in load_tools("web")] == ["web_search", "download"]


def test_the_table_asks_each_web_tool_once_and_shows_the_runs_own_tools_alone(site, monkeypatch, tmp_path):
    for variable in ("SERPER_API_KEY", "BRAVE_API_KEY", "TAVILY_API_KEY", "VISION_URL", "AUDIO_URL", "AUDIO_MODEL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SEARXNG_URL", site.url)
    monkeypatch.setattr(site, "page_search", site.search({"results": []}), raising=False)
    monkeypatch.setattr(tools, "CALLS", tools.CALLS | {"visit": (f"{site.url}/page.html",)})
    recorded = Web(Cache(str(tmp_path / "c.sqlite"), "record"), allow_loopback=True, seconds=2, wayback=site.url,
                   wikipedia="http://127.0.0.1:9/{}")
    own = [t for t in load_tools("web", recorded) if t.name in ("web_search", "visit", "wiki", "read_file")]
    earlier = len(site.seen)
    table = preflight_table(own, recorded, ask=True)
    rows = dict(line.split(maxsplit=1) for line in table.splitlines())
    assert rows["web_search"] == rows["visit"] == rows["read_file"] == "live"
    assert rows["wiki"].startswith("does not answer: ERROR[network]")
    assert rows["ask_image"].startswith("left out: VISION_URL is not set")
    assert set(rows) == {"web_search", "visit", "wiki", "read_file", "ask_image", "transcribe"}
    assert len([path for _, path, *_ in site.seen[earlier:] if path.startswith("/search")]) == 1
    assert not recorded.cache.db.execute("SELECT * FROM answers").fetchall()            # nothing of it is recorded
    asked = len(site.seen)
    assert "does not answer" not in preflight_table(own, recorded, ask=False) and len(site.seen) == asked
    assert preflight_table(load_tools(None, recorded), recorded, ask=True) == ""         # the tiny model's run
    monkeypatch.setattr(tools, "back_end_answer", lambda made: "ERROR[http] " + "long " * 100)
    long = dict(line.split(maxsplit=1) for line in preflight_table(own, recorded, ask=True).splitlines())["wiki"]
    assert len(long) == len("does not answer: ") + 100


def test_cache_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_web("live").cache.mode == "live"
    assert open_web("record:a.db").cache.mode == "record" and Path("a.db").exists()
    assert open_web("replay:a.db").cache.mode == "replay"
    Path("notes.txt").write_text("these are no answers of the web\n" * 9)
    for bad, words in (("off", "--cache off: "), ("replay:none.db", "--cache replay:none.db: "),
                       ("replay", "--cache replay: "), ("record:no/folder/a.db", "no/folder/a.db cannot be used"),
                       ("replay:notes.txt", "notes.txt cannot be used")):
        with pytest.raises(UserError, match=words):
            open_web(bad)


def test_an_answer_that_a_full_disk_cannot_keep_serves_all_the_same(tmp_path, capsys):
    file = tmp_path / "a.db"
    cache = Cache(str(file), "record")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, limit[1]))
    try:
        assert cache.answer("x", {}, "b", lambda: "paid for" * 9999) == "paid for" * 9999
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "not kept in the record" in capsys.readouterr().err
    assert cache.answer("x", {}, "b", lambda: "again") == cache.answer("x", {}, "b", lambda: "lost") == "again"


# ------------------------------------------------------------------------------------------------ nothing escapes
@pytest.mark.parametrize("url", [
    "http://[::1", "http://a b/", "http://\x00/", "http://" + "a" * 300 + ".org/", "http://..//", "http://x:99999/",
    "http://ex\u0430mple.\ud800/", "", " ", "\n", "http://%zz/", "http://a.org:port/"])
def test_no_address_raises_into_a_rollout(call, url):
    assert call("visit", url).startswith("ERROR[")


def test_a_bug_in_a_tool_is_text_and_a_users_error_is_the_users(call, monkeypatch, site):
    monkeypatch.setenv("SERPER_API_KEY", "the-secret-key")
    monkeypatch.setattr(site, "page_serper", site.search([1, 2]), raising=False)      # not what Serper answers
    point(monkeypatch, "serper", site.url + "/serper")
    assert call("web_search", "x") == "ERROR[failed]: AttributeError"

    @tool
    def divide(x: int) -> float:
        """Divide."""
        return 1 / x
    with pytest.raises(ZeroDivisionError):
        divide.bind(ToolContext())(0)


def test_timers_and_sockets_of_a_fetch_do_not_stay(site):
    before, web = threading.active_count(), Web(allow_loopback=True, seconds=30)
    for i in range(10):
        web.fetch(f"{site.url}/page.html?{i}")
    assert sum(isinstance(t, threading.Timer) and not t.finished.is_set() for t in threading.enumerate()) == 0
    assert threading.active_count() <= before + 10


def test_a_parser_sees_no_keys(monkeypatch, tmp_path):
    monkeypatch.setenv("SERPER_API_KEY", "the-secret-key")
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nenv\n")
    script.chmod(0o755)
    monkeypatch.setattr(documents.sys, "executable", str(script))
    assert "secret" not in to_text(b"x", ".html")


def test_replayed_images_need_neither_key_nor_model(call, tmp_path, monkeypatch):
    file = str(tmp_path / "web.sqlite")
    (call.folder / "a.png").write_bytes(b"\x89PNG")
    recorded = Web(Cache(file, "record"))
    recorded.cache.answer("ask_image", {"image": hashlib.sha256(b"\x89PNG").hexdigest(), "question": "q"}, "m",
                          lambda: "blue")
    for variable in ("VISION_URL", "VISION_MODEL"):
        monkeypatch.delenv(variable, raising=False)
    replay = Web(Cache(file, "replay"))
    assert call("ask_image", "a.png", "q", over=replay) == "blue"
    assert call("ask_image", "a.png", "other", over=replay).startswith("ERROR[cache_miss]")
    assert not dict((t.name, why) for t, why in preflight(replay))["ask_image"]
