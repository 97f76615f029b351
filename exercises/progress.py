"""progress.py -- how far have I come? One line an exercise, one for all bugs.

  $ python exercises/progress.py
"""
import shutil

import cases
import grade
import theorem

MARK = {"done": "x", "blank": " ", "wrong": "!"}


def main() -> None:
    width, left, count = shutil.get_terminal_size((110, 24)).columns, 0, dict(done=0, blank=0, wrong=0)
    for name, exercise in cases.EXERCISES.items():
        status, message = grade.check(name, exercise)
        count[status] += 1
        left += 0 if status == "done" else grade.minutes(name)
        said = message.splitlines()[0] if status == "wrong" else status
        print(f"[{MARK[status]}] {name:<26}{grade.minutes(name):>3} min  {said}"[:width])
    bugs = theorem.check({bug: theorem.answers().get(bug, "") for bug in theorem.BUGS})
    caught = sum(status == "done" for status, _ in bugs.values())
    print("bugs    " + " ".join(f"{bug[3:5]}[{MARK[status]}]" for bug, (status, _) in bugs.items()))
    print(f"\n{count['done']} of {len(cases.EXERCISES)} exercises done ({count['wrong']} wrong, {count['blank']} blank), "
          f"about {left} minutes left; {caught} of {len(bugs)} bugs caught\n"
          f"why one is wrong: python -m pytest exercises -k ex07 (or bug02)")


if __name__ == "__main__":
    main()
