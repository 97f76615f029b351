"""One test an exercise, one a bug: `python -m pytest exercises -k ex03` (or bug02)."""
import pytest

import cases
import grade
import mutation


def report(status: str, message: str, capsys) -> None:
    if status != "done":
        pytest.fail(message, pytrace=False)
    with capsys.disabled():                                              # pytest says nothing of what passes
        print(f"\n{message}")


@pytest.mark.parametrize("name", cases.EXERCISES)
def test_exercise(name, capsys):
    report(*grade.check(name, cases.EXERCISES[name]), capsys)


@pytest.mark.parametrize("bug", mutation.BUGS)
def test_bug(bug, capsys):
    answer = grade.outcome(mutation.answer, bug)
    report(*mutation.check(bug, answer), capsys)
