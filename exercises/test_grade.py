"""One test an exercise, one a bug: `python -m pytest exercises -k ex03`, `python -m pytest exercises -k bug02`."""
import pytest

import cases
import grade
import theorem


@pytest.mark.parametrize("name", cases.EXERCISES)
def test_exercise(name):
    status, message = grade.check(name, cases.EXERCISES[name])
    if status != "done":
        pytest.fail(message, pytrace=False)


@pytest.mark.parametrize("bug", theorem.BUGS)
def test_bug(bug):
    (status, message), = theorem.check({bug: theorem.answers().get(bug, "")}).values()
    if status != "done":
        pytest.fail(message, pytrace=False)
