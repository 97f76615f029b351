"""grade.py -- your function beside the repository's own, smallest input first; the first difference is told.

A case is an input, a way to run it, and what a difference there would mean. cases.py has all cases.
While your function runs, the repository's own answer is out of order: it is the one that you are to write.
"""
import contextlib
import copy
import importlib.util
import inspect
import math
import re
import signal
import sys
import textwrap
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable
from unittest import mock

import numpy as np
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(p) for p in (ROOT, HERE) if str(p) not in sys.path]
SECONDS = 60                                                         # for one case: longer is an endless loop


@dataclass(frozen=True)
class Case:
    """title: the input in a few words; means: what it teaches; run(function) -> what is compared."""
    title: str
    means: str
    shown: dict[str, Any]                                            # name -> value, as the message prints it
    run: Callable
    tolerance: tuple[float, float] = (1e-4, 1e-5)                        # relative, absolute
    expected: Any = None                                                 # None: ask the repository's function
    on_shape: bool = False                                               # `means` explains a wrong shape, too


@dataclass(frozen=True)
class Exercise:
    origin: str                                                       # file:name, where the repository has it
    truth: Callable                                                      # the repository's own function
    cases: Callable[[], Iterable[Case]]                                  # smallest first
    out_of_order: tuple[str, ...] = ()                                # what a student's function may not call


@dataclass(frozen=True)
class Changed:
    """A result, and the arguments that the function changed in place to get there."""
    result: Any
    names: list[str]


class OutOfOrder(Exception):
    """The repository's own answer was called."""


class Nothing(Exception):
    """The function returned None."""


def on(truth: Callable, title: str, means: str, *args, on_shape: bool = False, **kw) -> Case:
    """The plain case: call the function with these arguments, each time with a fresh copy of each of them."""
    signature = inspect.signature(truth)
    given = signature.bind(*args, **kw).arguments

    def run(f):
        fresh = [copy.deepcopy(a) for a in args]                       # one by one: no two share their memory
        fresh_kw = {name: copy.deepcopy(a) for name, a in kw.items()}
        result = f(*fresh, **fresh_kw)
        after = signature.bind(*fresh, **fresh_kw).arguments
        changed = [name for name in given if not same(given[name], after[name])]
        return Changed(result, changed) if changed else result
    return Case(title, means, dict(given), run, on_shape=on_shape)


def same(a, b) -> bool:
    """Have these arguments the same numbers? What holds no numbers cannot be changed here."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return not torch.is_tensor(a) or np.array_equal(array(a), array(b), equal_nan=True)


def load(path: Path):
    """A file as a module, whatever the current folder."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(name: str) -> tuple[int, int]:
    """(minutes, points) of an exercise or a bug, from README.md's table, the only place that has them."""
    short = "bug" if name.startswith("bug") else name[:4]
    row = re.search(rf"^\| {short} \|.*\| (\d+) \| (\d+) \|$", (HERE / "README.md").read_text(), re.M)
    return int(row[1]), int(row[2])


# -----------------------------------------------------------------------------
# a student's function at work


@contextlib.contextmanager
def out_of_order(names: Iterable[str]):
    """While this lasts, calling one of these functions of the repository ends in OutOfOrder."""
    with contextlib.ExitStack() as stack:
        for name in names:
            def refuse(*args, name=name, **kw):
                raise OutOfOrder(name)
            stack.enter_context(mock.patch(name, refuse))
        yield


@contextlib.contextmanager
def at_most(seconds: int):
    """TimeoutError after so many seconds, where the system has alarms (Windows has none)."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_):
        raise TimeoutError(f"no answer after {seconds} s: is there an endless loop?")
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def guarded(function: Callable, names: Iterable[str]) -> Callable:
    """The student's function, without the repository's answer, without end, and not without a result."""
    def run(*args, **kw):
        with out_of_order(names), at_most(SECONDS):
            result = function(*args, **kw)
        if result is None:
            raise Nothing
        return result
    return run


def outcome(run: Callable, function: Callable):
    """What a case gives: a value, or the exception it ended in."""
    torch.manual_seed(0)
    try:
        return run(function)
    except (Exception, SystemExit) as e:
        return e


def check(name: str, exercise: Exercise, function: Callable | None = None,
          folder: Path = HERE) -> tuple[str, str]:
    """("done", "blank" or "wrong", message) for the exercise's file in `folder`, or for `function`."""
    short, file = name[:4], folder / f"{name}.py"
    blank = (f"{short} is still blank: open exercises/{name}.py, read its first lines, replace "
             f"`raise NotImplementedError` (about {table(name)[0]} minutes)")
    if function is None:
        if not file.exists():
            return "blank", f"{short} is missing: there is no {file}"
        with out_of_order(exercise.out_of_order):                        # also for `from dpsgd import ...`
            module = outcome(load, file)
        if isinstance(module, BaseException):
            return "wrong", f"{short}: your file cannot be loaded{stop(module)}"
        wanted = exercise.truth.__name__
        if not callable(getattr(module, wanted, None)):
            return "wrong", f"{short}: {file.name} has no function {wanted}: the grader calls it by this name"
        function = getattr(module, wanted)
    mine = function if function is exercise.truth else guarded(function, exercise.out_of_order)
    number = 0
    for number, case in enumerate(exercise.cases(), 1):
        got = outcome(case.run, mine)
        if isinstance(got, NotImplementedError):
            return "blank", blank
        expected = outcome(case.run, exercise.truth) if case.expected is None else case.expected
        if isinstance(expected, BaseException) and not isinstance(expected, ValueError):
            raise RuntimeError(f"{short}, {case.title}: the repository's own function fails") from expected
        message = explain(name, exercise, case, got, expected)
        if message:
            return "wrong", message
    return "done", f"{short} is done: {number} inputs agree. Now compare your code with {exercise.origin}"


# -----------------------------------------------------------------------------
# where two results part


def form(got, expected) -> str:
    """"" if `got` is the kind of thing that was expected, else its names, length, type or shape in words."""
    if isinstance(expected, dict):
        if not isinstance(got, dict):
            return f"got a {type(got).__name__}, expected a dict with the names {list(expected)}"
        if got.keys() != expected.keys():
            return f"got the names {list(got)}, expected {list(expected)}"
        return inside({name: form(got[name], expected[name]) for name in expected})
    if isinstance(expected, (tuple, list)):
        if not isinstance(got, (tuple, list)):
            return f"got a {type(got).__name__}, expected {len(expected)} values"
        if len(got) != len(expected):
            return f"got {len(got)} values, expected {len(expected)}"
        return inside(dict(enumerate(map(form, got, expected))))
    if isinstance(expected, (str, bool)):
        kinds = (bool, np.bool_) if isinstance(expected, bool) else str
        if isinstance(got, kinds):
            return ""
        return f"got a {type(got).__name__}, expected a {type(expected).__name__}"
    if torch.is_tensor(expected):
        if not torch.is_tensor(got):
            return f"got a {type(got).__name__}, expected a tensor of shape {tuple(expected.shape)}"
        if got.is_floating_point() != expected.is_floating_point():
            return f"got numbers of type {got.dtype}, expected {expected.dtype}"
    try:
        a, b = array(got), array(expected)
    except (TypeError, ValueError):
        return f"got a {type(got).__name__}, expected a number"
    return "" if a.shape == b.shape else f"got shape {a.shape}, expected {b.shape}"


def difference(got, expected, rtol: float, atol: float) -> str:
    """"" if two results of one form agree, else the first place where they do not, in words."""
    if isinstance(expected, dict):
        return inside({name: difference(got[name], expected[name], rtol, atol) for name in expected})
    if isinstance(expected, (tuple, list)):
        return inside({i: difference(g, e, rtol, atol) for i, (g, e) in enumerate(zip(got, expected))})
    if isinstance(expected, (str, bool)):
        return "" if got == expected else "not the same"
    a, b = array(got), array(expected)
    wrong = np.argwhere(~np.isclose(a, b, rtol, atol, equal_nan=True))
    if not len(wrong):
        return ""
    i = tuple(wrong[0].tolist())
    return f"{f'at index {i}: ' if i else ''}got {a[i]:.6g}, expected {b[i]:.6g}"


def inside(parts: dict) -> str:
    """The first of the parts about which there is something to say."""
    for name, text in parts.items():
        if text:
            return f"[{name!r}] {text}"
    return ""


def array(x) -> np.ndarray:
    return x.detach().double().cpu().numpy() if torch.is_tensor(x) else np.asarray(x, dtype=float)


# -----------------------------------------------------------------------------
# the message


def explain(name: str, exercise: Exercise, case: Case, got, expected) -> str:
    """"" if the results agree; else the input, yours, what was expected, where they part, what that means.

    Code that stops, or returns something of another form, is told so; it gets no lesson about something else.
    """
    short, changed = name[:4], []
    if isinstance(got, Changed):
        got, changed = got.result, got.names
    head, where, means = f"{short} differs from {exercise.origin}: {case.title}", "", case.means
    if isinstance(got, OutOfOrder):
        return f"{short}: your code calls {got}: this is the one you are to write"
    if isinstance(got, Nothing):
        head, means = f"{short}: your function returned nothing: does it end in a `return`?", ""
    elif isinstance(got, BaseException):
        if type(got) is type(expected):
            return ""
        head, means = f"{short}: your code stopped{stop(got)}", ""
    elif not isinstance(expected, BaseException):
        where = form(got, expected)
        if where and not case.on_shape:
            means = f"it has another form, so no number was compared.{wanted_shapes(name)}"
        where = where or difference(got, expected, *case.tolerance)
        if not where and changed:
            where = f"your function changed its argument {' and '.join(changed)} in place"
            means = "the result is right, but the caller still needs what was passed in: make a new tensor."
        if not where:
            return ""
    lines = [head, ""] if head.endswith(case.title) else [head, "", f"  {'input':<12}: {case.title}"]
    lines += [line(key, value) for key, value in case.shown.items()] + [""]
    if not isinstance(got, BaseException):
        lines.append(line("yours", got))
    lines.append(line("expected", expected))
    if where:
        lines.append(f"  {'difference':<12}: {where}")
    if means:
        lines += ["", textwrap.fill("What it means: " + " ".join(means.split()), 110)]
    return "\n".join(lines)


def stop(error: BaseException) -> str:
    """" at line 12 of ex07_clipping.py: TypeError: ..."; the line is the last one in a student's file."""
    text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    frames = [f for f in traceback.extract_tb(error.__traceback__)
              if re.match(r"ex\d\d_", Path(f.filename).name)]
    number = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
    if number is None:
        return f": {text}"
    file = Path(error.filename if isinstance(error, SyntaxError) else frames[-1].filename).name
    return f" at line {number} of {file}: {text}"


def wanted_shapes(name: str) -> str:
    """What the exercise itself says of shapes, from its docstring."""
    found = re.search(r"^ +(Shapes: .*(?:\n {9,}\S.*)*)", (HERE / f"{name}.py").read_text(), re.M)
    return f" The exercise says: {found[1]}" if found else ""


def line(name: str, value) -> str:
    text = show(value)
    return f"  {name:<12}= {text if len(text) < 200 else text[:200] + ' ...'}"


def show(x) -> str:
    """A value in one line: small tensors in full, large ones by shape and ends, a function's docstring."""
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
    if inspect.isfunction(x):
        return x.__doc__ or x.__name__
    return str(x)
