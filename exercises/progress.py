"""progress.py -- how far have I come? One line an exercise, one for all bugs. And a class's marks.

  $ python exercises/progress.py                                  # this folder
  $ python exercises/progress.py hand-ins/anna                # a hand-in: ex*.py and answers.py in one folder
  $ python exercises/progress.py --csv hand-ins/* > marks.csv     # a line each; the points are README.md's

A hand-in is a program that you are about to run: see README.md, "How to grade".
"""
import argparse
import contextlib
import csv
import shutil
import subprocess
import sys
from pathlib import Path

import cases
import grade
import theorem

MARK = {"done": "x", "blank": " ", "wrong": "!"}
SECONDS = 900                                                            # for one hand-in


def results(folder: Path) -> dict[str, tuple[str, str]]:
    """exercise or bug -> ("done", "blank" or "wrong", message)."""
    found = {name: grade.check(name, exercise, folder=folder) for name, exercise in cases.EXERCISES.items()}
    return found | theorem.check(theorem.answers(folder))


def show(folder: Path) -> None:
    width, left, count = shutil.get_terminal_size((110, 24)).columns, 0, dict(done=0, blank=0, wrong=0)
    found = results(folder)
    for name in cases.EXERCISES:
        status, message = found[name]
        count[status] += 1
        said = message.splitlines()[0] if status == "wrong" else status
        if status == "done":
            said = f"done; now compare with {cases.EXERCISES[name].origin}"
        else:
            left += grade.table(name)[0]
        print(f"[{MARK[status]}] {name:<26}{grade.table(name)[0]:>3} min  {said}"[:width])
    caught = sum(found[bug][0] == "done" for bug in theorem.BUGS)
    print("bugs    " + " ".join(f"{bug[3:5]}[{MARK[found[bug][0]]}]" for bug in theorem.BUGS))
    print(f"\n{count['done']} of {len(cases.EXERCISES)} exercises done "
          f"({count['wrong']} wrong, {count['blank']} blank), "
          f"about {left} minutes left; {caught} of {len(theorem.BUGS)} bugs caught\n"
          f"why one is wrong: python -m pytest exercises -k ex07 (or bug02)")


COLUMNS = ["student", *(name[:5].rstrip("_") for name in [*cases.EXERCISES, *theorem.BUGS]), "points", "of",
           "remark"]


def marks(folder: Path) -> list:
    """A line of the table: the points of what is done, their sum, and what all of it is worth."""
    with contextlib.redirect_stdout(sys.stderr):               # what a hand-in prints is no part of the table
        found = results(folder)
    worth = {name: grade.table(name)[1] for name in found}
    earned = [worth[name] if status == "done" else 0 for name, (status, _) in found.items()]
    return [folder.name, *earned, sum(earned), sum(worth.values()), ""]


def marks_of_a_process(folder: Path) -> list:
    """The same from a process of its own: no hand-in can stop, or change, the marking of the next."""
    command, rows, remark = [sys.executable, __file__, "--csv",
                             str(folder)], [], "its process ended before the grader did"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        rows = list(csv.reader(done.stdout.splitlines()))                # the header, and the line
        if done.returncode and done.stderr:
            remark = done.stderr.splitlines()[-1]
    except subprocess.TimeoutExpired:
        remark = f"no end after {SECONDS} s"
    if len(rows) == 2 and len(rows[1]) == len(COLUMNS):
        return rows[1]
    return [folder.name] + [""] * (len(COLUMNS) - 2) + [f"not marked: {remark}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="How far have I come? And a class's marks.")
    parser.add_argument("folders", nargs="*", type=Path, default=[grade.HERE], help="hand-ins; default: "
                        "this folder")
    parser.add_argument("--csv", action="store_true", help="marks, a line for each folder")
    args = parser.parse_args()
    for folder in args.folders:
        if not list(folder.glob("ex*.py")) and not (folder / "answers.py").exists():
            parser.exit(2, f"progress.py: {folder} has no ex*.py, no answers.py: expected a hand-in\n")
    if not args.csv:
        for folder in args.folders:
            show(folder)
        return
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(COLUMNS)
    for folder in args.folders:
        table.writerow(marks(folder) if len(args.folders) == 1 else marks_of_a_process(folder))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
