"""progress.py -- shows how far a student has come, a line for each exercise and bug, or the marks of a class.

  $ python exercises/progress.py                                  # this folder
  $ python exercises/progress.py hand-ins/anna                    # a hand-in: ex*.py and answers.py
  $ python exercises/progress.py --csv hand-ins/* > marks.csv     # a line for each hand-in

The points are in README.md. A hand-in is a program that you are about to run: see "How to grade" there.
"""
import argparse
import contextlib
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent.absolute()
EXERCISES = sorted(p.stem for p in HERE.glob("ex[0-9][0-9]_*.py"))
BUGS = sorted(p.stem for p in (HERE / "bugs").glob("bug*.py"))
NAMES = EXERCISES + BUGS
SHIPPED = {p.name for p in HERE.rglob("*") if p.is_file()}
MARK = {"done": "x", "blank": " ", "wrong": "!"}
SECONDS = 60                                     # for one exercise of a hand-in; longer counts as a loop


def short(name: str) -> str:
    return name.partition("_")[0]                                        # ex01, bug01


def table(name: str) -> tuple[int, int]:
    """(minutes, points) of an exercise or a bug, read from the table in README.md."""
    row = "bug" if name.startswith("bug") else name[:4]
    found = re.search(rf"^\| {row} \|.*\| (\d+) \| (\d+) \|$", (HERE / "README.md").read_text("utf-8"), re.M)
    return int(found[1]), int(found[2])


# -----------------------------------------------------------------------------
# grading in a process of its own, so that no hand-in can stop the grading of the next exercise


def work(folder: Path, names: list[str], into: Path) -> None:
    """Grade these exercises and bugs of a hand-in, and write a line of JSON as soon as each is known."""
    import cases
    import grade
    import mutation
    for name in names:
        if name in EXERCISES:
            result = grade.check(name, cases.EXERCISES[name], folder)
        else:
            result = mutation.check(name, grade.outcome(mutation.answer, name, folder))
        with into.open("a") as lines:
            lines.write(json.dumps([name, *result]) + "\n")


def results(folder: Path) -> dict[str, tuple[str, str]]:
    """exercise or bug -> ("done", "blank" or "wrong", message).

    If the process ends or hangs, the exercise that it was at is wrong, and a new process grades the rest.
    """
    found = {}
    while left := [name for name in NAMES if name not in found]:
        lines, end = grade_some(folder, left)
        found |= {name: tuple(result) for name, *result in lines}
        if len(lines) < len(left):
            name = left[len(lines)]
            found[name] = "wrong", f"{short(name)}: {end}"
    return found


def grade_some(folder: Path, names: list[str]) -> tuple[list, str]:
    """(the results of a new process, in the order of `names`; how it ended).

    The process gets the name of its results file on standard input, so that a hand-in finds it neither in the
    current folder, which is empty, nor in the command line.
    """
    with tempfile.TemporaryDirectory() as elsewhere, tempfile.TemporaryDirectory() as ours:
        into, heard, length = Path(ours) / "results", time.monotonic(), 0
        command = [sys.executable, str(HERE / "progress.py"), "--names", *names, "--", str(folder.absolute())]
        process = subprocess.Popen(command, cwd=elsewhere, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        try:
            with contextlib.suppress(OSError), process.stdin as told:
                told.write(os.fsencode(into))
            while process.poll() is None and time.monotonic() - heard < SECONDS:
                time.sleep(0.05)
                if into.exists() and into.stat().st_size > length:
                    heard, length = time.monotonic(), into.stat().st_size
            end = f"there is no result after {SECONDS} s. Is there an endless loop?"
            if process.poll() is not None:
                end = f"this exercise ended the grader's process with exit code {process.returncode}"
        finally:
            process.kill()
            process.wait()
        return believed(into.read_text() if into.exists() else "", names), end


def believed(text: str, names: list[str]) -> list:
    """The lines of a results file, up to the first that does not belong to the exercise whose turn it is."""
    lines = []
    for name, line in zip(names, text.splitlines()):
        try:
            said, status, message = json.loads(line)
        except (ValueError, TypeError):
            break
        if said != name or status not in list(MARK) or not isinstance(message, str):
            break
        lines.append([name, status, message])
    return lines


def hand_in(path: Path) -> tuple[Path, list[str]]:
    """(the folder with the files, remarks about them).   Errors: there is no such folder -> ValueError"""
    if not path.is_dir():
        raise ValueError(f"{path.name} is a file, expected a folder. If it is an archive, unpack it"
                         if path.exists() else f"{path.name} does not exist")
    linked = [file for file in [path, *path.rglob("*")] if file.is_symlink() and file.is_dir()]
    if linked:
        raise ValueError(f"{linked[0].name} is a link to a folder, expected the folder itself")
    files = [file for file in sorted(path.rglob("*")) if not file.is_dir() or file.suffix == ".py"]
    files = [file for file in files if not re.search(r"(^|/)(\.|__)", file.relative_to(path).as_posix())]
    folders = {file.parent for file in files if re.match(r"ex\d\d_.*\.py$|answers\.py$", file.name)}
    folders -= {folder for folder in folders if folder.parent in folders and folder.name in ("bugs", "key")}
    strange = [file.relative_to(path).as_posix() for file in files if file.name not in SHIPPED]
    strange = strange[:3] + [f"{len(strange) - 3} more"] * (len(strange) > 3)
    if len(folders) != 1:
        what = f"{len(folders)} hand-ins: name the folder of each" if folders else (
            f"no ex*.py, no answers.py, only {', '.join(strange)}" if strange else "no file that can be read")
        raise ValueError(f"{path.name} holds {what}")
    folder = path if path in folders else folders.pop()
    remarks = [f"found in {folder.relative_to(path)}/"] if folder != path else []
    return folder, remarks + [f"not graded because of its name: {name}" for name in strange]


# -----------------------------------------------------------------------------
# what is shown


def show(path: Path) -> None:
    folder, remarks = hand_in(path)
    found = results(folder)
    for name in NAMES:
        status, message = found[name]
        minutes = f"{table(name)[0]:>3} min" if name in EXERCISES else ""
        said = status if status == "blank" else message.splitlines()[0]
        print(f"[{MARK[status]}] {name:<26}{minutes:<7}  {said}")
    count = {status: sum(found[name][0] == status for name in EXERCISES) for status in MARK}
    left = sum(table(name)[0] for name in EXERCISES if found[name][0] != "done")
    caught = sum(found[bug][0] == "done" for bug in BUGS)
    print(*remarks, f"{count['done']} of {len(EXERCISES)} exercises done ({count['wrong']} wrong, "
          f"{count['blank']} blank), about {left} minutes left; {caught} of {len(BUGS)} bugs caught",
          "to see the whole message of one: python -m pytest exercises -k ex07 (or bug02)", sep="\n")


COLUMNS = ["student", *map(short, NAMES), "points", "of", "remark"]


def marks(path: Path) -> list:
    """A row of the table, whatever `path` is: the points of what is done, their sum, a remark."""
    try:
        folder, remarks = hand_in(path)
        found = results(folder)
    except (OSError, ValueError) as e:
        return [path.name, *[""] * (len(COLUMNS) - 2), f"not marked: {e}"]
    worth = {name: table(name)[1] for name in NAMES}
    earned = [worth[name] * (found[name][0] == "done") for name in NAMES]
    for status in ("wrong", "blank"):
        which = [short(name) for name in NAMES if found[name][0] == status]
        remarks += [f"{status}: {' '.join(which)}"] if which else []
    told = [found[name][1] for name in NAMES if found[name][0] == "wrong"]       # short: no input to show
    remarks += [message.partition(". ")[0] for message in told if "\n" not in message]
    return [path.name, *earned, sum(earned), sum(worth.values()), "; ".join(remarks) or "all done"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Shows how far a student has come, or the marks of a class.")
    parser.add_argument("folders", nargs="*", type=Path, default=[HERE],
                        help="folders of hand-ins (default: the exercises' own folder)")
    parser.add_argument("--csv", action="store_true", help="print the marks, a line for each folder")
    parser.add_argument("--names", nargs="*", help=argparse.SUPPRESS)    # in a process that grades
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")                    # names may be in any encoding
    if args.names:
        work(args.folders[0], args.names, Path(os.fsdecode(sys.stdin.buffer.read())))
    elif args.csv:
        rows = csv.writer(sys.stdout, lineterminator="\n")
        rows.writerow(COLUMNS)
        for path in args.folders:
            rows.writerow(marks(path))
            sys.stdout.flush()
    else:
        for path in args.folders:
            try:
                show(path)
            except (OSError, ValueError) as e:
                parser.exit(2, f"progress.py: {e}\n")


if __name__ == "__main__":
    main()
