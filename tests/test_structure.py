"""Property tests of the repository: imports point downwards, and few packages are needed."""
import ast
import re
import sys

import pytest

from conftest import ROOT

# the floors, from the lowest; a file imports from lower floors and from its own
PROGRAMS = ("train.py", "pretrain.py", "sample.py", "evaluate.py", "audit.py")
FLOORS = {"machinery": 0, "drawings": 1, "support": 2, "attacks": 4, "benchmarks": 5, "exercises": 5}
FILES = {p.stem: p for folder in (".", *FLOORS) for p in ROOT.glob(f"{folder}/*.py")}
PACKAGES = {"torch", "torchvision", "numpy", "scipy", "tqdm", "PIL"}     # PIL comes with torchvision


def floor(path) -> int:
    """0 machinery, 1 concepts and drawings, 2 support, 3 programs, 4 attacks, 5 all that uses them."""
    if path.parent == ROOT:
        return 3 if path.name in PROGRAMS else 1
    return FLOORS[path.parent.name]


def imports(path):
    """What a file imports, in its demonstration too: packages by name, files of ours by their stem."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module in FLOORS:
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder, _, file = node.module.partition(".")
            yield file if folder in FLOORS else folder


def ours(path):
    return {name for name in imports(path) if name in FILES}


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_point_downwards(name):
    here = floor(FILES[name])
    above = {other for other in ours(FILES[name]) if floor(FILES[other]) > here}
    assert not above, f"{name}.py, on floor {here}, must not import {above}"


def test_the_drawings_import_nothing_of_ours():
    for path in ROOT.glob("drawings/*.py"):
        assert not ours(path), path.name


def test_no_file_imports_one_that_imports_it():
    found = {name: ours(path) for name, path in FILES.items() if floor(path) < 5}
    for name, below in found.items():
        for _ in found:
            below = below | {deeper for i in below for deeper in found[i]}
        assert name not in below, f"{name}.py is imported by what it imports"


@pytest.mark.parametrize("name", sorted(name for name, path in FILES.items() if floor(path) < 5))
def test_what_trains_samples_and_measures_needs_only_the_declared_packages(name):
    foreign = {i for i in imports(FILES[name]) if i not in FILES and i not in sys.stdlib_module_names}
    assert foreign <= PACKAGES, f"{name}.py needs {foreign - PACKAGES}, which requirements.txt does not name"


def test_the_top_level_is_what_the_papers_reader_looks_for():
    """At most 14 files: more than that, and the concepts of the paper are hard to find among them."""
    assert len(list(ROOT.glob("*.py"))) <= 14


def test_the_privacy_code_knows_nothing_of_diffusion():
    assert not {"ddpm", "data", "lora"} & set(imports(FILES["dpsgd"]))
    assert "torch" not in {*imports(FILES["accountant"]), *imports(FILES["screen"])}, "all that it imports"


def test_requirements_are_the_six_packages_with_lower_bounds_only():
    lines = (ROOT / "requirements.txt").read_text().split()
    packages = {re.split("[<>=]", line)[0] for line in lines}
    assert packages == {"torch", "torchvision", "numpy", "scipy", "tqdm", "pytest"}
    assert all(re.fullmatch(r"[a-z]+>=[\d.]+", line) for line in lines)


def test_checkpoints_are_only_ever_loaded_as_weights():
    calls = 0
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                calls += 1
                asked = [ast.unparse(k.value) for k in node.keywords if k.arg == "weights_only"]
                assert asked == ["True"], f"{name}.py: {ast.unparse(node)}"
    assert calls > 0


def defined(tree) -> set:
    """The names that a file has at its top level."""
    found = set()
    for node in ast.walk(ast.Module([n for n in tree.body if not isinstance(n, ast.FunctionDef)], [])):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ClassDef):
            found.add(node.name)
    return found | {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}


@pytest.mark.parametrize("path", FILES.values(), ids=lambda path: path.name)
def test_what_a_file_calls_of_ours_exists_in_its_demonstration_too(path):
    """`lora.inject` in one file is a name of lora.py: also where no other test runs it."""
    tree = ast.parse(path.read_text())
    mine = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}            # names of its own
    mine |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    used = ours(path) - mine
    has = {name: defined(ast.parse(FILES[name].read_text())) for name in used}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in has:
            home = node.value.id
            assert node.attr in has[home], f"{path.name}:{node.lineno}: {home}.py has no {node.attr}"
