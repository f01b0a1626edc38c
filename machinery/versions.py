"""One warning when the installed torch, transformers or peft differ from the versions in requirements.txt."""
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PINNED = ("torch", "transformers", "peft")      # the attention functions and the adapter rely on their internals
REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"


def other_versions() -> list[str]:
    """The packages whose version is not the one in requirements.txt; none where there is no such file."""
    text = REQUIREMENTS.read_text("utf-8") if REQUIREMENTS.is_file() else ""
    differ = []
    for name, pinned in re.findall(rf"^({'|'.join(PINNED)})==(\S+)", text, re.MULTILINE):
        try:
            installed = version(name).split("+")[0]             # 2.13.0+cu130 is 2.13.0, built for a GPU
        except PackageNotFoundError:
            installed = "missing"
        if installed != pinned:
            differ.append(f"{name} {installed} (tested with {pinned})")
    return differ


def warn_of_other_versions() -> None:
    """Print one line on stderr if a version differs."""
    if differ := other_versions():
        print(f"warning: other versions than in requirements.txt: {', '.join(differ)}. The code relies on internals of "
              "these packages: run the tests before you trust the results", file=sys.stderr)
