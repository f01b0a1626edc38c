"""How every command line ends: one clear line for bad input, exit status 2, and 130 after Ctrl-C."""
import argparse
import sys
from collections.abc import Callable
from dataclasses import field


class UserError(Exception):
    """Bad input from the user: the command lines print its text in one line and exit with status 2."""


class OneLineParser(argparse.ArgumentParser):
    """A command line whose errors are UserErrors."""

    def error(self, message):
        raise UserError(f"{message} (python {self.prog} --help lists the flags)")


def option(default, help: str, choices: tuple | None = None, zero: bool = False, flag: bool = True):
    """A field of a configuration. zero: whether 0 is allowed; numbers are never negative. flag: False if only --set sets it."""
    return field(default=default, metadata={"help": help, "choices": choices, "zero": zero, "flag": flag})


def exit_status(command: Callable[[], None]) -> int:
    """Run a command line: 0 done, 2 bad input, 130 interrupted; each in one line."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:                  # its text, if it has one, says how to go on
        print(": ".join(["\ninterrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    return 0
