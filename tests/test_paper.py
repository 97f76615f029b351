"""Property tests of docs/paper.md: every line that it quotes stands in the file it is quoted from."""
import re

import pytest

from conftest import ROOT

PAGE = (ROOT / "docs" / "paper.md").read_text()
QUOTES = re.findall(r"^`([\w/]+\.py)`\n```python\n(.*?)^```", PAGE, re.M | re.S)
QUOTED = [(file, line.strip()) for file, block in QUOTES for line in block.splitlines()]


def test_every_block_of_code_names_its_file():
    assert len(QUOTES) == PAGE.count("```python") > 8


@pytest.mark.parametrize("file, line", QUOTED, ids=[f"{file}-{i}" for i, (file, _) in enumerate(QUOTED)])
def test_a_quoted_line_stands_in_its_file_once(file, line):
    lines = [one.strip() for one in (ROOT / file).read_text().splitlines()]
    assert lines.count(line) == 1, f"docs/paper.md quotes {line}; {file} has it {lines.count(line)} times"


def test_every_section_has_its_equation_its_lines_of_code_and_its_test():
    for section in re.split(r"^## \d+\. ", PAGE, flags=re.M)[1:]:
        for part in ("$$", "```python", "::test_"):
            assert part in section, (section.splitlines()[0], part)


@pytest.mark.parametrize("file, name", re.findall(r"`tests/(test_\w+\.py)::(\w+)`", PAGE))
def test_a_test_that_is_named_exists(file, name):
    assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.M)
