"""Tools: typed Python functions that the policy's code may call.

Owns `@tool`, the checks of a definition and of every call, the nine built-in tools, and the choice of a run's tools.

Read in this order: `tool` (a function becomes a Tool), `Tool.bind` (what a call does), the nine tools, `load_tools`.

A tool runs on the host, outside the sandbox: keys and the network stay there, and every argument that comes from the
sandbox is checked against the type hints before the function sees it. A built-in tool always returns text: what goes
wrong outside is `ERROR[kind]: ...`, for the model to read. How the built-in tools reach the web, read documents and ask
models, and what they may not reach, is in machinery/ (web.py, documents.py, api.py).
"""
import builtins
import inspect
import itertools
import keyword
import os
import re
import runpy
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from executor import ToolError
from machinery.api import ask_about_image, models_of, spoken_words
from machinery.cli import UserError
from machinery.documents import WebError, document, file_bytes, page_text, paged
from machinery.web import Cache, Web, article, open_web, search, snapshot


@dataclass
class ToolContext:
    """What a tool may know of its trajectory. One per trajectory; the rollout fills it in as it goes."""
    workdir: Path | None = None                             # where the code works, if the host can see that
    state: dict = field(default_factory=dict)               # a tool's memory, kept for the trajectory
    seconds_left: Callable[[], float] = lambda: 30.0        # until the time of the running cell is up
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


# ------------------------------------------------------------------------------------------- checks, and a tool
PLAIN = {str, int, float, bool, list, dict, type(None), Any}
RESERVED = {*dir(builtins), *keyword.kwlist, "final_answer"}


def known(hint) -> bool:
    """Whether `fits` can check the hint: plain JSON types, list[...], dict[...], unions and Literal of them."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return all(type(a) in PLAIN for a in args)
    if origin in (list, dict, Union, UnionType):
        return all(known(a) for a in args)
    return hint in PLAIN


def fits(value, hint) -> bool:
    """Whether a value off the wire (JSON) is of the hinted type. An int passes for a float, a bool for neither."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
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


@dataclass(frozen=True)
class Tool:
    name: str
    function: Callable
    prompt: str                          # "name(argument: type = default) -> type: docstring"
    signature: inspect.Signature         # as the model sees it: without the context, with resolved types
    context: str | None = None           # the parameter that receives the ToolContext
    web: Web | None = None               # what the run's built-in tools share; None for a user's own tool
    log: list[Call] | None = None        # where calls are noted, for reports

    def bind(self, context: ToolContext) -> Callable:
        """A function for one trajectory: checks its arguments (ToolError if they do not fit), calls the tool."""
        context.web = self.web or context.web

        def call(*args, **kwargs):
            arguments = self.checked(*args, **kwargs)
            note = Call(context.question, self.name, repr(arguments)[:500], "failed", 0, 0.0)
            # Each call has its own count of hits: an earlier one that ran out of time may still be running.
            web = replace(context.web, hits=[]) if context.web else None
            if self.context:
                arguments[self.context] = replace(context, web=web)
            begin = time.monotonic()
            try:
                result = self.function(**arguments)
                note.outcome = "ok"
                return result
            except WebError as error:
                note.outcome = error.kind
                return str(error)
            except Exception as error:
                if self.web is None:
                    raise    # a user's own tool: its error reaches the model's code
                return f"ERROR[failed]: {type(error).__name__}"    # its text may hold what is not the model's
            finally:
                note.hits, note.seconds = len(web.hits) if web else 0, time.monotonic() - begin
                if self.log is not None:
                    self.log.append(note)
        call.__name__ = self.name
        return call

    def checked(self, *args, **kwargs) -> dict:
        """The arguments by name. ToolError if they do not fit the signature."""
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
    hints, context, visible = get_type_hints(function), None, []
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


# --------------------------------------------------------------------------------------------- the nine tools
@tool
def web_search(context: ToolContext, query: str, k: int = 5, year: int = 0, site: str = "") -> str:
    """Search the web: the k best hits with title, address and text. year, site: restrict to them if given."""
    lines = []
    for title, link, text in search(context.web, query, k, year, site):
        if not context.web.gives_away(link, text, context.question):
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
    starts = [match.start() for match in re.finditer(re.escape(text), whole, re.IGNORECASE)]
    shown = [f"\n---\n...{whole[max(start - 200, 0):start + 300]}..." for start in starts[:8]]
    return f"{len(starts)} places" + "".join(shown)


@tool
def wiki(context: ToolContext, title: str, date: str = "", page: int = 1) -> str:
    """A Wikipedia article ("de:Berlin": another language), as it stood on date="YYYY-MM-DD" if given."""
    if date and not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        raise WebError("bad_date", "write the date as YYYY-MM-DD")
    head, html = article(context.web, title, date)
    return paged(document(context, html.encode(), ".html"), page, head)


@tool
def archive(context: ToolContext, url: str, date: str, page: int = 1) -> str:
    """A web page as the Wayback Machine kept it nearest to the date, "YYYY-MM-DD"."""
    address, text = page_text(context, snapshot(context.web, url, date))
    return paged(text, page, address)


@tool
def download(context: ToolContext, url: str) -> str:
    """Save a file of the web in the working directory; returns its name."""
    address, _, body = context.web.fetch(url, context.seconds_left())
    context.web.refuse(text=body.decode(errors="replace"), question=context.question)    # now: code can open the file
    name = re.sub(r"[^\w.-]", "_", PurePosixPath(urlsplit(address).path).name).lstrip(".")[-80:] or "download"
    if context.workdir is None:
        context.state.setdefault("downloads", {})[name] = body
        return f"kept as {name} ({len(body)} bytes) for read_file, ask_image, transcribe; code cannot open it"
    try:
        with open(context.workdir / name, "xb") as file:    # x: never over another file, nor through a link
            file.write(body)
    except OSError as error:
        raise WebError("no_file", f"{name}: {error.strerror}") from error
    return f"saved as {name} ({len(body)} bytes)"


@tool
def read_file(context: ToolContext, path: str, page: int = 1, sheet: str = "") -> str:
    """Read a file of the working directory as text: txt, csv, json, xml, html, py, pdf, docx, pptx, xlsx
    (values and fill colours; sheet: one of them), zip (what is in it)."""
    suffix = PurePosixPath(path).suffix.lower()
    text = document(context, file_bytes(context, path), suffix, sheet)
    return paged(text, page, path)


@tool
def ask_image(context: ToolContext, path: str, question: str) -> str:
    """Ask a question about an image file of the working directory."""
    return ask_about_image(context.web, file_bytes(context, path), path, question)


@tool
def transcribe(context: ToolContext, path: str) -> str:
    """The spoken words of an audio file of the working directory."""
    return spoken_words(context.web, file_bytes(context, path), path)


# -------------------------------------------------------------------------------------- which tools a run has
READERS = ["markitdown", "pypdf", "openpyxl"]
NEEDS: list[tuple[Tool, list[str], list[str]]] = [    # tool, packages, variables of the environment
    (web_search, [], []),
    (visit, READERS, []),
    (find, READERS, []),
    (wiki, READERS, []),
    (archive, READERS, []),
    (download, [], []),
    (read_file, READERS, []),
    (ask_image, [], ["VISION_URL", "VISION_MODEL"]),
    (transcribe, [], ["AUDIO_URL", "AUDIO_MODEL"]),
]


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


PAGE = "https://example.com"
CALLS = {       # to see if a tool's back end answers
    "web_search": ("weather",), "visit": (PAGE,), "find": (PAGE, "domain"), "download": (PAGE,), "wiki": ("Earth",),
    "archive": (PAGE, "2020-01-01")}


def back_end_answer(made: Tool) -> str:
    """What a tool's back end says, asked once; nothing of it is recorded. "" for a tool without one."""
    if made.name in CALLS:
        return replace(made, web=replace(made.web, cache=Cache()), log=None).bind(ToolContext())(*CALLS[made.name])
    server = {"ask_image": "VISION", "transcribe": "AUDIO"}.get(made.name)
    return models_of(server) if server else ""


def preflight_table(run_tools: list[Tool], web: Web, ask: bool) -> str:
    """A line for each web tool of the run, and for each that was left out; "" without any. ask: call each once."""
    live, answers = [made for made in run_tools if made.web], itertools.repeat("")
    if not live:
        return ""
    if ask and web.cache.mode != "replay":
        with ThreadPoolExecutor() as pool:
            answers = list(pool.map(back_end_answer, live))
    rows = {made.name: f"left out: {why}" for made, why in preflight(web) if why}
    for made, answer in zip(live, answers):
        rows[made.name] = f"does not answer: {answer[:100]}" if answer.startswith("ERROR[") else "live"
    return "".join(f"  {name:<12} {text}\n" for name, text in rows.items())


def prompt_text(tools: list[Tool]) -> str:
    """The tools as the system prompt lists them, one per paragraph."""
    return "\n".join(t.prompt for t in tools)


def load_tools(spec: str | None, web: Web | None = None, beside: Iterable[Tool] = ()) -> list[Tool]:
    """Tools by name: "web" means the live built-in ones, FILE.py those that a file defines; commas between.

    `beside`, which a run has anyway, come first. UserError for an unusable file and for two tools of one name.
    """
    found = list(beside)
    for part in filter(None, (spec or "").split(",")):
        if part == "web":
            found += [t for t, why in preflight(web or open_web("live")) if not why]
        else:
            found += tools_of(part)
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
    except Exception as error:    # whatever the user's own code does wrong, in one line
        raise UserError(f"--tools {file}: {type(error).__name__}: {error}") from error
    if not found:
        raise UserError(f"--tools {file}: no function in it carries @tool")
    return found
