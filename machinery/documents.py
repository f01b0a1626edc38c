"""Documents as text: pages of the web and files of the working directory, as Markdown, cut into pages.

Owns `WebError`, the way to a file, and the parsers. It imports nothing of this project, because `to_text` runs this
file as a script. Read in this order: `page_text`, `document`, `to_text`, the parsers; `file_bytes`. `context` is a
tools.ToolContext.
"""
import hashlib
import io
import mimetypes
import os
import re
import resource
import stat
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath
from urllib.parse import urljoin, urlsplit

PAGE = 8000                              # characters of a page of text, about 2,000 tokens
MAX_FILE = 50 * 2**20                    # bytes of a file that a tool reads


class WebError(Exception):
    """What a tool tells the model instead of an answer. keep: the same request would fail again tomorrow."""

    def __init__(self, kind: str, text: str, keep: bool = False):
        super().__init__(f"ERROR[{kind}]: {text}")
        self.kind, self.text, self.keep = kind, text, keep


# --------------------------------------------------------------------------------------------- pages of text
def page_text(context, url: str) -> tuple[str, str]:
    """(final address, Markdown with absolute links) of a page of the web."""
    address, content_type, body = context.web.fetch(url, context.seconds_left())
    text = document(context, body, suffix_of(content_type, address, body))
    relative = r"\]\((?!https?:|mailto:|#)([^)\s]+)"
    return address, re.sub(relative, lambda link: f"]({urljoin(address, link[1])}", text)


def document(context, body: bytes, suffix: str, sheet: str = "") -> str:
    """The text of a document, parsed once per trajectory. WebError if it is the benchmark itself."""
    texts = context.state.setdefault("documents", {})
    key = (hashlib.sha256(body).digest(), suffix, sheet)
    if key not in texts:
        texts[key] = to_text(body, suffix, sheet, min(60.0, max(context.seconds_left(), 1.0)))
    context.web.refuse(text=texts[key], question=context.question)
    return texts[key]


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


def suffix_of(content_type: str, url: str, body: bytes) -> str:
    """What the file would be called, by its first bytes, its content type, its address."""
    kind, named = content_type.split(";")[0].strip().lower(), PurePosixPath(urlsplit(url).path).suffix.lower()
    if body[:5] == b"%PDF-":
        return ".pdf"
    if "html" in kind or body[:256].lstrip()[:9].lower() == b"<!doctype":
        return ".html"
    if office := re.search("(wordprocessing|presentation|spreadsheet)ml", kind):    # Python's list lacks them
        return {"wordprocessing": ".docx", "presentation": ".pptx", "spreadsheet": ".xlsx"}[office[1]]
    vague = kind in ("", "application/octet-stream", "application/zip", "binary/octet-stream")
    return named if vague else mimetypes.guess_extension(kind) or named


# ----------------------------------------------------------------------------------------------------- files
def file_bytes(context, path: str) -> bytes:
    """A file below the working directory; where the sandbox hides that, an attachment or a download by name."""
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise WebError("no_file", "give a path relative to the working directory")
    if context.workdir is not None:
        return open_below(context.workdir, parts)
    known = {**context.files, **context.state.get("downloads", {})}
    found = known.get("/".join(parts))
    if found is None:
        raise WebError("no_file", f"{path}: only attachments and downloads can be read: {', '.join(known) or 'none'}")
    return found if isinstance(found, bytes) else found.read_bytes()[:MAX_FILE]


def open_below(folder: Path, parts: tuple[str, ...]) -> bytes:
    """The content of a regular file, reached part by part without following links: the sandboxed code can write
    there, and may at any moment put a link to a file of the host in the way."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts:
            inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=handle)
            os.close(handle)
            handle = inner
        if not stat.S_ISREG(os.fstat(handle).st_mode) or os.fstat(handle).st_size > MAX_FILE:
            raise WebError("no_file", f"{parts[-1]} is no regular file of at most {MAX_FILE // 2**20} MiB")
        with open(handle, "rb", closefd=False) as file:
            return file.read(MAX_FILE)
    except OSError as error:
        raise WebError("no_file", f"{'/'.join(parts)}: {error.strerror}") from error
    finally:
        os.close(handle)


# --------------------------------------------------------------------------------------------------- parsers
def to_text(body: bytes, suffix: str, sheet: str = "", seconds: float = 60.0) -> str:
    """A document as Markdown, or the text it is; WebError if it cannot be read. It is parsed in a process without keys
    in its environment and with limits: a file of the web may be hostile."""
    if suffix not in PARSERS:
        return decode(body)
    try:
        done = subprocess.run([sys.executable, "-I", __file__, suffix, sheet], input=body, env={},
                              capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise WebError("timeout", f"the {suffix} file takes too long to read") from None
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip().splitlines() or ["it needs too much memory"]
        raise WebError("unreadable", f"the {suffix} file cannot be read: {why[-1][:200]}", keep=True)
    return done.stdout.decode()


def decode(body: bytes) -> str:
    utf_16 = body[:2] in (b"\xff\xfe", b"\xfe\xff")
    if b"\0" in body[:4096] and not utf_16:
        raise WebError("unreadable", "this is a binary file of a kind that cannot be read as text", keep=True)
    try:
        return body.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError:
        return body.decode("latin-1")


def read_pdf(body: bytes, suffix: str, sheet: str) -> str:
    from pypdf import PdfReader
    pages = PdfReader(io.BytesIO(body)).pages
    return "\n\n".join(f"[page {i} of {len(pages)}]\n{page.extract_text()}" for i, page in enumerate(pages, 1))


def read_markdown(body: bytes, suffix: str, sheet: str) -> str:
    from markitdown import MarkItDown, StreamInfo
    info = StreamInfo(extension=suffix)
    return MarkItDown(enable_plugins=False).convert_stream(io.BytesIO(body), stream_info=info).text_content


def read_xlsx(body: bytes, suffix: str, sheet: str) -> str:
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


def read_zip(body: bytes, suffix: str, sheet: str) -> str:
    members = zipfile.ZipFile(io.BytesIO(body)).infolist()
    return "\n".join(f"{member.filename} ({member.file_size} bytes)" for member in members)


PARSERS = {".pdf": read_pdf, ".xlsx": read_xlsx, ".zip": read_zip,
           ".html": read_markdown, ".htm": read_markdown, ".docx": read_markdown, ".pptx": read_markdown}


if __name__ == "__main__":    # the process of `to_text`: python documents.py SUFFIX SHEET < file
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
    content = sys.stdin.buffer.read()
    try:
        members = zipfile.ZipFile(io.BytesIO(content)).infolist() if content[:2] == b"PK" else []
        if sum(member.file_size for member in members) > 2**29:
            raise ValueError("it unpacks to more than 512 MiB")
        text = PARSERS[sys.argv[1]](content, *sys.argv[1:])
        sys.stdout.buffer.write(text.encode(errors="replace"))
    except Exception as problem:    # whatever a parser says of a broken file, in one line
        sys.exit(f"{type(problem).__name__}: {problem}"[:200])
