"""run.py -- each theorem is seen to fail on the sabotage it is about, and to hold without it.

  $ python tests/mutants/run.py                # all of mutants.py, two at a time: a table, exit code 1 if one survives
  $ python tests/mutants/run.py noise          # those with "noise" in their name

A mutant is killed when its theorem fails by its own assertion; code that merely crashes has proved nothing.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent.parent
BY_ITSELF = re.compile(r"^FAILED .* - (assert |AssertionError|Failed: |UserWarning)", re.MULTILINE)


def copy(folder: Path) -> Path:
    """The repository's code and tests, without their history and their data."""
    for source in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", *(ROOT / "tests").glob("*.py")]:
        target = folder / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return folder


def pytest(folder: Path, *tests: str) -> subprocess.CompletedProcess:
    """Only these theorems, on the copy in `folder`; one thread each, so that two can run at a time."""
    env = dict(os.environ, OMP_NUM_THREADS="1", COLUMNS="1000", PYTHONDONTWRITEBYTECODE="1")
    return subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider",
                           *(f"tests/{test}" for test in tests)], cwd=folder, env=env, capture_output=True, text=True)


def verdict(m: Mutant) -> str:
    """"yes", or why not."""
    clean = (ROOT / m.file).read_text()
    if clean.count(m.old) != 1:
        return f"NO: its text occurs {clean.count(m.old)} times in {m.file}"
    mutated = clean.replace(m.old, m.new)
    compile(mutated, m.file, "exec")
    with tempfile.TemporaryDirectory() as folder:
        (copy(Path(folder)) / m.file).write_text(mutated)
        done = pytest(Path(folder), m.killed_by)
    if done.returncode == 0:
        return "NO: it survives"
    if done.returncode == 1 and BY_ITSELF.search(done.stdout):
        return "yes"
    return "NO: " + " ".join(([line for line in done.stdout.splitlines() if re.match("FAILED|ERROR", line)] or
                              (done.stdout + done.stderr).splitlines())[-1:])


def main() -> None:
    chosen, start = [m for m in MUTANTS if (sys.argv + [""])[1] in m.name], time.time()
    theorems = list(dict.fromkeys(m.killed_by for m in chosen))
    with tempfile.TemporaryDirectory() as folder:
        clean = pytest(copy(Path(folder)), *theorems)
    if clean.returncode:
        sys.exit(f"the theorems do not hold without sabotage:\n{clean.stdout}{clean.stderr}")
    print("| sabotage | consequence for privacy | theorem that kills it | killed |\n| --- | --- | --- | --- |")
    with ThreadPoolExecutor(2) as pool:
        verdicts = []
        for m, said in zip(chosen, pool.map(verdict, chosen)):
            verdicts.append(said)
            print(f"| {m.name} ({m.file}) | {m.consequence} | `{m.killed_by}` | {said} |", flush=True)
    killed = verdicts.count("yes")
    print(f"\n{killed} of {len(chosen)} sabotages killed by {len(theorems)} theorems, which hold without them, "
          f"in {time.time() - start:.0f} s")
    sys.exit(killed < len(chosen))


if __name__ == "__main__":
    main()
