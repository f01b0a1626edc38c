"""The folder of a run or an evaluation: one process at a time works in it, and nothing in it is ever overwritten.

Owns `alone_in` (the lock), `claim_folder`, `append`, and `reading`: the errors of a foreign file as one line.
"""
import contextlib
import fcntl
import itertools
import json
import os
from pathlib import Path

from machinery.cli import UserError


@contextlib.contextmanager
def alone_in(out: Path):
    """No second process works in `out` until this block ends; it gets a UserError instead. The lock lies beside the
    folder, which may be moved. It is an flock: the kernel frees it however this process ends."""
    name = Path(f"{out.resolve()}.lock")
    name.parent.mkdir(parents=True, exist_ok=True)
    with locked(name, out) as file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            name.unlink(missing_ok=True)


def locked(name: Path, out: Path):
    """The locked file of this name. UserError if another process holds it."""
    while True:
        file = name.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"--out {out}: process {file.read()} works in it; wait for its end, or name another "
                            "folder") from None
        except OSError as error:                        # some network file systems have no locks
            print(f"warning: {name} cannot be locked ({error.strerror}): start no second run in {out}")
        with contextlib.suppress(FileNotFoundError):    # the last holder has just removed it: once more
            if os.path.samestat(os.fstat(file.fileno()), name.stat()):
                return file
        file.close()


def claim_folder(out: Path, mark: str, what: str):
    """Make the folder of a new run or evaluation. An older one in it, known by its file `mark`, is moved aside: nothing
    is ever overwritten."""
    if out.is_symlink():                                # the folder that it leads to is the locked one
        out = out.resolve()
    if out.exists() and any(out.iterdir()):
        if not (out / mark).exists():
            raise UserError(f"--out {out} is not empty and holds no {what}: name another folder")
        aside = next(f"{out}.{i}" for i in itertools.count(1) if not Path(f"{out}.{i}").exists())
        out.rename(aside)
        print(f"{out} held another {what}: it was moved to {aside}")
    out.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def reading(what: str | Path, hint: str = ""):
    """Whatever a damaged or foreign file raises while it is read and taken apart, as one line that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except ImportError as error:
        raise UserError(f"{what}: {error}: pip install -r requirements-gaia.txt") from error
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's: no file's fault
            raise
        why = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        why = " ".join(why.split())[:300]
        raise UserError(f"{what}: cannot be read: {why}{hint and '. ' + hint}") from error


def append(file: Path, rows: list[dict]):
    """Add lines of JSON to a log."""
    with file.open("a") as log:
        log.writelines(json.dumps(row) + "\n" for row in rows)
