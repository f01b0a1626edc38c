"""Tools: plain typed functions that the policy's code may call, and the two exceptions everybody shares.

Owns `@tool`, the validation of arguments, loading a user's own tools, the text by which the prompt describes tools.

Read in this order: `tool` (a function becomes a Tool), `Tool.bind` (what a call does), `load_tools`.

A tool runs on the host, outside the sandbox: keys and the network stay there, and every argument that comes from the
sandbox is checked against the type hints before the function sees it.
"""
import builtins
import inspect
import keyword
import re
import runpy
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin


class UserError(Exception):
    """Bad input from the user: the command lines print its text in one line and exit with status 2."""


class ToolError(Exception):
    """A tool says no. Its text reaches the model's code as a short error."""


@dataclass
class ToolContext:
    """What a tool may know of the trajectory that calls it. One per trajectory."""
    workdir: Path | None = None                             # host path of the task's files
    state: dict = field(default_factory=dict)               # a tool's memory, kept for the trajectory
    seconds_left: Callable[[], float] = lambda: 30.0        # until the step's time is up
    question: str = ""


PLAIN = {str, int, float, bool, list, dict, type(None), Any}
RESERVED = set(dir(builtins)) | set(keyword.kwlist) | {"final_answer"}


def fits(value, hint) -> bool:
    """Whether a value off the wire (JSON) is of the hinted type. An int passes for a float, a bool for no number."""
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


def written(hint) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


@dataclass(frozen=True)
class Tool:
    name: str
    function: Callable
    prompt: str                          # "name(argument: type = default) -> type: docstring"
    signature: inspect.Signature         # as the model sees it: without the context, with resolved types
    context: str | None = None           # the parameter that receives the ToolContext

    def bind(self, context: ToolContext) -> Callable:
        """A function for one trajectory: checks its arguments (ToolError if they do not fit), then calls the tool."""
        def call(*args, **kwargs):
            try:
                bound = self.signature.bind(*args, **kwargs)
            except TypeError as error:
                raise ToolError(f"{self.name}: {error}; it is {self.name}{self.signature}") from None
            for name, value in bound.arguments.items():
                hint = self.signature.parameters[name].annotation
                if not fits(value, hint):
                    raise ToolError(f"{self.name}: {name} must be {written(hint)}, not {type(value).__name__}")
            injected = {self.context: context} if self.context else {}
            return self.function(**bound.arguments, **injected)
        call.__name__ = self.name
        return call


def tool(function: Callable) -> Tool:
    """Make a Tool of a typed function with a docstring. UserError at once if the definition is wrong.

    A parameter annotated ToolContext is filled in by the host and hidden from the model.
    """
    name = function.__name__
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,40}", name) or name in RESERVED:
        raise UserError(f"tool {name}: the name must be lower-case letters, digits and _, and no name of Python's own")
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
            raise UserError(f"tool {name}: argument {parameter.name} needs a type hint made of str, int, float, bool, "
                            "list, dict, None, Literal")
        else:
            visible.append(parameter.replace(annotation=hint, kind=parameter.POSITIONAL_OR_KEYWORD))
    if "return" not in hints:
        raise UserError(f"tool {name}: it needs a return type")
    signature = inspect.Signature(visible, return_annotation=hints["return"])
    return Tool(name, function, f"{name}{signature}: {docstring}", signature, context)


def prompt_text(tools: list[Tool]) -> str:
    """The tools as the system prompt lists them, one a paragraph."""
    return "\n".join(t.prompt for t in tools)


def load_tools(spec: str | None) -> list[Tool]:
    """The tools that the Python file `spec` defines, in order; [] without a spec. UserError if it cannot be used."""
    if not spec:
        return []
    if not Path(spec).is_file():
        raise UserError(f"--tools {spec}: no such file")
    try:
        found = [v for v in runpy.run_path(spec).values() if isinstance(v, Tool)]
    except UserError as error:
        raise UserError(f"--tools {spec}: {error}") from error
    except Exception as error:    # whatever the user's own code does wrong, said in one line
        raise UserError(f"--tools {spec}: {type(error).__name__}: {error}") from error
    if not found:
        raise UserError(f"--tools {spec}: no function in it carries @tool")
    return found
