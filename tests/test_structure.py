"""Theorems about the repository: imports point one way, run-time code needs only the declared packages."""
import ast
import re
import sys

import pytest

from conftest import ROOT

FILES = {p.stem: p for p in ROOT.glob("*.py")}
ALLOWED = {                                                              # file -> the files of ours that it may import
    "folders": set(), "data": {"folders"}, "autoencoder": {"checkpoint", "data"},
    "ddpm": {"autoencoder", "checkpoint"}, "dpsgd": set(), "accountant": set(), "checkpoint": set(),
    "lora": {"checkpoint", "ddpm"}, "sample": {"checkpoint", "data", "ddpm", "lora", "screen"},
    "distributed": set(), "screen": set(), "draws": set(), "presets": set(), "clothes": set(), "statement": {"accountant"},
    "pretrain": {"autoencoder", "checkpoint", "clothes", "data", "ddpm", "presets", "sample", "screen", "train"},
    "train": {"accountant", "checkpoint", "data", "ddpm", "distributed", "dpsgd", "draws", "lora", "presets",
              "sample", "screen", "statement"},
    "inception": set(), "evaluate": {"checkpoint", "data", "ddpm", "folders", "inception", "lora", "sample", "screen"},
    "audit": {"accountant", "data", "ddpm", "dpsgd", "lora", "sample", "train"},
}
PACKAGES = {"torch", "torchvision", "numpy", "scipy", "tqdm", "PIL"}     # PIL comes with torchvision


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_point_one_way_and_need_only_the_declared_packages(name):
    ours = {i for i in imports(FILES[name], top_level_only=True) if i in FILES}
    assert ours <= ALLOWED[name], f"{name}.py must not import {ours - ALLOWED[name]}"
    foreign = {i for i in imports(FILES[name]) if i not in FILES and i not in sys.stdlib_module_names}
    assert foreign <= PACKAGES, f"{name}.py needs {foreign - PACKAGES}, which requirements.txt does not name"


def test_the_privacy_code_knows_nothing_of_diffusion():
    assert not {"ddpm", "data", "lora"} & set(imports(FILES["dpsgd"])) and "torch" not in set(imports(FILES["accountant"]))


def test_requirements_are_the_six_packages_with_lower_bounds_only():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {re.split("[<>=]", line)[0] for line in lines} == {"torch", "torchvision", "numpy", "scipy", "tqdm", "pytest"}
    assert all(re.fullmatch(r"[a-z]+>=[\d.]+", line) for line in lines)


def test_checkpoints_are_only_ever_loaded_as_weights():
    for name, path in FILES.items():
        for call in re.findall(r"torch\.load\((.*?)\)\n", path.read_text()):
            assert "weights_only=True" in call, f"{name}.py: torch.load({call})"
