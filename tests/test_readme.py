"""Theorems about the documents: what they name exists."""
import ast
import dataclasses
import re

import pytest

import accountant
import ddpm
import lora
import train
from conftest import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "benchmarks" / "tuning.md", *sorted(ROOT.glob("exercises/*.md"))]
TEXT = {path: path.read_text() for path in DOCUMENTS}


def names(path):
    """All functions and classes (and methods) that a file defines."""
    return {node.name for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_and_anchor_leads_somewhere(path):
    anchors = {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).strip().replace(" ", "-")
               for line in TEXT[path].splitlines() if line.startswith("#")}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT[path]):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (path.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_function_and_test_that_is_named_exists(path):
    for file, name in re.findall(r"`([\w/]+\.py):(\w+)", TEXT[path]):
        assert name in names(ROOT / file) or re.search(rf"^{name} =", (ROOT / file).read_text(), re.M), f"{file}:{name}"
    for file, name in re.findall(r"`(?:tests/)?(test_\w+\.py)::(\w+)", TEXT[path]):
        assert name in names(ROOT / "tests" / file), f"{file}::{name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_has_its_script_and_every_flag_exists(path):
    for script, rest in re.findall(r"python ([\w/]+\.py)((?: [^`\n#|&]*)?)", TEXT[path]):
        source = (ROOT / script).read_text()                             # the script exists
        flags = re.findall(r"(?<= )--([a-zA-Z][\w-]*)", rest)
        if script == "train.py":
            stage = train.Pretrain if rest.strip().startswith("pretrain") else train.Finetune
            known = {f.name.replace("_", "-") for f in dataclasses.fields(stage)} | {"help"}
        else:
            known = set(re.findall(r"\"--([a-zA-Z][\w-]*)\"", source)) | {"help"}
        assert set(flags) <= known, f"{script}: {set(flags) - known}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_that_is_named_exists(path):
    made_by_a_run = {"grid.png", "samples.npz", "samples.png", "adapter_model.bin", "adapter_config.json", "privacy.json",
                     "config.json", "metrics.csv", "checkpoint.pt", "evaluation.json", "neighbours.png"}
    for name in re.findall(r"`([\w./-]+\.(?:py|md|txt|pt|toml|png|npz|csv|bin|json))`", TEXT[path]):
        if name not in made_by_a_run and not name.startswith("runs/"):
            assert (ROOT / name).exists() or (path.parent / name).exists() or (ROOT / "tests" / name).exists(), name


def test_readme_says_the_two_commands():
    for command in ("pip install -r requirements.txt && python train.py\n", "pip install -r requirements.txt && python -m pytest\n"):
        assert command in TEXT[ROOT / "README.md"]


def test_the_readmes_figures_are_the_codes():
    """Those that can be computed again: weights, the default plan, the published multiplicity's price."""
    readme = TEXT[ROOT / "README.md"]
    s = train.check(train.Finetune())
    model = ddpm.load_unet(ROOT / s.base)
    base = sum(p.numel() for p in model.parameters())
    lora.inject(model, s.rank, s.lora_alpha)
    trained = sum(p.numel() for p in lora.split(model)[0].values())
    sigma = accountant.calibrate(s.epsilon, s.delta, s.B / s.N, s.steps)
    for figure in (f"{base:,} weights", f"training {trained:,} of", f"sigma = {sigma:.4f}; C = {s.C:g}, K = {s.K}",
                   f"B = {s.B:,}, q = B/N = {s.B / s.N:.5f}, T = {s.steps} steps", "479,232"):
        assert figure in readme, figure
    for name, K in (("mnist", 12), ("cifar10", 8), ("celeba64", 4)):
        p = train.check(train.parse(train.Finetune, ["--preset", name])[1])
        sigma = accountant.calibrate(10, p.delta, p.B / p.N, p.steps)
        broken = accountant.epsilon(p.B / p.N, sigma / K, p.steps, p.delta)[0]
        assert f"| {K} | {sigma:.3f} | {broken:.0f} | {sigma * K:.2f} |" in readme, (name, sigma, broken)


def test_the_table_of_lots_and_draws_is_the_accountants():
    """sqrt(K T) B / sigma, in thousands, for T = 150 steps and 650,000 image-draws."""
    for epsilon in (1, 10):
        row = []
        for K in (1, 4, 16, 64):
            B = round(650_000 / 150 / K)
            row.append(f"{(K * 150) ** 0.5 * B / accountant.calibrate(epsilon, 1e-5, B / 60_000, 150) / 1e3:.1f}")
        found = re.search(rf"^\| epsilon = {epsilon} \| \**([\d.]+)\** \| \**([\d.]+)\** \| \**([\d.]+)\** \| \**([\d.]+)\** \|$",
                          TEXT[ROOT / "benchmarks" / "tuning.md"], re.M)
        assert list(found.groups()) == row, epsilon


def test_no_figure_was_left_to_fill_in():
    assert not [line for text in TEXT.values() for line in text.splitlines() if re.search(r"@\w*@", line)]
