"""run.py -- mutation tests: the code is broken on purpose, and the test that is about it must fail.

  $ python tests/mutants/run.py                # all of mutants.py: a table, exit code 1 if one survives
  $ python tests/mutants/run.py noise          # those with "noise" in their name

Every mutant is a copy of the repository with one piece of code replaced, in which its property test, and
nothing else, is run. A mutant is killed when the test fails by its own assertion; code that merely crashes
has proved nothing. The same tests are seen to pass on a copy that nobody broke. The copies' tests run in
forks of this process, because importing torch takes longer than most of them.
"""
import gc
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

# one thread each; failures in one line; no plugins, which take a second to import
os.environ |= dict(OMP_NUM_THREADS="1", COLUMNS="1000", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
sys.dont_write_bytecode = True

import pytest  # noqa: E402
import scipy.integrate  # noqa: E402, F401  (imported here once, not in every fork)
import scipy.optimize  # noqa: E402, F401
import scipy.stats  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401
import torch.func  # noqa: E402
import torchvision.utils  # noqa: E402, F401

from mutants import MUTANTS, Mutant  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
BY_ITSELF = re.compile(r"^FAILED .* - (assert |AssertionError|Failed: |UserWarning)", re.MULTILINE)
AT_A_TIME = 2
FOLDERS = (".", "machinery", "drawings", "support", "attacks", "tests")  # whose code a copy holds


def copy(folder: Path) -> None:
    """The repository's code and tests, without their history and their data, and with their dates."""
    code = [file for part in FOLDERS for file in ROOT.glob(f"{part}/*.py")]
    for source in [*code, ROOT / "pyproject.toml"]:
        target = folder / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def start(folder: Path, *tests: str) -> int:
    """Fork a child that runs these tests on the copy in `folder`; its process id.

    Its words go to folder/said.
    """
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(said, 1), os.dup2(said, 2)
        os.chdir(folder)
        sys.dont_write_bytecode = False                                  # see `run`
        flags = "-x -q -rf --tb=short -p no:cacheprovider".split()
        code = pytest.main(flags + [f"tests/{test}" for test in tests])
        sys.stdout.flush()
    finally:
        os._exit(code)


def verdict(code: int, said: str) -> str:
    """"yes", or why not. pytest's exit code 1: tests were run and some failed; 2 to 5: they were not run."""
    if code == 0:
        return "NO: it survives"
    if code == 1 and BY_ITSELF.search(said):
        return "yes"
    failures = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "NO: " + " ".join((failures or said.splitlines())[-1:])


def run(m: Mutant, clean_copy: Path, folder: Path) -> int | None:
    """Start the mutant's test on a broken copy; None if the text to be broken is not there once.

    The bytecode of all that is not broken is the clean copy's: Python goes by a file's date and size.
    """
    clean = (ROOT / m.file).read_text()
    if clean.count(m.old) != 1:
        return None
    mutated = clean.replace(m.old, m.new)
    compile(mutated, m.file, "exec")                                     # a typing error kills nothing
    shutil.copytree(clean_copy, folder, ignore=shutil.ignore_patterns("said"))
    (folder / m.file).write_text(mutated)
    return start(folder, m.killed_by)


def main() -> None:
    word, begin = (sys.argv + [""])[1], time.time()
    chosen = [m for m in MUTANTS if word in m.name]
    if not chosen:                                                       # without a test pytest runs all
        print(f"run.py: no mutant has {word!r} in its name; they are in tests/mutants/mutants.py",
              file=sys.stderr)
        sys.exit(2)
    tests = list(dict.fromkeys(m.killed_by for m in chosen))
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()                                                          # no fork looks for garbage in torch
    copy(folder / "clean")
    if os.waitpid(start(folder / "clean", *tests), 0)[1]:
        said = (folder / "clean" / "said").read_text()
        shutil.rmtree(folder)
        sys.exit(f"the tests fail on the code as it is:\n{said}")

    verdicts, running, left = {}, {}, list(chosen)
    while left or running:
        while left and len(running) < AT_A_TIME:
            m = left.pop(0)
            child = run(m, folder / "clean", folder / m.name.replace(" ", "-"))
            if child is None:
                verdicts[m] = f"NO: its text does not occur exactly once in {m.file}"
            else:
                running[child] = m
        if running:
            child, status = os.wait()
            m = running.pop(child)
            said = (folder / m.name.replace(" ", "-") / "said").read_text()
            verdicts[m] = verdict(os.waitstatus_to_exitcode(status), said)
            print(f"{len(verdicts)} of {len(chosen)}: {m.name}: killed: {verdicts[m]}", file=sys.stderr)
    shutil.rmtree(folder)

    print("| mutant | consequence for privacy | test that kills it | killed |\n| --- | --- | --- | --- |")
    for m in chosen:
        print(f"| {m.name} (`{m.file}`) | {m.consequence} | `{m.killed_by}` | {verdicts[m]} |")
    killed = list(verdicts.values()).count("yes")
    print(f"\n{killed} of {len(chosen)} mutants killed by {len(tests)} tests, which pass without them. "
          f"{time.time() - begin:.0f} s")
    sys.exit(killed < len(chosen))


if __name__ == "__main__":
    main()
