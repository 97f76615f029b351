"""grade.py -- runs your function beside the repository's own, and reports the first difference.

A case is an input, a way to run it, and what a difference there would mean; cases/ has all cases, smallest
first. A hand-in is read before it is run: it has to compute its result from its arguments (`beyond`).
"""
import ast
import builtins
import collections
import copy
import inspect
import math
import re
import sys
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Iterable

import numpy as np
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(p) for p in (ROOT, HERE) if str(p) not in sys.path]
from progress import table  # noqa: E402


@dataclass(frozen=True)
class Case:
    """title: the input in a few words; means: what a difference means; run(function) -> what is compared."""
    title: str
    means: str
    shown: dict[str, Any]                                                # name -> value, for the message
    run: Callable
    tolerance: tuple[float, float] = (1e-4, 1e-5)                        # relative, absolute
    expected: Any = None                                                 # None: ask the repository's function
    on_shape: bool = False                                               # `means` also explains a wrong shape


@dataclass(frozen=True)
class Exercise:
    origin: str                                                          # file:name in the repository
    truth: Callable                                                      # the repository's own function
    cases: Callable[[], Iterable[Case]]                                  # smallest first
    uses: tuple[str, ...] = ()                             # what an answer may import from the repository


class Told(Exception):
    """A message for the student, complete in itself."""


def on(truth: Callable, title: str, means: str, *args, on_shape: bool = False, **kw) -> Case:
    """The plain case: call the function with these arguments, with fresh copies each time."""
    given = inspect.signature(truth).bind(*args, **kw).arguments

    def run(f):
        fresh = inspect.signature(truth).bind(*map(copy.deepcopy, args), **copy.deepcopy(kw))
        result = f(*fresh.args, **fresh.kwargs)
        for name, value in fresh.arguments.items():
            if difference(value, given[name], 0, 0):
                raise Told(f"your function changed its argument {name} in place, but the caller still needs "
                           f"the old value. Make a new tensor")
        return result
    return Case(title, means, dict(given), run, on_shape=on_shape)


# -----------------------------------------------------------------------------
# a hand-in is read, then run

LIBRARIES = ("torch", "numpy", "scipy", "math", "typing", "collections", "functools", "itertools",
             "dataclasses", "__future__")
NEVER = {"os", "sys", "builtins", "inspect", "importlib", "gc", "ctypes", "subprocess", "shutil", "pickle",
         "eval", "exec", "compile", "open", "globals", "locals", "vars", "getattr", "setattr", "delattr",
         "get_type_hints", "runstring", "gi_frame", "tb_frame", "f_back", "f_locals", "f_globals",
         "f_builtins", "operator", "attrgetter", "methodcaller", "wraps", "update_wrapper", "Timer",
         "measure", "warnings", "TorchFunctionMode", "TorchDispatchMode", "unittest", "mock", "load"}


def beyond(tree: ast.Module, uses: tuple[str, ...]) -> str:
    """"" for a file that only computes, otherwise a message about the first thing that no right answer needs.

    It detects files that call the repository's answer, read the grader's variables or replace a function of
    torch. It is no sandbox: README.md, "How to grade", has one.
    """
    nodes = list(ast.walk(tree))
    own = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)}     # `load` removes the built-in ones
    own |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    if any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in nodes):
        own = set()
    for node in nodes:
        wrong = []
        if isinstance(node, ast.Import):
            wrong = [name.name for name in node.names if name.name.split(".")[0] not in LIBRARIES]
        elif isinstance(node, ast.ImportFrom):
            home = str(node.module)
            library = home.split(".")[0] in LIBRARIES
            wrong = [f"{home}.{name.name}" for name in node.names if f"{home}.{name.name}" not in uses
                     and (not library or name.name in NEVER or name.name.startswith("_"))]
        elif isinstance(node, ast.Attribute):
            stored = not isinstance(node.ctx, ast.Load) and node.attr not in ("grad", "data", "requires_grad")
            if stored or node.attr in NEVER or node.attr.startswith("_"):
                wrong = [ast.unparse(node) + " = ..." * stored]
        elif isinstance(node, ast.Name) and node.id != "__name__":
            wrong = [node.id] if node.id in NEVER - own or node.id.startswith("__") else []
        elif isinstance(node, ast.MatchClass):
            wrong = [name for name in node.kwd_attrs if name in NEVER or name.startswith("_")]
        if wrong:
            ours = f" and, from the repository, {', '.join(uses)}" if uses else ""
            return (f"line {node.lineno} has `{wrong[0]}`, which no right answer needs. Compute the result "
                    f"from the arguments, and import nothing but {', '.join(LIBRARIES)}{ours}")
    return ""


def read(file: Path) -> ast.Module:
    """The syntax tree of a file, which is not run. Errors: it cannot be read, or is not Python -> Told"""
    try:
        if file.is_symlink() or file.parent.is_symlink() or not file.is_file():
            raise Told(f"{file.name} is a link or a folder, or lies in a linked folder: expected a file")
        return ast.parse(file.read_bytes(), str(file))
    except OSError as e:
        raise Told(f"{file.name} cannot be read: {type(e).__name__}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:      # among them a wrong encoding
        raise Told(f"your file cannot be loaded{stop(e)}") from None


def load(file: Path, uses: tuple[str, ...] | None = None) -> ModuleType:
    """A file as a module. With `uses`, it is refused if `beyond` finds something in it."""
    tree, module = read(file), ModuleType(file.stem)
    if uses is not None:
        refused = beyond(tree, uses)
        if refused:
            raise Told(refused)
        # a student's own name, say vars, is never the built-in one
        module.__dict__["__builtins__"] = {k: v for k, v in vars(builtins).items() if k not in NEVER}
    exec(compile(tree, str(file), "exec"), module.__dict__)
    return module


def outcome(run: Callable, *args):
    """The value that a call returns, or the exception that it ends in."""
    torch.manual_seed(0)
    try:
        return run(*args)
    except BaseException as e:                                           # SystemExit, KeyboardInterrupt, ...
        return e


def check(name: str, exercise: Exercise, folder: Path = HERE, function: Callable | None = None):
    """("done", "blank" or "wrong", message) for the exercise's file in `folder`, or for `function`."""
    short, file, wanted = name[:4], folder / f"{name}.py", exercise.truth.__name__
    if function is None:
        if not file.exists() and not file.is_symlink():
            return "blank", f"{short} is missing: there is no {file}"
        module = outcome(load, file, exercise.uses)
        if isinstance(module, BaseException):
            said = module if isinstance(module, Told) else f"your file cannot be loaded{stop(module)}"
            return "wrong", f"{short}: {said}"
        function = vars(module).get(wanted)
        if function is None:
            return "wrong", f"{short}: {file.name} has no function {wanted}, the name by which it is called"
    number = 0
    for number, case in enumerate(exercise.cases(), 1):
        got = outcome(lambda case=case: plain(case.run(function)))
        if isinstance(got, NotImplementedError):
            return "blank", (f"{short} is still blank: open exercises/{name}.py, read its first lines, and "
                             f"replace `raise NotImplementedError` (about {table(name)[0]} minutes)")
        expected = outcome(case.run, exercise.truth) if case.expected is None else case.expected
        if isinstance(expected, BaseException) and not isinstance(expected, ValueError):
            raise RuntimeError(f"{short}, {case.title}: the repository's own function fails") from expected
        message = explain(name, exercise.origin, case, got, expected)
        if message:
            return "wrong", message
    return "done", f"{short} is done: {number} inputs agree. Now compare your code with {exercise.origin}"


# -----------------------------------------------------------------------------
# where two results differ

DICTS, LISTS, TENSORS = (dict, collections.OrderedDict), (list, tuple), (torch.Tensor, torch.nn.Parameter)
NUMBERS = tuple(set(np.sctypeDict.values()) - {np.object_, np.void})
OTHERS = (int, float, bool, str, type(None), np.ndarray)


class Stranger:
    """It stands for a result of an unknown class, which might give different values each time it is read."""

    def __init__(self, kind: str):
        self.kind = kind

    def __str__(self):
        return f"a {self.kind}"


def plain(x):
    """A result, read once by its exact type: containers are rebuilt, and unknown classes become Strangers."""
    def exactly(kinds):                                                  # `in` would ask the class itself
        return any(type(x) is kind for kind in kinds)
    if exactly(DICTS):
        return {plain(name): plain(value) for name, value in x.items()}
    if exactly(LISTS):
        return type(x)(map(plain, x))
    if exactly(TENSORS):
        return torch.Tensor.detach(x)
    if exactly(NUMBERS):
        return x.item()
    return x if exactly((*OTHERS, Stranger)) else Stranger(type.__dict__["__name__"].__get__(type(x)))


def form(x) -> str:
    """What kind of value it is, in words. Only two results of the same form can be compared."""
    if isinstance(x, Stranger):
        return str(x)
    if isinstance(x, dict):
        return "a dict with " + ", ".join(f"{name!r}: {form(x[name])}" for name in sorted(x, key=str))
    if isinstance(x, (tuple, list)):
        return f"{len(x)} values: " + ", ".join(map(form, x))
    if type(x) in (torch.Tensor, torch.nn.Parameter):            # a subclass may give false numbers
        return f"a tensor of shape {tuple(x.shape)}" + ("" if x.is_floating_point() else f" of {x.dtype}")
    if type(x) is np.ndarray:
        return f"a numpy array of shape {x.shape}"
    if isinstance(x, (int, float, np.number)) and not isinstance(x, bool):
        return "a number"
    return f"a {type(x).__name__}"


def difference(got, expected, rtol: float, atol: float) -> str:
    """"" if two results of the same form agree, otherwise the first place where they do not, in words."""
    if isinstance(got, Stranger):
        return f"got {got}, expected {form(expected)}"
    if isinstance(expected, (dict, tuple, list)):
        names = expected if isinstance(expected, dict) else range(len(expected))
        found = ((name, difference(got[name], expected[name], rtol, atol)) for name in names)
        return next((f"[{name!r}] {text}" for name, text in found if text), "")
    if isinstance(expected, (str, bool)):
        return "" if got == expected else "not the same"
    if not torch.is_tensor(expected) and form(expected) != "a number":
        return ""                                                        # a function, a schedule
    a, b = array(got), array(expected)
    if a.shape != b.shape:
        return f"the shape is wrong: got {a.shape}, expected {b.shape}"
    wrong = np.argwhere(~np.isclose(a, b, rtol, atol, equal_nan=True))
    if not len(wrong):
        return ""
    i = tuple(wrong[0].tolist())
    return f"{f'at index {i}: ' if i else ''}got {a[i]:.6g}, expected {b[i]:.6g}"


def wrong_shape(got, expected, where: str = "") -> str:
    """"" if no two tensors or arrays of the results differ in shape, otherwise the first pair, in words."""
    if isinstance(got, dict) and isinstance(expected, dict):
        both = [name for name in expected if name in got]
        found = (wrong_shape(got[name], expected[name], f" of [{name!r}]") for name in both)
        return next((text for text in found if text), "")
    arrays = (torch.Tensor, np.ndarray)
    if type(got) in arrays and type(expected) in arrays and got.shape != expected.shape:
        return f"the shape{where} is wrong: got {tuple(got.shape)}, expected {tuple(expected.shape)}"
    return ""


def array(x) -> np.ndarray:
    return x.detach().double().cpu().numpy() if torch.is_tensor(x) else np.asarray(x, dtype=float)


# -----------------------------------------------------------------------------
# the message


def explain(name: str, origin: str, case: Case, got, expected) -> str:
    """"" if the results agree; otherwise the input, both results, their difference, and what it means.

    If the code stopped or returned another form, the message says so, and the lesson of the case is given
    only where it is about shapes.
    """
    short, where, means = name[:4], "", case.means
    head = f"{short} differs from {origin}: {case.title}"
    got = got if isinstance(got, BaseException) else plain(got)
    if form(expected) == "a number" and type(got) in (torch.Tensor, np.ndarray) and got.shape == ():
        got = plain(got.item())
    if got is None:
        head, means = f"{short}: your function returned nothing. Does it end in a `return`?", ""
    elif isinstance(got, BaseException):
        if type(got) is type(expected):
            return ""
        head = f"{short}: {got}" if isinstance(got, Told) else f"{short}: your code stopped{stop(got)}"
        if hint(got):
            head += f"\n\n{hint(got)}"
        means = case.means if case.on_shape and isinstance(got, (RuntimeError, IndexError)) else ""
    elif isinstance(got, Stranger) or form(got) != form(expected):
        where = f"got {form(got)[:300]}, expected {form(expected)}"
        if wrong_shape(got, expected):
            head = f"{short}: {wrong_shape(got, expected)}"
        if not case.on_shape and not isinstance(expected, BaseException):
            text = (HERE / f"{name}.py").read_text("utf-8")
            shapes = re.search(r"^ +(Shapes: .*(?:\n {9,}\S.*)*)", text, re.M)
            means = f"the result has another form, so no number was compared. {shapes[1] if shapes else ''}"
    else:
        where = difference(got, expected, *case.tolerance)
        if not where:
            return ""
    lines = [head, "", f"  {'input':<12}: {case.title}"]
    lines += [line(key, value) for key, value in case.shown.items()] + [""]
    if got is not None and not isinstance(got, BaseException):
        lines.append(line("yours", got))
    lines += [line("expected", expected)] + [f"  {'difference':<12}: {where}"] * bool(where)
    if means:
        lines += ["", textwrap.fill("What it means: " + " ".join(means.split()), 110)]
    return "\n".join(lines)


def stop(error: BaseException) -> str:
    """" at line 12 of ex07_clipping.py: TypeError: ...", with the last line that is in a student's file."""
    text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    frames = traceback.extract_tb(error.__traceback__)
    places = [(Path(frame.filename).name, frame.lineno) for frame in frames
              if re.match(r"ex\d\d_", Path(frame.filename).name)]
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        places = [(Path(error.filename).name, error.lineno)]
    return f" at line {places[-1][1]} of {places[-1][0]}: {text}" if places else f": {text}"


HINTS = {                                                # words of torch or numpy -> what they probably mean
    "must match the size|broadcast|expanded size":
        "The shapes of two tensors do not broadcast: counted from the last dimension, two sizes have to be "
        "equal, or one of them has to be 1.",
    "mat1 and mat2|size mismatch|inconsistent tensor size|first two dimensions of batch|core dimension":
        "The shapes do not fit a matrix product: (m, k) @ (k, n) needs the same k twice.",
    "view size is not compatible":
        "`.view` was called on a tensor whose numbers do not lie one after the other in memory, for example "
        "after a transpose; `.reshape` copies them if necessary.",
    "invalid for input of size|cannot reshape|split_with_sizes":
        "The sizes that were asked for do not add up to as many numbers as there are.",
    "same dtype|expected scalar type|can't be cast":
        "Tensors of different dtypes meet, such as float32 and float64, and one of them has to be converted.",
    "control flow|calling .item":
        "Inside vmap no number can be read from a tensor, so use torch.where in place of `if`.",
    "Boolean value of Tensor|can(not)? be converted to":
        "A tensor of several numbers stands where one number is needed.",
    "in_dims|mapped dimension":
        "in_dims needs one entry for each argument: None, or the dimension that is cut into rows.",
    "equal size|Sizes of tensors must match|Dimension out of range|too many indices|out of bounds":
        "A dimension is missing, or has another size than was expected."}


def hint(error: BaseException) -> str:
    """One sentence on what an error of torch or numpy probably means; "" for all others."""
    for words, meaning in HINTS.items():
        if isinstance(error, (RuntimeError, IndexError, ValueError)) and re.search(words, str(error)):
            return textwrap.fill(f"Probable cause: {meaning}", 110)
    return ""


def line(name: str, value) -> str:
    text = show(value)
    return f"  {name:<12}= {text if len(text) < 200 else text[:200] + ' ...'}"


def show(x) -> str:
    """A value in one line: small tensors in full, large ones by shape and ends, functions by docstring."""
    if isinstance(x, BaseException):
        return f"{type(x).__name__}: {(str(x).splitlines() or [''])[0]}"
    if torch.is_tensor(x) or isinstance(x, np.ndarray):
        flat = array(x).ravel()
        if len(flat) <= 12:
            return show(x.tolist())
        return f"numbers of shape {tuple(x.shape)}: {flat[0]:.4g}, {flat[1]:.4g}, ... {flat[-1]:.4g}"
    if isinstance(x, dict):
        return "{" + ", ".join(f"{name}: {show(v)}" for name, v in x.items()) + "}"
    if isinstance(x, (list, tuple)):
        return ("[{}]" if isinstance(x, list) else "({})").format(", ".join(map(show, x)))
    if isinstance(x, float):
        return f"{x:.6g}" if math.isfinite(x) else str(x)
    return (x.__doc__ or x.__name__) if inspect.isfunction(x) else str(x)
