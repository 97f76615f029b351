"""Theorems about the repository: imports point one way, run-time code needs only the declared packages."""
import ast
import re
import sys

import pytest

from conftest import ROOT

FILES = {p.stem: p for folder in (".", "machinery", "drawings") for p in ROOT.glob(f"{folder}/*.py")}
ALLOWED = {                                                              # file -> those of ours it may import
    "screen": set(), "distributed": set(), "draws": set(), "folders": {"screen"}, "inception": set(),
    "kernels": set(), "glyphs": set(), "clothes": set(), "smears": set(), "flags": {"screen"},
    "checkpoint": {"distributed", "screen"},
    "data": {"folders"}, "autoencoder": {"checkpoint", "data", "screen"}, "recipes": {"data"},
    "unet": {"autoencoder", "checkpoint", "data"}, "ddpm": set(), "lora": {"checkpoint", "kernels"},
    "dpsgd": {"distributed"}, "accountant": {"screen"}, "pld": {"accountant", "dpsgd", "screen"},
    "sample": {"autoencoder", "checkpoint", "data", "ddpm", "lora", "screen", "unet"},
    "statement": {"accountant", "checkpoint", "data", "dpsgd", "lora", "pld", "sample"},
    "pretrain": {"autoencoder", "checkpoint", "clothes", "data", "ddpm", "flags", "glyphs", "lora", "sample",
                 "screen", "smears", "unet"},
    "train": {"accountant", "autoencoder", "checkpoint", "data", "ddpm", "distributed", "dpsgd", "draws",
              "flags", "lora", "pld", "recipes", "sample", "screen", "statement", "unet"},
    "classifiers": {"checkpoint", "data", "folders", "screen", "unet"},
    "evaluate": {"autoencoder", "checkpoint", "classifiers", "data", "folders", "inception", "sample",
                 "screen", "unet"},
    "audit": {"accountant", "dpsgd", "pld", "screen"},
    "membership": {"accountant", "data", "ddpm", "dpsgd", "draws", "lora", "screen", "train", "unet"},
}
PACKAGES = {"torch", "torchvision", "numpy", "scipy", "tqdm", "PIL"}     # PIL comes with torchvision


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module in ("machinery", "drawings"):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_point_one_way_and_need_only_the_declared_packages(name):
    ours = {i for i in imports(FILES[name], top_level_only=True) if i in FILES}
    assert ours <= ALLOWED[name], f"{name}.py must not import {ours - ALLOWED[name]}"
    foreign = {i for i in imports(FILES[name]) if i not in FILES and i not in sys.stdlib_module_names}
    assert foreign <= PACKAGES, f"{name}.py needs {foreign - PACKAGES}, which requirements.txt does not name"


def test_no_file_imports_one_that_imports_it_not_even_in_its_demonstration():
    found = {name: {i for i in imports(path) if i in FILES} for name, path in FILES.items()}
    for name, below in found.items():
        for _ in FILES:
            below = below | {deeper for i in below for deeper in found[i]}
        assert name not in below, f"{name}.py is imported by what it imports"


def test_the_top_level_is_what_the_papers_reader_looks_for():
    assert {p.stem for p in ROOT.glob("*.py")} == {
        "accountant", "audit", "autoencoder", "data", "ddpm", "dpsgd", "evaluate", "lora", "pretrain",
        "sample", "train", "unet"}


def test_train_is_read_in_one_sitting():
    text = FILES["train"].read_text()
    assert len(text.splitlines()) <= 200 and "lambda" not in text


def test_the_privacy_code_knows_nothing_of_diffusion():
    assert not {"ddpm", "data", "lora"} & set(imports(FILES["dpsgd"]))
    assert "torch" not in {*imports(FILES["accountant"]), *imports(FILES["screen"])}, "all that it imports"


def test_requirements_are_the_six_packages_with_lower_bounds_only():
    lines = (ROOT / "requirements.txt").read_text().split()
    packages = {re.split("[<>=]", line)[0] for line in lines}
    assert packages == {"torch", "torchvision", "numpy", "scipy", "tqdm", "pytest"}
    assert all(re.fullmatch(r"[a-z]+>=[\d.]+", line) for line in lines)


def test_checkpoints_are_only_ever_loaded_as_weights():
    for name, path in FILES.items():
        for call in re.findall(r"torch\.load\((.*?)\)\n", path.read_text()):
            assert "weights_only=True" in call, f"{name}.py: torch.load({call})"


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


PROGRAMS = [*FILES.values(), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("exercises/*.py")]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_what_a_file_calls_of_ours_exists_in_its_demonstration_too(path):
    """`lora.inject` in one file is a name of lora.py: also where no other test runs it."""
    tree = ast.parse(path.read_text())
    mine = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}            # names of its own
    mine |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    used = {i for i in imports(path) if i in FILES} - mine
    has = {name: defined(ast.parse(FILES[name].read_text())) for name in used}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in has:
            home = node.value.id
            assert node.attr in has[home], f"{path.name}:{node.lineno}: {home}.py has no {node.attr}"
