"""mutation.py -- puts a bug in the place of the repository's function, and runs a property test on it.

A bug is caught if the student names the test of the one claim that it makes false, and adds a sentence.
"""
import ast
import contextlib
import functools
import importlib

from grade import HERE, Told, load, read
from progress import BUGS, short
from property_tests import TESTS


def replaced(bug: str) -> str:
    """The function that the bug replaces, such as "dpsgd.private_gradient"."""
    return load(HERE / "bugs" / f"{bug}.py").STANDS_IN_FOR


@contextlib.contextmanager
def installed(bug: str, calls: list):
    """Within this context the bug stands in the place of the function; each call is added to `calls`."""
    module = load(HERE / "bugs" / f"{bug}.py")
    place, name = module.STANDS_IN_FOR.rsplit(".", 1)
    home, wrong = importlib.import_module(place), getattr(module, name)
    right = getattr(home, name)

    @functools.wraps(wrong)
    def stand_in(*args, **kw):
        calls.append(bug)
        return wrong(*args, **kw)
    setattr(home, name, stand_in)
    try:
        yield
    finally:
        setattr(home, name, right)


@functools.cache
def fate(bug: str, name: str) -> tuple[str, str]:
    """The result of the test on the bug: ("fails", "holds", "crashes" or "never runs it", the reason).

    A test fails by its own assertion. Any other exception is a crash, which says nothing about privacy,
    because a program that stops publishes nothing.
    """
    calls, result = [], ("holds", "")
    with installed(bug, calls):
        try:
            TESTS[name]()
        except AssertionError as e:
            result = "fails", str(e)
        except Exception as e:
            result = "crashes", f"{type(e).__name__}: {e}"
    return result if calls else ("never runs it", "")


def check(bug: str, answer) -> tuple[str, str]:
    """("done", "blank" or "wrong", message) for an answer: (name of a test, who learns what, and how)."""
    if isinstance(answer, Told):
        return "wrong", f"{short(bug)}: {answer}"
    name, sentence = answer
    if not name:
        return "blank", (f"{short(bug)} is still unanswered: read exercises/bugs/{bug}.py, find the claim of "
                         f"the proof that it makes false, and write the name of that claim's test in "
                         f"exercises/property_tests.py into exercises/bugs/answers.py")
    became, why = fate(bug, name) if name in TESTS else ("unknown", "")
    others = []                                              # bugs on which the test fails as well
    if became == "fails":
        others = [other for other in BUGS if other != bug and fate(other, name)[0] == "fails"]
    if became == "fails" and not others and len(sentence.split()) >= 6:
        return "done", f"{short(bug)} is caught: {why}. You say: {sentence}"
    told = {
        "unknown": "is no test of exercises/property_tests.py. Run that file to see the names of all tests",
        "holds": "runs the bug and HOLDS, so its claim is still true. Which claim is false now?",
        "crashes": f"crashes ({why}). This is no catch, because a program that stops publishes nothing.",
        "never runs it": f"never runs {replaced(bug)}, which the bug replaces. Its claim may be the right "
                         f"one, but it cannot see this bug. Look for a test that runs that function.",
        "fails": "is the right test. Now write after it, in a sentence of at least six words, who learns "
                 "what, and how."}
    if others:
        told["fails"] = (f"also fails on other bugs ({len(others)}), so it is about more than one claim of "
                         f"the proof. Look for the test of the ONE claim that is false now.")
    return "wrong", f"{short(bug)}: {name} {told[became]}"


def answer(bug: str, folder=HERE) -> tuple[str, str]:
    """The answer for this bug in bugs/answers.py or answers.py of a hand-in. The file is read, never run.

    Errors: the name ANSWERS has no dict that is written out -> Told
    """
    files = [file for file in (folder / "bugs" / "answers.py", folder / "answers.py") if file.exists()]
    if not files:
        return "", ""
    given = None
    for node in read(files[0]).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ANSWERS":
            with contextlib.suppress(Exception):
                given = ast.literal_eval(node.value)
    if not isinstance(given, dict):
        raise Told("answers.py needs `ANSWERS = {...}` with all names and sentences written out, since it is "
                   "read, not run")
    found = given.get(bug, given.get(short(bug), ""))
    found = found if isinstance(found, (tuple, list)) else [found]       # the name alone
    name, sentence, *_ = [" ".join(str(part).split()) for part in found] + ["", ""]
    return name, sentence
