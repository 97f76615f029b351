"""theorem.py -- put a bug in the place of the repository's function, run a theorem of tests/ on it: does it die?

A theorem that never dies proves nothing. Each pair of a bug and a theorem is run for real, in a process of its own.

  $ python exercises/theorem.py bug02_mean_gradient test_lots_are_poisson        # pairs; prints what became of each
"""
import contextlib
import importlib
import io
import json
import re
import subprocess
import sys

import pytest

from grade import HERE, ROOT, load

BUGS = sorted(p.stem for p in (HERE / "bugs").glob("bug*.py"))


def answers() -> dict[str, str]:
    return load(HERE / "bugs" / "answers.py").ANSWERS


@contextlib.contextmanager
def installed(bug: str):
    """While this lasts, the function that the bug stands in for IS the bug. Yields (the right one, the wrong one)."""
    module = load(HERE / "bugs" / f"{bug}.py")
    place, name = module.STANDS_IN_FOR.split(".")
    home = importlib.import_module(place)
    right, wrong = getattr(home, name), getattr(module, name)
    setattr(home, name, wrong)
    try:
        yield right, wrong
    finally:
        setattr(home, name, right)


class Witness:
    """A pytest plugin: brings the bug also to tests that imported the function by name; notes how each case ended."""

    def __init__(self, right, wrong, patch):
        self.right, self.wrong, self.patch, self.deaths, self.cases = right, wrong, patch, [], 0

    def pytest_collection_modifyitems(self, items):
        for module in {item.module for item in items}:
            for name in [name for name, value in vars(module).items() if value is self.right]:
                self.patch.setattr(module, name, self.wrong)

    def pytest_runtest_logreport(self, report):
        self.cases += report.when == "call"
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash else str(report.longrepr)
            self.deaths.append(f"{report.nodeid.split('::')[1]}: {text.splitlines()[0]}")


def run(bug: str, name: str) -> tuple[str, str]:
    """("died", why), ("survived", in how many cases) or ("unknown", ...): one theorem on one bug, in this process."""
    name = name.split("::")[-1].split("[")[0].strip()
    homes = [p for p in sorted((ROOT / "tests").glob("test_*.py"))
             if re.search(rf"^def {re.escape(name)}\(", p.read_text(), re.M)]
    if not homes:
        return "unknown", f"tests/ has no theorem called {name!r}; `grep -n 'def test_' tests/*.py` lists their names"
    with installed(bug) as (right, wrong), pytest.MonkeyPatch.context() as patch:
        witness = Witness(right, wrong, patch)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            pytest.main([f"{homes[0]}::{name}", "-q", "-x", "-p", "no:cacheprovider", f"--rootdir={ROOT}"],
                        plugins=[witness])
    if witness.deaths:
        return "died", witness.deaths[0]
    return "survived", f"{witness.cases} case{'s' * (witness.cases != 1)}"


def judge(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """`run` for each (bug, theorem), all in one fresh process: no bug can linger in this one."""
    done = subprocess.run([sys.executable, __file__, "--json", *(word for pair in pairs for word in pair)],
                          capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"theorem.py ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return [tuple(fate) for fate in json.loads(done.stdout.splitlines()[-1])]


def check(given: dict[str, str]) -> dict[str, tuple[str, str]]:
    """bug -> ("done", "blank" or "wrong", message) for the theorem that the student named."""
    pairs = [(bug, name) for bug, name in given.items() if name.strip()]
    fates = dict(zip([bug for bug, _ in pairs], judge(pairs))) if pairs else {}
    results = {}
    for bug, name in given.items():
        short = bug[:5]
        fate, why = fates.get(bug, ("", ""))
        results[bug] = {
            "": ("blank", f"{short} is still unanswered: read exercises/bugs/{bug}.py, find what breaks the guarantee, and "
                          f"write the name of the theorem that dies of it into exercises/bugs/answers.py"),
            "died": ("done", f"{short} is caught: {why}"),
            "survived": ("wrong", f"{short}: {name} SURVIVES it ({why}), so that is not what breaks. Which sentence of the "
                                  f"proof is untrue now? (A theorem that starts train.py as a program never sees the bug.)"),
            "unknown": ("wrong", f"{short}: {why}")}[fate]
    return results


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--json"]
    found = [run(bug, name) for bug, name in zip(words[::2], words[1::2])]
    if "--json" in sys.argv:
        print(json.dumps(found))
    else:
        for bug, name, (fate, why) in zip(words[::2], words[1::2], found):
            print(f"{bug}: {name} {fate}: {why}" if fate != "unknown" else why)
