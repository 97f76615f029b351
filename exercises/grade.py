"""grade.py -- your function beside the repository's own, from the smallest input up; the first difference is explained.

A case is an input, a way to run it, and what a difference there would mean. cases.py has the cases of all exercises.
"""
import copy
import importlib.util
import inspect
import math
import re
import sys
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable

import numpy as np
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(p) for p in (ROOT, HERE) if str(p) not in sys.path]


@dataclass(frozen=True)
class Case:
    """title: the input in a few words; means: what it teaches; run(function) -> what is compared."""
    title: str
    means: str
    shown: dict[str, Any]                                                # name -> value, as the message prints it
    run: Callable
    tolerance: tuple[float, float] = (1e-4, 1e-5)                        # relative, absolute
    expected: Any = None                                                 # None: ask the repository's function


@dataclass(frozen=True)
class Exercise:
    origin: str                                                          # where the repository has it
    truth: Callable                                                      # the repository's own function
    cases: Callable[[], Iterable[Case]]                                  # smallest first


def on(truth: Callable, title: str, means: str, *args, **kw) -> Case:
    """The plain case: call the function with these arguments, each time with fresh copies of them."""
    given = inspect.signature(truth).bind(*args, **kw).arguments
    return Case(title, means, dict(given), lambda f: f(*copy.deepcopy(args), **copy.deepcopy(kw)))


def load(path: Path):
    """A file as a module, whatever the current folder."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def minutes(name: str) -> int:
    """The time estimate in an exercise's first line."""
    return int(re.search(r"(\d+) minutes", (HERE / f"{name}.py").read_text())[1])


def check(name: str, exercise: Exercise, function: Callable | None = None) -> tuple[str, str]:
    """("done", "blank" or "wrong", message) for the exercise's file, or for `function` in its place."""
    short = name[:4]
    if function is None:
        try:
            function = getattr(load(HERE / f"{name}.py"), exercise.truth.__name__)
        except Exception as e:
            return "wrong", f"{short} cannot be imported: {show(e)}"
    number = 0
    for number, case in enumerate(exercise.cases(), 1):
        got = outcome(case.run, function)
        if isinstance(got, NotImplementedError):
            return "blank", (f"{short} is still blank: open exercises/{name}.py, read its first lines, replace "
                             f"`raise NotImplementedError` (about {minutes(name)} minutes)")
        expected = outcome(case.run, exercise.truth) if case.expected is None else case.expected
        where = difference(got, expected, *case.tolerance)
        if where:
            return "wrong", explain(short, exercise, case, got, expected, where)
    return "done", f"{short} is done: {number} inputs agree with {exercise.origin}, now compare the code"


def outcome(run: Callable, function: Callable):
    """What a case gives: a value, or the exception it ended in."""
    torch.manual_seed(0)
    try:
        return run(function)
    except Exception as e:
        return e


def difference(got, expected, rtol: float, atol: float) -> str:
    """"" if the two agree, else the first place where they do not, in words."""
    if isinstance(expected, Exception) or isinstance(got, Exception):
        return "" if type(got) is type(expected) else "one is an error"
    if isinstance(expected, dict):
        if not isinstance(got, dict) or got.keys() != expected.keys():
            return f"expected a dict with the names {list(expected)}"
        inner = {name: difference(got[name], expected[name], rtol, atol) for name in expected}
        return next((f"[{name!r}] {text}" for name, text in inner.items() if text), "")
    if isinstance(expected, (tuple, list)):
        if not isinstance(got, (tuple, list)) or len(got) != len(expected):
            return f"expected {len(expected)} values"
        inner = [difference(g, e, rtol, atol) for g, e in zip(got, expected)]
        return next((f"[{i}] {text}" for i, text in enumerate(inner) if text), "")
    if isinstance(expected, (str, bool)):
        return "" if got == expected and isinstance(got, (str, bool, np.bool_)) else "not the same"
    try:
        a, b = array(got), array(expected)
    except (TypeError, ValueError):
        return f"got a {type(got).__name__}, expected numbers"
    if a.shape != b.shape:
        return f"got shape {a.shape}, expected {b.shape}"
    wrong = np.argwhere(~np.isclose(a, b, rtol, atol, equal_nan=True))
    if not len(wrong):
        return ""
    i = tuple(wrong[0].tolist())
    return f"{f'at index {i}: ' if i else ''}got {a[i]:.6g}, expected {b[i]:.6g}"


def array(x) -> np.ndarray:
    return x.detach().double().cpu().numpy() if torch.is_tensor(x) else np.asarray(x, dtype=float)


def explain(short: str, exercise: Exercise, case: Case, got, expected, where: str) -> str:
    """The message: which input, yours, expected, where, and what that means."""
    lines = [f"{short} differs from {exercise.origin}: {case.title}", ""]
    for name, value in {**case.shown, "": None, "yours": got, "expected": expected}.items():
        text = show(value)
        lines.append(f"  {name:<12}= {text if len(text) < 200 else text[:200] + ' ...'}" if name else "")
    if "got" in where:
        lines.append(f"  difference  : {where}")
    return "\n".join(lines + ["", textwrap.fill("What it means: " + " ".join(case.means.split()), 110)])


def show(x) -> str:
    """A value in one line: small tensors in full, large ones by shape and ends, functions by what they say of themselves."""
    if isinstance(x, Exception):
        frames = [f for f in traceback.extract_tb(x.__traceback__) if re.match(r"ex\d\d_", Path(f.filename).name)]
        place = f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""
        return f"{type(x).__name__}: {(str(x).splitlines() or [''])[0]}{place}"
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
