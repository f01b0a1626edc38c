"""Command lines: settings out of a dataclass, and how every command ends.

Bad input ends with one clear line and exit status 2, Ctrl-C with 130. Owns `UserError`, `Output`, `exit_status`,
`option`, `parse_settings`.
"""
import argparse
import contextlib
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import field, fields
from typing import get_args, get_type_hints


class UserError(Exception):
    """Bad input from the user: the command lines print its text in one line and exit with status 2."""


class OneLineParser(argparse.ArgumentParser):
    """A command line whose errors are UserErrors."""

    def error(self, message):
        raise UserError(f"{message} (python {self.prog} --help lists the flags)")


class Output:
    """A standard stream that never ends a run: what nobody reads is dropped. What its encoding lacks is escaped, and so
    are control characters: the texts of models and data could rewrite the terminal."""
    CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")       # None: closed by the shell (>&-)

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        text = self.CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
        self.attempt(self.stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, action: Callable, *arguments):
        """After an error (| head has gone, the disk is full) everything goes to /dev/null, Python's last flush too."""
        try:
            action(*arguments)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def quiet_imports(name: str):
    """Called before torch is imported: Ctrl-C then ends a command (name: its __name__) without a traceback."""
    if name == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:    # not under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def exit_status(command: Callable[[], None]) -> int:
    """Run a command line: 0 done, 2 bad input, 130 interrupted; each in one line."""
    while (lowest := os.open(os.devnull, os.O_RDWR)) <= 2:      # stdin, stdout or stderr was closed: a pipe would
        pass                                                    # get its number
    os.close(lowest)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:   # after quiet_imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.formatwarning = lambda message, *_: f"warning: {' '.join(str(message).split())}\n"   # no line of code
    with contextlib.redirect_stdout(Output(sys.stdout)) as out, contextlib.redirect_stderr(Output(sys.stderr)):
        try:
            command()
            return 0
        except (UserError, OSError) as error:               # OSError: a file or folder that nobody foresaw
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            return 2
        except KeyboardInterrupt as interrupt:              # its text, if it has one, says how to go on
            print(": ".join(["\ninterrupted", *map(str, interrupt.args)]), file=sys.stderr)
            return 130
        finally:
            out.flush()


# ------------------------------------------------------------------------------------- settings: a dataclass of options
def option(default, help: str, choices: tuple | None = None, zero: bool = False, flag: bool = True):
    """A field of a configuration. zero: 0 is allowed; no number may be negative. flag: False if only --set sets it."""
    return field(default=default, metadata={"help": help, "choices": choices, "zero": zero, "flag": flag})


def parse_settings(parser: OneLineParser, config: type, argv=None) -> dict:
    """name -> value of the settings that a command line gives: by their flags, or by --set FIELD=VALUE."""
    kinds = {name: hint if isinstance(hint, type) else get_args(hint)[0]        # of `int | None` the int
             for name, hint in get_type_hints(config).items()}
    unflagged = [f.name for f in fields(config) if not f.metadata["flag"]]
    for f in fields(config):
        text = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        if kinds[f.name] is bool:
            parser.add_argument(flag_name(f.name), action="store_true", help=text, default=argparse.SUPPRESS)
        elif f.metadata["flag"]:
            parser.add_argument(flag_name(f.name), type=kinds[f.name], help=text, choices=f.metadata["choices"],
                                default=argparse.SUPPRESS)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                        help=f"a choice of the method that has no flag: {', '.join(unflagged)}")
    given = vars(parser.parse_args(argv))
    for assignment in given.pop("set"):
        name, _, value = assignment.partition("=")
        if name not in unflagged:
            raise UserError(f"--set {assignment}: FIELD is one of {', '.join(unflagged)}; all else has a flag")
        try:
            given[name] = kinds[name](value)
        except ValueError:
            raise UserError(f"--set {assignment}: the value is no {kinds[name].__name__}") from None
    for f in fields(config):
        value, zero = given.get(f.name), f.metadata["zero"]
        if isinstance(value, (int, float)) and not (0 < value < math.inf or zero and value == 0):
            name = flag_name(f.name) if f.metadata["flag"] else f"--set {f.name}"
            raise UserError(f"{name} {value}: it must be {'0 or more' if zero else 'more than 0'}")
    return given


def flag_name(setting: str) -> str:
    return "--" + setting.replace("_", "-")
