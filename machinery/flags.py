"""flags.py -- the fields of a settings dataclass become flags; the comments beside them are their --help.

    steps: int = 110         # optimiser steps, one use of the private data each
    ->  --steps STEPS   optimiser steps, one use of the private data each (default: 110)

  $ python -m machinery.flags --size 3       # one field as a flag
"""
import argparse
import dataclasses
import inspect
import re
import sys
import typing
from typing import Callable

from machinery import screen


def comments(settings: type) -> dict[str, str]:
    """name of a field -> the comment beside it."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)", inspect.getsource(settings), re.M))


def add(parser: argparse.ArgumentParser, settings: type, defaults: dict | None = None,
        choices: dict | None = None) -> None:
    """Add a flag for each field.

    defaults: name -> the default, in place of the field's own
    choices:  name -> the possible values, which are only shown in --help
    """
    said = comments(settings)
    for field in dataclasses.fields(settings):
        flag, text = "--" + field.name.replace("_", "-"), said[field.name].replace("%", "%%")
        if choices and field.name in choices:
            text += f": {', '.join(choices[field.name])}"
        default = (defaults or {}).get(field.name, field.default)
        if default in ("", None):                                        # the comment says what it means
            default = argparse.SUPPRESS
        if field.type is bool:
            parser.add_argument(flag, action="store_true", help=text, default=argparse.SUPPRESS)
        else:
            kind = next(t for t in (field.type, *typing.get_args(field.type)) if t in (int, float, str))
            parser.add_argument(flag, type=kind, default=default, help=text)


def take(said: argparse.Namespace, settings: type):
    """The settings that the parsed command line contains."""
    return settings(**{field.name: getattr(said, field.name, field.default)
                       for field in dataclasses.fields(settings)})


def parse(settings: type, program: str, doc: str, argv: list[str], recipe: Callable | None = None,
          choices: dict | None = None):
    """The settings that `argv` asks for.

    recipe:  (name of the data, N or 0) -> {field: value}, the defaults that follow from --data and --N
    choices: see `add`
    Errors:  an unknown flag, or a value of another type -> exit code 2
    """
    parser, defaults = screen.Parser(doc, program), {}
    if recipe is not None:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        first.add_argument("--data", nargs="?", default=settings.data)
        first.add_argument("--N", nargs="?")
        typed = first.parse_known_args(argv)[0]
        N = int(typed.N) if typed.N and typed.N.isdecimal() else 0
        defaults = recipe(typed.data or settings.data, N)
    add(parser, settings, defaults, choices)
    return take(parser.parse_args(argv), settings)


@dataclasses.dataclass(frozen=True)
class Example:
    size: int = 2                # side in pixels


if __name__ == "__main__":
    print(parse(Example, "flags.py", __doc__, sys.argv[1:]))
