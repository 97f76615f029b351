"""flags.py -- the fields of a settings dataclass as flags; --help is the comments beside them.

    steps: int = 110         # optimiser steps, one use of the private data each
    ->  --steps STEPS   optimiser steps, one use of the private data each (default: 110)
"""
import dataclasses
import inspect
import re
import typing

from machinery import screen


def comments(settings: type) -> dict[str, str]:
    """name -> the comment beside the field."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)", inspect.getsource(settings), re.M))


def parse(settings: type, program: str, doc: str, argv: list[str], recipe=None):
    """The settings that `argv` asks for. Errors: an unknown flag, a value of another type -> exit code 2.

    recipe: the defaults that follow from --data, data's name -> {field: value}
    """
    parser, said = screen.Parser(doc, program), comments(settings)
    for field in dataclasses.fields(settings):
        flag, text = "--" + field.name.replace("_", "-"), said[field.name].replace("%", "%%")
        if field.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            kind = next(t for t in (field.type, *typing.get_args(field.type)) if t in (int, float, str))
            parser.add_argument(flag, type=kind, default=field.default, help=text)
    if recipe is not None:
        parser.set_defaults(**recipe(parser.parse_args(argv).data))
    return settings(**vars(parser.parse_args(argv)))
