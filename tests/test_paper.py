"""Property tests of docs/paper.md: its quotations stand in the code, and its worked numbers are right."""
import doctest
import re

import pytest

from conftest import ROOT

PAGE = (ROOT / "docs" / "paper.md").read_text()
QUOTES = re.findall(r"^`([\w/]+\.py)`\n```python\n(.*?)^```", PAGE, re.M | re.S)
QUOTED = [(file, line.strip()) for file, block in QUOTES for line in block.splitlines()]
SECTIONS = re.findall(r"^## (\d+\. .*?)(?=^## )", PAGE, re.M | re.S)
WORKED = "".join(re.findall(r"^```pycon\n(.*?)^```", PAGE, re.M | re.S))
TABLE = PAGE.partition("\n## Further ideas\n")[2].partition("\n## ")[0]


def test_every_block_of_code_names_its_file():
    assert len(QUOTES) == PAGE.count("```python") > 8


@pytest.mark.parametrize("file, line", QUOTED, ids=[f"{file}-{i}" for i, (file, _) in enumerate(QUOTED)])
def test_a_quoted_line_stands_in_its_file_once(file, line):
    lines = [one.strip() for one in (ROOT / file).read_text().splitlines()]
    assert lines.count(line) == 1, f"docs/paper.md quotes {line}; {file} has it {lines.count(line)} times"


def test_every_section_has_its_equation_its_lines_of_code_and_its_test():
    assert len(SECTIONS) == 10
    for section in SECTIONS:
        for part in ("$$", "```python", "::test_"):
            assert part in section, (section.splitlines()[0], part)


@pytest.mark.parametrize("file, name", re.findall(r"`tests/(test_\w+\.py)::(\w+)`", PAGE))
def test_a_test_that_is_named_exists(file, name):
    assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.M)


def test_the_worked_numbers_are_the_accountants():
    """The primer's examples, typed into Python one after the other, print what the page says."""
    examples = doctest.DocTestParser().get_doctest(WORKED, {}, "docs/paper.md", "docs/paper.md", 0)
    failures = []
    doctest.DocTestRunner().run(examples, out=failures.append)
    assert len(examples.examples) >= 8 and not failures, "".join(failures)


def test_every_row_of_the_table_has_its_code_and_its_test():
    """That both exist is tested with all documents, in test_readme.py."""
    rows = [line.strip("| ").split(" | ") for line in TABLE.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 12
    for idea, code, test in rows:
        assert re.search(r"\.py:\w|\.md", code) and re.fullmatch(r"`test_\w+\.py::test_\w+`", test), idea
