"""theorem.py -- put a bug in the place of the repository's function, run a theorem on it: does it die?

A theorem that never dies proves nothing. Each bug meets each theorem for real, in another process.

  $ python exercises/theorem.py bug02_mean_gradient test_lots_are_poisson  # pairs; prints what became of each
  $ python exercises/theorem.py bug02_mean_gradient test_dpsgd.py                # all theorems of a file
"""
import contextlib
import functools
import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grade import HERE, ROOT, load

SECONDS = 600                            # the longest that the theorems of all bugs may run together
BUGS = sorted(p.stem for p in (HERE / "bugs").glob("bug*.py"))


def answers(folder: Path = HERE) -> dict[str, str]:
    """bug -> what was answered, "" where nothing was; from a hand-in's answers.py, in it or in its bugs/."""
    file = next((p for p in (folder / "bugs" / "answers.py", folder / "answers.py") if p.exists()), None)
    given = load(file).ANSWERS if file else {}
    return {bug: str(given.get(bug, "")).strip() for bug in BUGS}


def replaced(bug: str) -> str:
    """The function that the bug stands in for: "dpsgd.private_gradient"."""
    return load(HERE / "bugs" / f"{bug}.py").STANDS_IN_FOR


@contextlib.contextmanager
def installed(bug: str, calls: list | None = None):
    """While this lasts, the function that the bug stands in for IS the bug; each call adds to `calls`.

    Yields (the right one, the wrong one).
    """
    module = load(HERE / "bugs" / f"{bug}.py")
    place, name = module.STANDS_IN_FOR.rsplit(".", 1)
    home = importlib.import_module(place)
    right, wrong = getattr(home, name), getattr(module, name)
    calls = [] if calls is None else calls

    @functools.wraps(wrong)
    def stand_in(*args, **kw):
        calls.append(bug)
        return wrong(*args, **kw)
    setattr(home, name, stand_in)
    exchange(right, stand_in)
    try:
        yield right, stand_in
    finally:
        setattr(home, name, right)
        exchange(stand_in, right)                           # also in tests that were first imported meanwhile


def exchange(old, new) -> None:
    """Tests that imported the function by name (`from accountant import rdp`) get the other one, too."""
    for module in list(sys.modules.values()):
        if str(vars(module).get("__file__")).startswith(str(ROOT / "tests")):
            for name in [name for name, value in vars(module).items() if value is old]:
                setattr(module, name, new)


class Witness:
    """A pytest plugin that notes how each case ended.

    A case whose assertion fails is a death. One that ends in any other exception is a crash: a program that
    stops publishes nothing, so a crash says nothing about privacy.
    """

    def __init__(self, calls: list):
        self.calls = calls                                               # of the bug, in the case that runs
        self.fates = {}                                          # theorem -> its cases, as (fate, why, calls)

    def pytest_runtest_setup(self, item):
        self.calls.clear()
        if any(fate == "died" for fate, _, _ in self.fates.get(item.originalname, [])):
            pytest.skip("one dead case is enough")

    def pytest_runtest_makereport(self, item, call):
        error = call.excinfo
        fate, why = "survived", ""
        if error is None and call.when != "call":
            return
        if error is not None:
            if error.errisinstance(pytest.skip.Exception):
                return
            fate = "died" if error.errisinstance((AssertionError, pytest.fail.Exception)) else "crashed"
            why = f"{item.name}: {error.exconly().splitlines()[0]}"
        self.fates.setdefault(item.originalname, []).append((fate, why, len(self.calls)))


def summary(cases: list[tuple[str, str, int]]) -> tuple[str, str]:
    """One theorem's fate: died if one of its cases did; else crashed, survived, or was never concerned."""
    calls = sum(case[2] for case in cases)
    if calls == 0:                                                       # whatever it died of was not the bug
        return "unconcerned", "0 calls"
    for fate in ("died", "crashed"):
        for case in cases:
            if case[0] == fate:
                return fate, case[1]
    return "survived", f"{calls} call{'s' * (calls != 1)} in {len(cases)} case{'s' * (len(cases) != 1)}"


def fates_on(bug: str, targets: list[str]) -> dict[str, tuple[str, str]]:
    """theorem -> (fate, why) for the theorems that pytest finds at `targets`, in this process."""
    calls = []
    witness = Witness(calls)
    with installed(bug, calls):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            # without the second plugin, which collects garbage five times over: a second for each bug
            pytest.main([*targets, "-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception",
                         f"--rootdir={ROOT}"], plugins=[witness])
    return {name: summary(cases) for name, cases in witness.fates.items()}


def run(bug: str, names: list[str]) -> dict[str, tuple[str, str]]:
    """theorem -> (fate, why), on one bug, in this process; "unknown" for what is no theorem."""
    files = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if p.stem != "test_exercises"]
    homes = {name: [p for p in files if re.search(rf"^def {re.escape(name)}\(", p.read_text(), re.M)]
             for name in names}
    found = fates_on(bug, [f"{home}::{name}" for name in names
                           for home in homes[name]]) if any(homes.values()) else {}
    for name in names:
        if not homes[name]:
            found[name] = ("unknown", f"tests/ has no theorem called {name!r}; `grep -n 'def test_' "
                           f"tests/*.py` lists them")
        elif name not in found:
            found[name] = ("unknown", f"{name} did not run: try `python -m pytest "
                           f"{homes[name][0].relative_to(ROOT)}`")
    return found


def judge(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(fate, why) for each (bug, theorem), all in one fresh process: no bug can linger in this one.

    Errors: it ends otherwise than by itself, or does not end -> RuntimeError with the end of what it said
    """
    command = [sys.executable, __file__, "--json", *(word for pair in pairs for word in pair)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=SECONDS)
    except subprocess.TimeoutExpired as e:                   # pytest says where it stands
        said = (e.stderr or b"")[-4000:].decode()
        raise RuntimeError(f"theorem.py did not end within {SECONDS} s:\n{said}") from None
    if done.returncode:
        raise RuntimeError(f"theorem.py ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return [tuple(fate) for fate in json.loads(done.stdout.splitlines()[-1])]


def check(given: dict[str, str]) -> dict[str, tuple[str, str]]:
    """bug -> ("done", "blank" or "wrong", message) for the theorem that the student named."""
    named = {}
    for bug, answer in given.items():
        found = re.search(r"test_\w+\b(?!\.py)", answer)              # also out of "test_dpsgd.py::test_x[0]"
        if answer:
            named[bug] = found[0] if found else answer
    fates = dict(zip(named, judge(list(named.items())))) if named else {}
    return {bug: verdict(bug, named.get(bug, ""), *fates.get(bug, ("", ""))) for bug in given}


def verdict(bug: str, name: str, fate: str, why: str) -> tuple[str, str]:
    short = bug[:5]
    if fate == "":
        return "blank", (f"{short} is still unanswered: read exercises/bugs/{bug}.py, find what breaks the "
                         f"guarantee, and "
                         "write the name of the theorem that dies of it into exercises/bugs/answers.py")
    if fate == "died":
        return "done", f"{short} is caught: {why}"
    if fate == "unknown":
        return "wrong", f"{short}: {why}"
    if fate == "survived":
        return "wrong", (f"{short}: {name} runs the bug ({why}) and SURVIVES it, so that is not what breaks. "
                         "Which sentence of the proof is untrue now?")
    if fate == "crashed":
        return "wrong", (f"{short}: {name} CRASHES on it ({why}). A program that stops publishes nothing: "
                         "look for a theorem whose own assertion fails.")
    place = replaced(bug)
    return "wrong", (f"{short}: {name} never runs {place}, which the bug replaces (0 calls). It may well "
                     f"say the right thing: "
                     f"look for a theorem about the same that does run it, such as a whole step "
                     f"(`grep -n {place.split('.')[1]} tests/*.py`). One that starts a program of its own "
                     f"does not count.")


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--json"]
    pairs = list(zip(words[::2], words[1::2]))
    found = {}
    for bug in dict.fromkeys(bug for bug, _ in pairs):
        names = [name for b, name in pairs if b == bug]
        for file in [name for name in names if name.endswith(".py")]:
            found[bug, file] = fates_on(bug, [str(ROOT / "tests" / file)])
        for name, fate in run(bug, [name for name in names if not name.endswith(".py")]).items():
            found[bug, name] = {name: fate}
    if "--json" in sys.argv:
        print(json.dumps([found[bug, name][name] for bug, name in pairs]))
        return
    for bug, name in pairs:
        for theorem, (fate, why) in found[bug, name].items():
            print(f"{bug}: {theorem} {fate}: {why}")


if __name__ == "__main__":
    main()
