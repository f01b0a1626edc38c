"""Tools: plain typed functions that the policy's code may call, and the two exceptions everybody shares.

Owns `@tool`, the checks of a definition and of every call, the built-in web and file tools, loading a user's own,
and how every command line ends.

Read in this order: `tool` (a function becomes a Tool), `Tool.bind` (what a call does), the nine tools, `load_tools`.

A tool runs on the host, outside the sandbox: keys and the network stay there, and every argument that comes
from the sandbox is checked against the type hints before the function sees it. The built-in ones return text
and never raise into a rollout: what goes wrong is returned as `ERROR[kind]: ...`, for the model to read. How
they reach the web, and what they may not reach, is in web.py.
"""
import base64
import builtins
import hashlib
import inspect
import keyword
import mimetypes
import os
import re
import runpy
import sqlite3
import stat
import threading
import time
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Union, get_args, get_origin
from urllib.parse import quote, urljoin, urlsplit

from executor import ToolError
from machinery.cli import UserError
from machinery.web import AGENT, Cache, Web, WebError, bearer, benchmark_site, chat, holds_benchmark, to_text


@dataclass
class ToolContext:
    """What a tool may know of its trajectory. One per trajectory; the rollout fills it in as it goes."""
    workdir: Path | None = None                             # where the code works, if the host can see that
    state: dict = field(default_factory=dict)               # a tool's memory, kept for the trajectory
    seconds_left: Callable[[], float] = lambda: 30.0        # until the step's time is up
    question: str = ""
    files: Mapping[str, Path | bytes] = field(default_factory=dict)    # the task's attachments
    web: Web | None = None                                  # what the built-in tools of a run share


@dataclass
class Call:
    """One call of a tool, for reports."""
    question: str
    tool: str
    arguments: str
    outcome: str            # "ok", or the kind of error
    hits: int               # answers that came from the cache
    seconds: float


PLAIN = {str, int, float, bool, list, dict, type(None), Any}
RESERVED = set(dir(builtins)) | set(keyword.kwlist) | {"final_answer"}


def fits(value, hint) -> bool:
    """Whether a value off the wire (JSON) is of the hinted type. An int passes for a float, a bool for neither."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is Literal:
        return any(type(value) is type(a) and value == a for a in args)
    if origin is list:
        return isinstance(value, list) and all(fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def known(hint) -> bool:
    """Whether `fits` can check the hint: plain JSON types, list[...], dict[...], unions and Literal of them."""
    if get_origin(hint) is Literal:
        return all(type(a) in PLAIN for a in get_args(hint))
    if get_origin(hint) in (list, dict, Union, types.UnionType):
        return all(known(a) for a in get_args(hint))
    return hint in PLAIN


@dataclass(frozen=True)
class Tool:
    name: str
    function: Callable
    prompt: str                          # "name(argument: type = default) -> type: docstring"
    signature: inspect.Signature         # as the model sees it: without the context, with resolved types
    context: str | None = None           # the parameter that receives the ToolContext
    web: Web | None = None               # what the run's tools share
    log: list[Call] | None = None        # where calls are noted, for reports

    def bind(self, context: ToolContext) -> Callable:
        """A function for one trajectory: checks its arguments (ToolError if they do not fit), calls the tool."""
        if self.web:
            context.web = self.web

        def call(*args, **kwargs):
            arguments, begin, outcome = self.checked(*args, **kwargs), time.monotonic(), "failed"
            here = context.web.cache.here if context.web else threading.local()
            here.hits = 0
            try:
                result = self.function(**arguments, **({self.context: context} if self.context else {}))
                outcome = "ok"
                return result
            except WebError as error:
                outcome = error.kind
                return str(error)
            except Exception as error:
                if self.web is None:
                    raise    # a user's own tool: its error reaches the model's code
                return f"ERROR[failed]: {type(error).__name__}"    # its text may hold what is not the model's
            finally:
                if self.log is not None:
                    spent = time.monotonic() - begin
                    self.log.append(Call(context.question, self.name, repr(arguments)[:500], outcome, here.hits, spent))
        call.__name__ = self.name
        return call

    def checked(self, *args, **kwargs) -> dict:
        try:
            arguments = self.signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise ToolError(f"{self.name}: {error}; it is {self.name}{self.signature}") from None
        for name, value in arguments.items():
            hint = self.signature.parameters[name].annotation
            if not fits(value, hint):
                wanted = inspect.formatannotation(hint)
                raise ToolError(f"{self.name}: {name} must be {wanted}, not {type(value).__name__}")
        return arguments


def tool(function: Callable) -> Tool:
    """Make a Tool of a typed function with a docstring. UserError at once if the definition is wrong.

    A parameter annotated ToolContext is filled in by the host and hidden from the model.
    """
    name = function.__name__
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,40}", name) or name in RESERVED:
        raise UserError(f"tool {name}: its name must be lower-case letters, digits and _, and not Python's")
    if not (docstring := inspect.getdoc(function)):
        raise UserError(f"tool {name}: it needs a docstring, which is what the model reads")
    hints, context, visible = typing.get_type_hints(function), None, []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints.get(parameter.name)
        if hint is ToolContext:
            context = parameter.name
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise UserError(f"tool {name}: *{parameter.name} cannot be checked; name every argument")
        elif hint is None or not known(hint):
            raise UserError(f"tool {name}: argument {parameter.name} needs a type hint made of str, int, "
                            "float, bool, list, dict, None, Literal")
        elif parameter.default is not parameter.empty and not fits(parameter.default, hint):
            raise UserError(f"tool {name}: the default of {parameter.name} is not of its type")
        else:
            visible.append(parameter.replace(annotation=hint))
    if "return" not in hints:
        raise UserError(f"tool {name}: it needs a return type")
    signature = inspect.Signature(visible, return_annotation=hints["return"])
    return Tool(name, function, f"{name}{signature}: {docstring}", signature, context)


# -------------------------------------------------------------------------------------------- pages and files
PAGE = 8000                              # characters of a page of text, about 2,000 tokens
MAX_FILE = 50 * 2**20                    # bytes of a file that a tool reads
# In the order of preference: key or address in the environment, API, where its answer has the hits, and their names
# for title, link and text.
SEARCHES = {
    "serper": ("SERPER_API_KEY", "https://google.serper.dev/search", ["organic"], ("title", "link", "snippet")),
    "brave": ("BRAVE_API_KEY", "https://api.search.brave.com/res/v1/web/search", ["web", "results"],
              ("title", "url", "description")),
    "tavily": ("TAVILY_API_KEY", "https://api.tavily.com/search", ["results"], ("title", "url", "content")),
    "searxng": ("SEARXNG_URL", "", ["results"], ("title", "url", "content")),
    "wikipedia": ("", "", ["query", "search"], ("title", "title", "snippet")),    # without a key: the last
}


def paged(text: str, page: int, head: str) -> str:
    """One page of a long text, cut at line ends, under a line that says which of how many."""
    starts = [0]
    while starts[-1] + PAGE < len(text):
        line_end = text.rfind("\n", starts[-1] + PAGE // 2, starts[-1] + PAGE)
        starts.append(line_end + 1 if line_end > 0 else starts[-1] + PAGE)
    if not 1 <= page <= len(starts):
        raise WebError("no_page", f"there are pages 1 to {len(starts)}")
    begin, end = starts[page - 1], [*starts, len(text)][page]
    return f"{head} (page {page}/{len(starts)})\n{text[begin:end].strip()}"


def document(context: ToolContext, body: bytes, suffix: str, sheet: str = "") -> str:
    """The text of a document, parsed once a trajectory. WebError if it is the benchmark itself."""
    texts = context.state.setdefault("documents", {})
    key = (hashlib.sha256(body).digest(), suffix, sheet)
    if key not in texts:
        texts[key] = to_text(body, suffix, sheet, min(60.0, max(context.seconds_left(), 1.0)))
    refuse_benchmark(context, texts[key])
    return texts[key]


def refuse_benchmark(context: ToolContext, text: str):
    if holds_benchmark(text, context.question):
        context.web.counts["benchmark"] += 1
        raise WebError("blocked", "this page holds the benchmark itself")


def suffix_of(kind: str, url: str, body: bytes) -> str:
    """What the file would be called, by its first bytes, its content type, its address."""
    kind, named = kind.split(";")[0].strip().lower(), PurePosixPath(urlsplit(url).path).suffix.lower()
    if body[:5] == b"%PDF-":
        return ".pdf"
    if "html" in kind or body[:256].lstrip()[:9].lower() == b"<!doctype":
        return ".html"
    if office := re.search("(wordprocessing|presentation|spreadsheet)ml", kind):    # Python's list lacks them
        return {"wordprocessing": ".docx", "presentation": ".pptx", "spreadsheet": ".xlsx"}[office[1]]
    vague = kind in ("", "application/octet-stream", "application/zip", "binary/octet-stream")
    return named if vague else mimetypes.guess_extension(kind) or named


def page_text(context: ToolContext, url: str) -> tuple[str, str]:
    """(final address, Markdown with absolute links) of a page of the web."""
    address, kind, body = context.web.fetch(url, context.seconds_left())
    text = document(context, body, suffix_of(kind, address, body))
    relative = r"\]\((?!https?:|mailto:|#)([^)\s]+)"
    return address, re.sub(relative, lambda m: f"]({urljoin(address, m[1])}", text)


def file_bytes(context: ToolContext, path: str) -> bytes:
    """A file below the working directory; where the sandbox hides that, an attachment or a download by name."""
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise WebError("no_file", "give a path relative to the working directory")
    if context.workdir is not None:
        return open_below(context.workdir, parts)
    known = {**context.files, **context.state.get("downloads", {})}
    if (found := known.get("/".join(parts))) is None:
        names = ", ".join(known) or "none"
        raise WebError("no_file", f"{path}: only attachments and downloads can be read: {names}")
    return found if isinstance(found, bytes) else Path(found).read_bytes()[:MAX_FILE]


def open_below(folder: Path, parts: tuple[str, ...]) -> bytes:
    """The content of a regular file, reached part by part without following links: the sandboxed code, which
    can write there, may put a link to a file of the host in the way at any moment."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for i, part in enumerate(parts):
            kind = os.O_DIRECTORY if i + 1 < len(parts) else 0
            inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | kind, dir_fd=handle)
            os.close(handle)
            handle = inner
        if not stat.S_ISREG(os.fstat(handle).st_mode) or os.fstat(handle).st_size > MAX_FILE:
            raise WebError("no_file", f"{parts[-1]} is no regular file of at most {MAX_FILE // 2**20} MiB")
        with os.fdopen(os.dup(handle), "rb") as file:
            return file.read(MAX_FILE)
    except OSError as error:
        raise WebError("no_file", f"{'/'.join(parts)}: {error.strerror}") from error
    finally:
        os.close(handle)


def search_request(backend: str, web: Web, query: str, k: int, year: int, site: str) -> tuple[str, dict]:
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


# --------------------------------------------------------------------------------------------- the nine tools
@tool
def web_search(context: ToolContext, query: str, k: int = 5, year: int = 0, site: str = "") -> str:
    """Search the web: the k best hits with title, address and text. year, site: restrict to them if given."""
    live = next((name for name, (variable, *_) in SEARCHES.items() if os.environ.get(variable)), "wikipedia")
    web, backend = context.web, context.web.cache.backend_of("web_search", live)
    url, request = search_request(backend, web, query, min(k, 20), year, site)

    def pick(answer: dict) -> list:
        _, _, path, names = SEARCHES[backend]
        for step in path:
            answer = answer.get(step) or {}
        return [[str(hit.get(name) or "") for name in names] for hit in answer]
    arguments = {"query": query, "k": k, "year": year, "site": site}
    lines = []
    for title, link, text in web.ask("web_search", arguments, backend, url, pick, **request)[:k]:
        if backend == "wikipedia":
            link = web.wikipedia.format("en") + "/wiki/" + quote(title.replace(" ", "_"))
            text = re.sub("<.*?>", "", text)
        if benchmark_site(link) or holds_benchmark(text, context.question):
            web.counts["benchmark"] += 1
        else:
            lines.append(f"{len(lines) + 1}. {title}\n   {link}\n   {text[:500]}")
    return "\n".join(lines) or "no hits"


@tool
def visit(context: ToolContext, url: str, page: int = 1) -> str:
    """Read a web page (HTML, PDF, Office files) as Markdown with its links, 8,000 characters at a time."""
    address, text = page_text(context, url)
    return paged(text, page, address)


@tool
def find(context: ToolContext, url: str, text: str) -> str:
    """The places where a web page or PDF contains the text, with what stands around them."""
    _, whole = page_text(context, url)
    places = [m.start() for m in re.finditer(re.escape(text), whole, re.IGNORECASE)]
    shown = [f"...{whole[max(p - 200, 0):p + 300]}..." for p in places[:8]]
    return f"{len(places)} places" + "".join("\n---\n" + s for s in shown)


@tool
def wiki(context: ToolContext, title: str, date: str = "", page: int = 1) -> str:
    """A Wikipedia article ("de:Berlin": another language), as it stood on date="YYYY-MM-DD" if given."""
    language, name = re.fullmatch(r"(?:([a-z]{2,3}):)?(.*)", title, re.DOTALL).groups()
    if date and not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        raise WebError("bad_date", "write the date as YYYY-MM-DD")
    api = context.web.wikipedia.format(language or "en") + "/w/api.php"
    common = {"format": "json", "formatversion": 2}
    until = {"rvstart": f"{date}T23:59:59Z", "rvdir": "older"} if date else {}

    def newest(answer: dict) -> list:
        found = (answer.get("query", {}).get("pages") or [{}])[0]
        if not found.get("revisions"):
            raise WebError("not_found", f"no article {name!r}" + (f" on {date}" if date else ""), keep=True)
        return [found["title"], found["revisions"][0]["revid"], found["revisions"][0]["timestamp"]]
    name, revision, stamp = context.web.ask(
        "wiki", {"title": title, "date": date}, "mediawiki", api, newest, headers={"User-Agent": AGENT},
        params={"action": "query", "prop": "revisions", "titles": name, "redirects": 1, "rvlimit": 1,
                "rvprop": "ids|timestamp", **until, **common})
    html = context.web.ask("wiki", {"revision": revision, "language": language}, "mediawiki", api,
                           lambda answer: answer["parse"]["text"], headers={"User-Agent": AGENT},
                           params={"action": "parse", "oldid": revision, "prop": "text", **common})
    return paged(document(context, html.encode(), ".html"), page, f"{name}, revision of {stamp}")


@tool
def archive(context: ToolContext, url: str, date: str, page: int = 1) -> str:
    """A web page as the Wayback Machine kept it nearest to the date, "YYYY-MM-DD"."""
    def closest(answer: dict) -> str:
        found = (answer.get("archived_snapshots") or {}).get("closest") or {}
        if not found.get("url"):
            raise WebError("not_found", "the archive has no copy", keep=True)
        return re.sub(r"(/web/\d+)/", r"\1id_/", found["url"])    # id_: without the archive's frame
    api, arguments = context.web.wayback + "/wayback/available", {"url": url, "date": date}
    copy = context.web.ask("archive", arguments, "wayback", api, closest,
                           params={"url": url, "timestamp": re.sub(r"\D", "", date)})
    address, text = page_text(context, copy)
    return paged(text, page, address)


@tool
def download(context: ToolContext, url: str) -> str:
    """Save a file of the web in the working directory; returns its name."""
    address, _, body = context.web.fetch(url, context.seconds_left())
    refuse_benchmark(context, body.decode(errors="replace"))    # where code can open it, read_file's check is too late
    name = re.sub(r"[^\w.-]", "_", PurePosixPath(urlsplit(address).path).name).lstrip(".")[-80:] or "download"
    if context.workdir is None:
        context.state.setdefault("downloads", {})[name] = body
        return f"kept as {name} ({len(body)} bytes) for read_file, ask_image, transcribe; code cannot open it"
    try:
        handle = os.open(context.workdir / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise WebError("no_file", f"{name}: {error.strerror}") from error
    with os.fdopen(handle, "wb") as file:
        file.write(body)
    return f"saved as {name} ({len(body)} bytes)"


@tool
def read_file(context: ToolContext, path: str, page: int = 1, sheet: str = "") -> str:
    """Read a file of the working directory as text: txt, csv, json, xml, html, py, pdf, docx, pptx, xlsx
    (values and fill colours; sheet: one of them), zip (what is in it)."""
    body, suffix = file_bytes(context, path), PurePosixPath(path).suffix.lower()
    return paged(document(context, body, suffix, sheet), page, path)


@tool
def ask_image(context: ToolContext, path: str, question: str) -> str:
    """Ask a question about an image file of the working directory."""
    body, (url, model, key) = file_bytes(context, path), endpoint("VISION")
    data = f"data:{mimetypes.guess_type(path)[0] or 'image/png'};base64,{base64.b64encode(body).decode()}"
    content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": data}}]
    arguments = {"image": hashlib.sha256(body).hexdigest(), "question": question}
    cache = context.web.cache
    return cache.answer("ask_image", arguments, cache.backend_of("ask_image", model),
                        lambda: chat(url, model, [{"role": "user", "content": content}], key))


@tool
def transcribe(context: ToolContext, path: str) -> str:
    """The spoken words of an audio file of the working directory."""
    body, (url, model, key) = file_bytes(context, path), endpoint("AUDIO")
    return context.web.ask(
        "transcribe", {"audio": hashlib.sha256(body).hexdigest()}, context.web.cache.backend_of("transcribe", model),
        url.rstrip("/") + "/audio/transcriptions", lambda answer: answer["text"], headers=bearer(key),
        data={"model": model}, files={"file": (PurePosixPath(path).name, body)})


def endpoint(kind: str) -> list[str]:
    """Address, model and key of an OpenAI-compatible server, as the environment names them."""
    return [os.environ.get(f"{kind}_{part}", "") for part in ("URL", "MODEL", "API_KEY")]


# -------------------------------------------------------------------------------------- which tools a run has
READERS = ["markitdown", "pypdf", "openpyxl"]
NEEDS: list[tuple[Tool, list[str], list[str]]] = [    # tool, packages, variables of the environment
    (web_search, [], []), (visit, READERS, []), (find, READERS, []), (wiki, READERS, []),
    (archive, READERS, []), (download, [], []), (read_file, READERS, []),
    (ask_image, [], ["VISION_URL", "VISION_MODEL"]), (transcribe, [], ["AUDIO_URL", "AUDIO_MODEL"])]


def open_web(spec: str) -> Web:
    """The web of a run, from a flag: live, record[:FILE] or replay[:FILE]. UserError for anything else."""
    mode, _, file = spec.partition(":")
    if mode not in ("live", "record", "replay"):
        raise UserError(f"--cache {spec}: it is live, record[:FILE] or replay[:FILE]")
    if mode == "replay" and not Path(file or "web.sqlite").is_file():
        raise UserError(f"--cache {spec}: there is no such record")
    try:
        return Web(Cache(file or "web.sqlite", mode))
    except sqlite3.Error as error:
        raise UserError(f"--cache {spec}: the file cannot be used: {error}") from error


def preflight(web: Web) -> list[tuple[Tool, str]]:
    """The built-in tools, each with "" if it is live, else why it is left out of the prompt."""
    rows = []
    for made, packages, variables in NEEDS:
        if absent := ", ".join(p for p in packages if not find_spec(p)):
            why = f"no {absent}: pip install -r requirements-gaia.txt"
        elif web.cache.mode != "replay":
            why = "; ".join(f"{v} is not set" for v in variables if not os.environ.get(v))
        else:
            why = "nothing of it was recorded" if variables and not web.cache.backend_of(made.name) else ""
        rows.append((replace(made, web=web), why))
    return rows


def preflight_table(web: Web) -> str:
    return "\n".join(f"  {t.name:<12} {'left out: ' + why if why else 'live'}" for t, why in preflight(web))


def prompt_text(tools: list[Tool]) -> str:
    """The tools as the system prompt lists them, one a paragraph."""
    return "\n".join(t.prompt for t in tools)


def load_tools(spec: str | None, web: Web | None = None, beside: Iterable[Tool] = ()) -> list[Tool]:
    """Tools by name: "web" is the live built-in ones, FILE.py those that a file defines; commas between.

    `beside`, which a run has anyway, come first. UserError for an unusable file and for two tools of one name.
    """
    found = list(beside)
    for part in filter(None, (spec or "").split(",")):
        found += [t for t, why in preflight(web or Web()) if not why] if part == "web" else tools_of(part)
    names = [t.name for t in found]
    if twice := {n for n in names if names.count(n) > 1}:
        raise UserError(f"--tools: two tools are called {min(twice)}; rename yours")
    return found


def tools_of(file: str) -> list[Tool]:
    if not Path(file).is_file():
        raise UserError(f"--tools {file}: no such file")
    try:
        found = [v for v in runpy.run_path(file).values() if isinstance(v, Tool)]
    except UserError as error:
        raise UserError(f"--tools {file}: {error}") from error
    except Exception as error:    # whatever the user's own code does wrong, said in one line
        raise UserError(f"--tools {file}: {type(error).__name__}: {error}") from error
    if not found:
        raise UserError(f"--tools {file}: no function in it carries @tool")
    return found
