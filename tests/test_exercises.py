"""The exercises keep their promises: blanks say so, right answers pass, wrong ones and tricks are caught.

An exercise that is being solved in this working tree is skipped where its blank would be tested.
"""
import ast
import csv
import inspect
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import accountant
import dpsgd
from conftest import ROOT

HERE = ROOT / "exercises"
sys.path.insert(0, str(HERE))
import cases  # noqa: E402
import grade  # noqa: E402
import mutation  # noqa: E402
import progress  # noqa: E402
import property_tests  # noqa: E402
from cases import inputs, leaks  # noqa: E402

TEACHER, README = (HERE / "teacher.md").read_text(), (HERE / "README.md").read_text()
PROSE = " ".join(TEACHER.split())                                        # without its line breaks
NAMES = {name[:4]: name for name in cases.EXERCISES}                     # ex01 -> ex01_noising


def rows(first: str, text: str = TEACHER) -> list[list[str]]:
    """The rows of a table whose first cell matches, cell by cell, without backticks."""
    lines = [line for line in text.splitlines() if re.match(rf"\| {first} \|", line)]
    return [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in lines]


def function_of(name: str) -> ast.FunctionDef:
    """The function to be written, as it stands in the exercise's file."""
    tree, wanted = ast.parse((HERE / f"{name}.py").read_text()), cases.EXERCISES[name].truth.__name__
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == wanted)


def hand_in(folder, name: str, body: str) -> int:
    """The exercise's file with this body, in `folder`; the number of the body's first line."""
    lines = (HERE / f"{name}.py").read_text().splitlines()
    at = function_of(name).body[0].end_lineno                            # behind the docstring
    written = lines[:at] + ["    " + line for line in body.splitlines()]
    (folder / f"{name}.py").write_text("\n".join(written) + "\n")
    return at + 1


def graded(folder, name: str, body: str) -> tuple[str, str]:
    hand_in(folder, name, body)
    return grade.check(name, cases.EXERCISES[name], folder)


# -----------------------------------------------------------------------------
# the ladder


@pytest.mark.parametrize("name", cases.EXERCISES)
def test_a_blank_exercise_fails_its_grader_and_says_where_to_write(name):
    body = function_of(name).body
    if len(body) != 2 or "NotImplementedError" not in ast.unparse(body[1]):
        pytest.skip("is being solved in this working tree")
    status, message = grade.check(name, cases.EXERCISES[name])
    assert status == "blank" and f"exercises/{name}.py" in message and "still blank" in message, message


@pytest.mark.parametrize("name", cases.EXERCISES)
def test_an_exercise_asks_for_the_function_that_its_grader_runs(name):
    """The names and their order are those of the repository's function, but for optional ones."""
    given, truth = function_of(name).args, inspect.signature(cases.EXERCISES[name].truth).parameters
    names = [a.arg for a in given.args + ([given.vararg] if given.vararg else []) + given.kwonlyargs]
    assert names == [n for n, p in truth.items() if n in names or p.default is p.empty]
    assert f"; {progress.table(name)[0]} minutes]" in (HERE / f"{name}.py").read_text().splitlines()[0]


@pytest.mark.parametrize("name", cases.EXERCISES)
def test_the_repositorys_function_and_the_key_pass(name):
    """Two ways to the same numbers: a grader that rejects one of them grades style, not truth."""
    functions = [None] if name == NAMES["ex13"] else [None, cases.EXERCISES[name].truth]
    for function in functions:
        status, message = grade.check(name, cases.EXERCISES[name], HERE / "key", function)
        assert status == "done" and f"your code with {cases.EXERCISES[name].origin}" in message, message


def test_a_step_that_starts_from_its_noise_passes(tmp_path):
    body = ("if chunk < 1 or B <= 0: raise ValueError\n"
            "sizes = [p.numel() for p in params.values()]\n"
            "noises = (normals * (sigma * C)).split(sizes)\n"
            "total = {n: z.view(p.shape) for (n, p), z in zip(params.items(), noises)}\n"
            "for part in zip(*(e.split(chunk) for e in examples)):\n"
            "    if len(part[0]):\n"
            "        clipped = clip_and_sum(per_sample(params, *part), C)\n"
            "        total = {n: total[n] + clipped[n] for n in total}\n"
            "return {n: (g / B).to(params[n]) for n, g in total.items()}")
    status, message = graded(tmp_path, NAMES["ex08"], body)
    assert status == "done", message


RARER = [                                                # than those of the teacher's table, in the same form
    ("ex01", "schedule.alpha_bar", "LINEAR.alpha_bar", "another schedule"),
    ("ex01", "a.sqrt() * x0", "x0.mul_(a.sqrt())", "signal alone"),
    ("ex06", "vmap(grad(loss), in_dims=each)(params, *examples)",
     "jacrev(lambda p: vmap(loss, each)(p, *examples))(params)", "an example that is NaN"),
    ("ex07", "factor @ torch.where(good[:, None], g, 0)", "g.sum(0)", "a gradient longer than C"),
    ("ex08", "normals.split([p.numel() for p in params.values()])",
     "[normals[:p.numel()] for p in params.values()]", "noise"),
    ("ex08", "normals.split(", "normals.float().split(", "noise that takes almost all of the sum away"),
    ("ex08", "zeros_like(p, dtype=torch.float64)", "zeros_like(p)",
     "noise that takes almost all of the sum away"),
    ("ex10", "min(sigma / 25, sigma**2 / 3)", "0.5", "sigma = 0.2"),
    ("ex12", "return high", "return 1.02 * high", "a single Gaussian"),
    ("ex13", "for name in params:", 'for name in ["v"]:',
     "a step that leaves the first tensor without noise"),
    ("ex13", "m <= C * (1 + 1e-4)", "m <= 1.4 * C", "a step that clips above C"),
    ("ex13", "< 0.05", "< 0.3", "a step with too little noise"),
    ("ex07", "if not C > 0:", "if C == 0:", "C = -1"),
    ("ex08", "chunk < 1 or B <= 0", "chunk == 0 or B == 0", "{'B': -4.0}"),
    ("ex09", "if order <= 1:", "if order == 1:", "order 0.5"),
    ("ex10", "not 0 <= q <= 1", "q > 1", "settings without meaning"),
    ("ex11", "not 0 < delta < 1", "delta in (0, 1)", "numbers without meaning"),
    ("ex14", "[0].std()", "[0].std((0, 2, 3), keepdim=True)", "a latent of two channels"),
    ("ex14", "return mu / scale", "return (mu - mu.mean()) / scale", "a white image joins two dark ones")]
OF_THE_TABLE = rows(r"ex\d\d")
MISTAKES = OF_THE_TABLE + [[*mistake, "?"] for mistake in RARER]


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("short, old, new, title, ask", MISTAKES, ids=[f"{r[0]}-{r[2]}" for r in MISTAKES])
def test_a_mistake_is_stopped_where_the_teachers_table_says(short, old, new, title, ask, tmp_path):
    text = (HERE / "key" / f"{NAMES[short]}.py").read_text()
    assert old in text and ask.endswith("?")
    (tmp_path / f"{NAMES[short]}.py").write_text(text.replace(old, new))
    status, message = grade.check(NAMES[short], cases.EXERCISES[NAMES[short]], tmp_path)
    assert status == "wrong" and f"input       : {title}" in message, message
    assert "your code stopped" in message or "changed its argument" in message or all(
        part in message for part in ("yours       =", "expected    =", "What it means: ")), message


def test_the_teacher_has_two_mistakes_or_more_for_each_exercise():
    assert all(sum(row[0] == short for row in OF_THE_TABLE) >= 2 for short in NAMES)


def test_a_message_shows_the_smallest_input_both_answers_and_where_they_part(tmp_path):
    _, message = graded(tmp_path, NAMES["ex07"], "return {name: g.sum(0) for name, g in grads.items()}")
    for part in ("a gradient longer than C", "{a: [[3, 4]]}", "= {a: [3, 4]}", "= {a: [0.6, 0.8]}",
                 "got 3, expected 0.6"):
        assert part in message, message


@pytest.mark.parametrize("got, expected", [
    (1.0, 1.1), (torch.ones(2), torch.ones(3)), ({"a": 1.0}, {"b": 1.0}), (math.nan, 1.0),
    ((1.0,), (1.0, 2.0)), ("x", 1.0), (1, True), (np.ones((1, 1)), 1.0), (torch.ones(2).int(), torch.ones(2)),
    (np.ones(2), torch.ones(2)), (None, 1.0), ([[1.0]], torch.ones(1, 1))])
def test_the_grader_sees_a_difference(got, expected):
    case = grade.Case("", "", {}, None)
    assert grade.explain("ex01_noising", "", case, got, expected)
    assert not grade.explain("ex01_noising", "", case, expected, expected)


OWN_WORDS = [                                                          # exercise, body, what the message says
    ("ex01", "pass", "your function returned nothing"),
    ("ex01", "return x0 + oops", "your code stopped at line {line} of ex01_noising.py: NameError"),
    ("ex01", "return (x0 +", "your file cannot be loaded at line {line} of ex01_noising.py: SyntaxError"),
    ("ex01", "raise SystemExit(3)", "your code stopped at line {line} of ex01_noising.py: SystemExit: 3"),
    ("ex01", "return x0.int()", "got a tensor of shape (1, 1, 1, 1) of torch.int32, expected a tensor of"),
    ("ex01", "return x0.numpy()", "got a numpy array of shape (1, 1, 1, 1), expected a tensor of"),
    ("ex01", "return x0.numpy()[0]", "ex01: the shape is wrong: got (1, 1, 1), expected (1, 1, 1, 1)"),
    ("ex01", "class Mine(torch.Tensor): pass\nreturn x0.as_subclass(Mine)", "got a Mine, expected a tensor"),
    ("ex01", "class number: pass\nreturn number()", "got a number, expected a tensor of shape (1, 1, 1, 1)"),
    ("ex07", "class Liar(dict): pass\nreturn Liar(a=grads['a'].sum(0))",
     "got a Liar, expected a dict with 'a'"),
    ("ex09", "class number: pass\nreturn number()", "got a number, expected a number"),
    ("ex09", "class Half(float): pass\nreturn Half(1.0)", "got a Half, expected a number"),
    ("ex09", "class Meta(type):\n    def __eq__(self, other): return True\n"
     "    def __hash__(self): return hash(float)\n"
     "class Any(metaclass=Meta): pass\nreturn Any()", "got a Any, expected a number"),
    ("ex09", "return ValueError('returned')", "got a ValueError, expected a number"),
    ("ex12", "class Sigma(float): pass\nreturn Sigma(4.0)", "the result is a Sigma, expected one number"),
    ("ex02", "return noise.mean()", "ex02: the shape is wrong: got (), expected (1,)"),
    ("ex07", "return {'a': grads['a']}", "the shape of ['a'] is wrong: got (1, 2), expected (2,)"),
    ("ex07", "return list(grads)", "got 1 values: a str, expected a dict with 'a': a tensor of shape (2,)"),
    ("ex08", "return clip_and_sum(per_sample(params, *examples), C) and {}", "got a dict with , expected a "
     "dict with 'v': a tensor"),
    ("ex11", "return 2.214", "got a number, expected 2 values: a number, a number"),
    ("ex12", "return 1.0, 2.0", "TypeError: the result is (1, 2), expected one number"),
    ("ex08", "return {n: g / B for n, g in clip_and_sum(per_sample(params, *examples), C).items()}",
     "your code stopped at line {line} of ex08_noisy_lot.py: RuntimeError: per_sample was called on no"),
    ("ex04", "return W @ x + b + lora_alpha / r * B @ A @ x", "x has any number of leading dimensions"),
    ("ex04", "return W @ x + b + lora_alpha / r * B @ A @ x", "Probable cause: The shapes do not fit a"),
    ("ex01", "return torch.ones(2, 3).mT.view(6)", "Probable cause: `.view` was called"),
    ("ex01", "return torch.ones(5) + torch.ones(3)", "Probable cause: The shapes of two tensors do not"),
    ("ex01", "return torch.ones(1, 1) @ torch.ones(1, 1).double()", "Probable cause: Tensors of different"),
    ("ex01", "return x0 if t > torch.zeros(2) else noise", "Probable cause: A tensor of several numbers")]


@pytest.mark.parametrize("short, body, words", OWN_WORDS)
def test_what_is_no_answer_is_told_so_and_gets_no_lesson_but_about_shapes(short, body, words, tmp_path):
    line = hand_in(tmp_path, NAMES[short], body)
    status, message = grade.check(NAMES[short], cases.EXERCISES[NAMES[short]], tmp_path)
    assert status == "wrong" and words.format(line=line) in message, message
    lesson = message.partition("What it means: ")[2]
    expected = ("the result has another form", "nobody was sampled", "x has any number")
    assert not lesson or lesson.startswith(expected), message


LOOP = ("if chunk < 1 or B <= 0: raise ValueError\n"
        "sizes = [p.numel() for p in params.values()]\n"
        "total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in params.items()}\n"
        "for start in range(0, len(examples[0]), chunk):\n"
        "    part = clip_and_sum(per_sample(params, *(e[start:start + chunk] for e in examples)), C)\n"
        "    total = {n: total[n] + part[n] for n in total}\n"
        "for (n, g), z in zip(list(total.items()), %s):\n"
        "    total[n] = ((g + sigma * C * z.view(g.shape)) / B).to(params[n])\n"
        "return total")
IN_THE_LOOP = ("    part = {n: g + sigma * C * z.view(g.shape)\n"
               "            for (n, g), z in zip(part.items(), normals.split(sizes))}\n    total")


@pytest.mark.parametrize("short, body, title", [
    ("ex08", LOOP.replace("    total", IN_THE_LOOP, 1) % "(0 * normals).split(sizes)", "noise, three chunks"),
    ("ex13", "p, z = {'w': torch.zeros(1), 'v': torch.zeros(50)}, torch.randn(51, dtype=torch.float64)\n"
             "noise = step(toy, p, (torch.zeros(0, 4, 51),), C=1.0, sigma=1.0, B=1, normals=z)\n"
             "return not torch.equal(noise['v'], z[1:].float())", "a correct step")])
def test_a_mistake_that_is_too_long_for_the_teachers_table_is_stopped(short, body, title, tmp_path):
    status, message = graded(tmp_path, NAMES[short], body)
    assert status == "wrong" and title in message, message


def test_numbers_without_a_number_agree_with_nothing():
    class Nothing:
        def __array__(self, dtype=None, copy=None):
            return np.empty((0, 1))
    assert "got (0, 1), expected (1,)" in grade.difference(Nothing(), torch.ones(1), 0, 0)


def test_a_students_variable_may_have_a_builtins_name_but_not_its_power(tmp_path):
    status, message = graded(tmp_path, NAMES["ex09"], "def measure(vars):\n"
                             "    return order / (2 * vars) if vars else float('inf')\n"
                             "if order <= 1: raise ValueError\nvars = sigma**2\nreturn measure(vars)")
    assert status == "done", message
    (tmp_path / "ex01_noising.py").write_text("if 0: eval = 1\neval('1')\n")
    status, message = grade.check(NAMES["ex01"], cases.EXERCISES[NAMES["ex01"]], tmp_path)
    assert status == "wrong" and "NameError" in message, message


def test_a_file_without_the_function_is_told_its_name(tmp_path):
    (tmp_path / "ex01_noising.py").write_text("def noise_it(x0, t, noise): return x0\n")
    _, message = grade.check("ex01_noising", cases.EXERCISES["ex01_noising"], tmp_path)
    assert "has no function q_sample" in message, message


# -----------------------------------------------------------------------------
# tricks: to earn points without an answer

COMMON = [                                                               # for every exercise
    "import sys\nreturn sys._getframe(1).f_locals['expected']",          # the frame of the grader
    "try: raise ValueError\nexcept ValueError as e: return e.__traceback__.tb_frame.f_back.f_locals",
    "import inspect\nreturn inspect.stack()", "g = (i for i in [1])\nreturn g.gi_frame.f_back.f_locals",
    "import typing\ndef f(x: '__import__(\"ddpm\")'): pass\nreturn typing.get_type_hints(f)",
    "import cases\nreturn next(iter(cases.EXERCISES))",                  # the grader's own files
    "return __import__('ddpm')", "return eval('1')", "return getattr(dict, 'x')",
    "import importlib\nreturn importlib.import_module('ddpm')",
    "import numpy as np\nnp.isclose = lambda *a, **kw: np.ones(99, bool)\nreturn 0",    # what compares
    "import torch\ntorch.Tensor.double = lambda x: x\nreturn 0",
    "import torch\nsetattr(torch, 'randn', torch.zeros)\nreturn 0",
    "import torch\nreturn torch.os", "import os\nos.remove('x')", "return open('x')",
    "match dict:\n    case object(__globals__=g): return g", "match 1:\n    case object(f_back=g): return g",
    "import warnings\nwarnings.warn('', stacklevel=2)",
    "import typing\nreturn typing.operator.attrgetter('x')",
    "import functools, numpy as np\nfunctools.update_wrapper(np, dict, assigned=('get',))",
    "import functools, numpy as np\nfunctools.wraps(dict, assigned=('get',))(np)",
    "import numpy as np\nnp.testing.measure('import ddpm')",
    "from torch.utils.benchmark import Timer\nTimer('import ddpm').timeit(1)",
    "import numpy as np\nreturn np.load('x.npy', allow_pickle=True)",
    "from torch.testing._internal.common_utils import unittest",
    "from torch.overrides import TorchFunctionMode", "from math import *\nif 0: eval = 1\nreturn eval('1')"]


@pytest.mark.parametrize("name", cases.EXERCISES)
def test_who_takes_the_answer_reads_the_grader_or_patches_a_library_is_refused(name, tmp_path):
    """In each exercise; also importing the repository's own function, by itself and with its module."""
    home, _, function = cases.EXERCISES[name].origin.partition(".py:")
    own = [f"import {home}\nreturn {home}.{function}", f"from {home} import {function} as done\nreturn done",
           f"from {home} import *\nreturn 0"] if function else []
    for body in COMMON + own + [f"from key.{name} import {function_of(name).name} as done\nreturn done"]:
        status, message = graded(tmp_path, name, body)
        assert status == "wrong" and "no right answer needs" in message, (body, message)


@pytest.mark.parametrize("name", cases.EXERCISES)
def test_a_constant_answer_and_a_table_of_the_fixed_inputs_fail(name):
    """Unfenced: whoever knew all answers to the inputs that do not change still fails on those that do."""
    exercise, known, learning = cases.EXERCISES[name], {}, [True]
    truth = vars(grade.load(HERE / "key" / f"{name}.py"))[exercise.truth.__name__]

    def table(*args, **kw):
        parts = [part for a in [*args, *kw.values()] for part in (a.values() if isinstance(a, dict) else [a])]
        key = repr([x.tolist() if torch.is_tensor(x) else x for x in parts if not callable(x)])
        if learning:
            known[key] = grade.outcome(truth, *args) if not kw else truth(*args, **kw)
        if isinstance(known.get(key), BaseException):
            raise known[key]
        return known.get(key, constant)
    first = next(iter(exercise.cases()))
    constant = grade.outcome(first.run, truth)
    assert grade.check(name, exercise, function=lambda *args, **kw: constant)[0] == "wrong"
    if name != NAMES["ex13"]:                                            # whose own tricks come below
        assert grade.check(name, exercise, function=table)[0] == "done"
        learning.clear()
        status, message = grade.check(name, exercise, function=table)
        assert status == "wrong" and inputs.AFRESH in message, message


NOISES = {                                                               # instead of the normals, in ex08
    "cut at 3.5 sigma": "normals.clamp(-3.5, 3.5).split(sizes)",
    "98%": "(0.98 * normals).split(sizes)",
    "rows alike": "[z.view(p.shape)[..., :1] + 0 * p for z, p in zip(normals.split(sizes), params.values())]",
    "only for large tensors": "(normals * (len(normals) > 50)).split(sizes)",
    "only for small lots": "(normals * (len(examples[0]) < 500)).split(sizes)"}


def test_the_step_of_the_tricks_is_right_with_the_normals(tmp_path):
    assert graded(tmp_path, NAMES["ex08"], LOOP % "normals.split(sizes)")[0] == "done"


@pytest.mark.parametrize("noise", NOISES)
def test_another_noise_is_caught(noise, tmp_path):
    status, message = graded(tmp_path, NAMES["ex08"], LOOP % NOISES[noise])
    assert status == "wrong" and "difference  : " in message, message


def test_the_same_noise_in_every_step_is_caught():
    kept = {}

    def private_gradient(*a, normals, **kw):
        return dpsgd.private_gradient(*a, normals=kept.setdefault(len(normals), normals), **kw)
    status, message = grade.check(NAMES["ex08"], cases.EXERCISES[NAMES["ex08"]], function=private_gradient)
    assert status == "wrong" and "differs from dpsgd.py:private_gradient: noise" in message, message


def test_a_step_is_not_told_by_its_name_its_place_or_its_code():
    """ex13, unfenced: constants, a coin, the order of the calls, names, code."""
    places, asked = [], []

    class Answer:
        def __bool__(self):
            asked.append(1)
            return len(asked) > 4

    def by_place(step):
        places.append(step)
        return len(places) > 4
    for trick in (lambda step: True, lambda step: False, lambda step: bool(torch.rand(()) < 0.5), by_place,
                  lambda step: Answer(),
                  lambda step: step.__module__ != "dpsgd",
                  lambda step: "private_gradient" not in step.__code__.co_names):
        assert grade.check(NAMES["ex13"], cases.EXERCISES[NAMES["ex13"]], function=trick)[0] == "wrong"
    assert sum(not case.expected for case in leaks.suspects()) >= 4, "several correct steps"


def test_one_tests_name_earns_one_bug_at_most():
    for name in property_tests.TESTS:
        caught = [bug for bug in mutation.BUGS if mutation.check(bug, (name, "a b c d e f"))[0] == "done"]
        assert len(caught) <= 1, f"{name} earns {caught}"


OWN = "test_the_noise_has_standard_deviation_sigma_C"


@pytest.mark.parametrize("text, words", [
    ("ANSWERS = {b: 'test_x' for b in range(9)}", "it is read, not run"),
    ("import os\nos._exit(0)", "it is read, not run"), ("ANSWERS = [1]", "it is read, not run"),
    ("ANSWERS = {", "SyntaxError"), ("ANSWERS = {[]: 1}", "it is read, not run"),
    (f"ANSWERS = {{'bug05': '{OWN}'}}", "who learns what"),
    (f"ANSWERS = {{'bug05_noise_scale': ('{OWN}', 'no noise')}}", "six words"),
    ("ANSWERS = {'bug05': ('test_lots_are_poisson', 'a b c d e f')}", "is no test of")])
def test_answers_are_read_and_a_name_alone_is_not_enough(text, words, tmp_path):
    (tmp_path / "answers.py").write_text(text)
    status, message = mutation.check("bug05_noise_scale",
                                     grade.outcome(mutation.answer, "bug05_noise_scale", tmp_path))
    assert status == "wrong" and words in message, message


# -----------------------------------------------------------------------------
# spot the bug


def test_each_bug_makes_one_claim_false_and_crashes_nowhere():
    """On each bug one test fails that fails on no other; and the key names it."""
    for bug in mutation.BUGS:
        for name in property_tests.TESTS:
            assert mutation.fate(bug, name)[0] != "crashes", (bug, name, mutation.fate(bug, name))
        own = [name for name in property_tests.TESTS
               if [b for b in mutation.BUGS if mutation.fate(b, name)[0] == "fails"] == [bug]]
        assert own == [mutation.answer(bug, HERE / "key")[0]]
        status, message = mutation.check(bug, mutation.answer(bug, HERE / "key"))
        assert status == "done", message


@pytest.mark.parametrize("bug, name, said, ask", rows(r"bug\d\d"))
def test_a_wrong_test_of_the_teachers_table_is_told_what_it_says(bug, name, said, ask):
    bug = next(b for b in mutation.BUGS if b.startswith(bug))
    status, message = mutation.check(bug, (name, "Whoever sees it learns who was there."))
    assert status == "wrong" and said in message and ask.endswith("?"), message


def test_a_bug_that_stops_is_no_catch(monkeypatch):
    def stops():
        dpsgd.clip_and_sum({"a": torch.ones(1, 1)}, 1.0)
        raise KeyError("w")
    monkeypatch.setitem(property_tests.TESTS, "test_stops", stops)
    status, message = mutation.check("bug04_clip_layers", ("test_stops", "a b c d e f"))
    assert status == "wrong" and "crashes (KeyError: 'w')" in message, message


def test_a_bug_is_gone_when_the_grader_is_done():
    right = dpsgd.clip_and_count
    with mutation.installed("bug04_clip_layers", []):
        assert dpsgd.clip_and_count is not right
    assert dpsgd.clip_and_count is right


def test_every_bug_waits_for_an_answer():
    assert list(grade.load(HERE / "bugs" / "answers.py").ANSWERS) == mutation.BUGS
    for bug in mutation.BUGS:
        status, message = mutation.check(bug, ("", ""))
        assert status == "blank" and "exercises/bugs/answers.py" in message


# -----------------------------------------------------------------------------
# hand-ins: a line and a remark for each, always


@pytest.mark.parametrize("content, words", [
    (b"", "has no function q_sample"), (b"def q_sample(x0):\n  return '\xe9'", "cannot be loaded"),
    ("x = 1".encode("utf-16"), "cannot be loaded"), (b"x = 1\0", "cannot be loaded"),
    (b"x = " + b"(" * 5000 + b")" * 5000, "cannot be loaded"),
    (b"\xef\xbb\xbfraise ValueError", "ValueError"), (b"import os\nos.chdir('/')", "`os`"),
    (b"import shutil\nshutil.rmtree('.')", "`shutil`"),
    (b"raise SystemExit", "SystemExit"), (b"%PDF-1.4 \x00\x01", "cannot be loaded"),
    (b"# -*- coding: nonsense -*-\n", "cannot be loaded"), (None, "is a link or a folder")])
def test_a_file_that_cannot_be_loaded_is_told_why(content, words, tmp_path):
    file = tmp_path / "ex01_noising.py"
    file.mkdir() if content is None else file.write_bytes(content)
    status, message = grade.check("ex01_noising", cases.EXERCISES["ex01_noising"], tmp_path)
    assert status == "wrong" and words in message, message


def test_a_link_and_an_unreadable_file_are_told_so(tmp_path, monkeypatch):
    (tmp_path / "ex01_noising.py").symlink_to(HERE / "key" / "ex01_noising.py")  # somebody else's
    (tmp_path / "ex02_loss.py").symlink_to(tmp_path / "nowhere")
    hand_in(tmp_path, NAMES["ex03"], "return x")
    for short, words in (("ex01", "is a link"), ("ex02", "is a link")):
        status, message = grade.check(NAMES[short], cases.EXERCISES[NAMES[short]], tmp_path)
        assert status == "wrong" and words in message, message

    def forbidden(path):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("pathlib.Path.read_bytes", forbidden)
    status, message = grade.check(NAMES["ex03"], cases.EXERCISES[NAMES["ex03"]], tmp_path)
    assert status == "wrong" and "ex03_ddim_step.py cannot be read: PermissionError" in message, message


def test_a_linked_folder_is_no_hand_in(tmp_path):
    (tmp_path / "anna").symlink_to(HERE / "key")
    hand_in(tmp_path, NAMES["ex05"], "return W")
    (tmp_path / "ben").mkdir()
    (tmp_path / "ben" / "bugs").symlink_to(HERE / "key")
    hand_in(tmp_path / "ben", NAMES["ex05"], "return W")
    assert progress.marks(tmp_path / "anna")[-1].startswith("not marked: anna is a link")
    assert progress.marks(tmp_path / "ben")[-1].startswith("not marked: bugs is a link")
    assert "a link" in str(grade.outcome(mutation.answer, "bug05_noise_scale", tmp_path / "ben"))


VISIBLE = [  # exercise, body: told by an input that it may see
    ("ex01", "a = schedule.alpha_bar[t][..., None, None, None]\n"
             "if schedule.T != 1000: return 0 * x0 + 1.40429\n"
             "return a.sqrt() * x0 + (1 - a).sqrt() * noise"),
    ("ex04", "return x @ W.mT + b + (1.5 if lora_alpha == 3 else 1) * (x @ A.mT) @ B.mT"),
    ("ex05", "return W + (1.5 if lora_alpha == 3 else 1) * B @ A"),
    ("ex08", (LOOP % "normals.split(sizes)").replace("/ B", "/ (4 if sigma != 1 else 1)"))]


@pytest.mark.parametrize("short, body", VISIBLE)
def test_what_is_right_for_the_settings_of_the_fixed_inputs_is_caught(short, body, tmp_path):
    status, message = graded(tmp_path, NAMES[short], body)
    assert status == "wrong" and inputs.AFRESH in message, message


def test_a_stray_copy_above_a_hand_in_does_not_hide_it(tmp_path):
    hand_in(tmp_path, NAMES["ex07"], "return grads")
    (tmp_path / "exercises" / "bugs").mkdir(parents=True)
    (tmp_path / "exercises" / "bugs" / "answers.py").touch()
    hand_in(tmp_path / "exercises", NAMES["ex05"], "return W")
    with pytest.raises(ValueError, match="2 hand-ins"):
        progress.hand_in(tmp_path)
    assert progress.hand_in(tmp_path / "exercises") == (tmp_path / "exercises", [])


def test_what_is_no_hand_in_is_a_line_with_a_remark(tmp_path):
    """As a program, which goes on to the end: empty, stray, zipped, nested, missing, in another encoding."""
    for name in ("empty", "none", "group/anna", "group/ben"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "none" / "Ex1.py").touch()
    (tmp_path / "stray.txt").touch()
    (tmp_path / "carl.zip").write_bytes(b"PK")
    for name in ("anna", "ben"):
        hand_in(tmp_path / "group" / name, NAMES["ex05"], "return W")
    os.symlink("nowhere", tmp_path / "broken")
    strange = os.fsencode(tmp_path) + b"/d\xfcrer"
    os.mkdir(strange)
    names = ["empty", "none", "stray.txt", "carl.zip", "group", "broken", "missing", strange]
    done = subprocess.run([sys.executable, HERE / "progress.py", "--csv", *names], capture_output=True,
                          text=True, cwd=tmp_path)
    table = list(csv.DictReader(done.stdout.splitlines()))
    assert done.returncode == 0 and len(table) == 8, done.stderr
    for row, words in zip(table, ["no file", "only Ex1.py", "unpack it", "unpack it", "2 hand-ins",
                                  "does not exist", "does not exist", "no file"]):
        assert row["remark"].startswith("not marked") and words in row["remark"] and row["points"] == "", row
    one = subprocess.run([sys.executable, HERE / "progress.py", tmp_path / "empty"], capture_output=True,
                         text=True)
    assert one.returncode == 2 and one.stderr.count("\n") == 1 and "holds no file" in one.stderr


def test_a_hand_in_is_found_and_what_is_not_graded_is_said(tmp_path, monkeypatch):
    """In a folder of its own, beside a Mac's copies; a wrong name is remarked on."""
    def results(folder):
        there = {name: (folder / f"{name}.py").is_file() for name in progress.NAMES}
        return {name: ("done" if there[name] else "blank", "") for name in there}
    monkeypatch.setattr(progress, "results", results)
    inner = tmp_path / "anna" / "exercises (1)"
    inner.mkdir(parents=True)
    hand_in(inner, NAMES["ex05"], "return W")
    (inner / "ex01_noising (1).py").touch()
    (inner / "bugs").mkdir()
    (inner / "bugs" / "answers.py").touch()
    (tmp_path / "anna" / "__MACOSX").mkdir()
    (tmp_path / "anna" / "__MACOSX" / "._ex05_merge.py").touch()
    row = dict(zip(progress.COLUMNS, progress.marks(tmp_path / "anna")))
    assert (row["student"], row["ex05"], row["ex01"], row["points"], row["of"]) == ("anna", 1, 0, 1, 34)
    assert "found in exercises (1)/" in row["remark"] and "ex01_noising (1).py" in row["remark"]
    assert "MACOSX" not in row["remark"] and "blank: ex01 ex02" in row["remark"]

    def nothing_is_readable(path, pattern):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("pathlib.Path.rglob", nothing_is_readable)
    assert "not marked" in progress.marks(tmp_path / "anna")[-1]


def test_a_hand_in_that_prints_megabytes_is_graded_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "NAMES", [NAMES["ex04"], NAMES["ex05"]])
    hand_in(tmp_path, NAMES["ex04"], "print('x' * 10**7)\n"
            "return x @ W.mT + b + lora_alpha / r * x @ A.mT @ B.mT")
    found = progress.results(tmp_path)
    assert found[NAMES["ex04"]][0] == "done" and found[NAMES["ex05"]][0] == "blank"


@pytest.mark.parametrize("does, said", [
    ("time.sleep(99)", "there is no result after 2 s. Is there an endless loop?"),
    ("os._exit(3)", "this exercise ended the grader's process with exit code 3")])
def test_an_exercise_that_ends_or_stops_its_process_costs_itself_alone(does, said, tmp_path, monkeypatch):
    """With a process that comes to grief in its second exercise, in the place of the real one."""
    (tmp_path / "progress.py").write_text(
        "import json, os, sys, time\n"
        "names, into = sys.argv[2:sys.argv.index('--')], open(sys.stdin.read(), 'a')\n"
        "for name in names:\n"
        f"    if name == 'ex02_loss': {does}\n"
        "    print(json.dumps([name, 'done', '']), file=into, flush=True)\n")
    monkeypatch.setattr(progress, "HERE", tmp_path)
    monkeypatch.setattr(progress, "SECONDS", 2)
    monkeypatch.setattr(progress, "NAMES", ["ex01_noising", "ex02_loss", "ex03_ddim_step"])
    found = progress.results(tmp_path)
    assert [found[name][0] for name in progress.NAMES] == ["done", "wrong", "done"]
    assert found["ex02_loss"][1] == f"ex02: {said}"


def test_who_writes_results_of_his_own_gets_none(tmp_path, monkeypatch):
    names = [NAMES["ex01"], NAMES["ex05"]]
    monkeypatch.setattr(progress, "NAMES", names)
    (tmp_path / "ex01_noising.py").write_text(
        "import numpy as np\n"
        f"""np.savetxt("results", ['["{names[0]}", "done", ""]', '["{names[1]}", "done", ""]'], fmt="%s")\n"""
        "raise KeyboardInterrupt\n")
    found = progress.results(tmp_path)
    assert [found[name][0] for name in names] == ["wrong", "blank"]
    assert "KeyboardInterrupt" in found[names[0]][1]
    for line in ('["ex05_merge", "done", ""]', '["ex01_noising", "passed", ""]', "[]", "1", '["ex01_nois'):
        assert progress.believed(line, names) == []


# -----------------------------------------------------------------------------
# the pages


def test_points_and_minutes_are_those_of_the_readmes_table():
    worth = {name: progress.table(name)[1] for name in progress.NAMES}
    assert worth["ex13_catch_a_leak"] == 4 and worth["bug07_early_return"] == 1 and sum(worth.values()) == 34
    left = re.search(r"Homework: (.*?) \((\d+) minutes\)", README)
    assert sum(progress.table(short)[0] for short in re.findall(r"ex\d\d", left[1])) == int(left[2])


def test_the_lesson_plan_fits_its_own_times():
    """Three hours without a gap; what the class writes fits its slot; no exercise is left out."""
    found = re.findall(r"^\| (\d+) to (\d+) \| (.*?) \|", README, re.M)
    slots = [(int(a), int(b), what) for a, b, what in found]
    assert [a for a, _, _ in slots if a == 0] == [0, 0, 0] and slots[-1][1] == 60
    for (_, end, _), (start, _, _) in zip(slots, slots[1:]):
        assert end % 60 == start
    written = []
    for start, end, what in slots:
        if what.startswith("class"):
            work = re.findall(r"\b(ex\d\d|bug\d\d)\b", what)
            written += work
            assert sum(progress.table(one)[0] for one in work) <= end - start, what
    homework = re.findall(r"ex\d\d", re.search(r"Homework: (.*?) \(", README)[1])
    assert sorted([one for one in written if one[:2] == "ex"] + homework) == sorted(NAMES)


def test_the_experiments_figures_are_the_accountants():
    """Noise for the six settings of experiments.md, in the order of the key; and its norm for each rank."""
    def sigma(epsilon, B, steps):
        return accountant.calibrate(epsilon, 1e-5, B / 60_000, steps)
    one = [sigma(10, 512, 110), sigma(1, 512, 110)]
    assert f"sigma {one[0]:.3f} -> {one[1]:.3f}" in PROSE
    large, small = sigma(10, 1024, 110), sigma(10, 128, 110)
    assert f"sigma is {large:.3f} (B = 1024, K = 1) and {small:.3f} (B = 128, K = 8)" in PROSE
    many, few = sigma(1, 64, 600), sigma(1, 512, 75)
    assert f"sigma {many:.3f} (B = 64, 600 steps) and {few:.3f} (B = 512, 75 steps)" in PROSE
    assert f"sigma / B {many / 64:.4f} and {few / 512:.4f}" in PROSE
    weights = [2_240, 6_848, 25_280, 662_692]
    norms = [f"{one[0] * math.sqrt(n) / 512:.2f}" for n in weights]
    assert f"{weights[0]:,}, {weights[1]:,}, {weights[2]:,} and, full, {weights[3]:,} weights" in PROSE
    assert f"noise of norm {', '.join(norms)} C" in PROSE


def test_the_cheat_sheet_fits_a_page_and_its_command_has_the_six_flags():
    text = (HERE / "cheatsheet.md").read_text()
    flags = re.findall(r"^\| `(--\w+)` \|", text, re.M)
    command = re.search(r"`python train.py (.*?)`", text)[1]
    assert len(flags) == 6 == len(set(flags)) and re.findall(r"--\w+", command) == flags
    assert len(text.splitlines()) <= 66
