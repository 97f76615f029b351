"""Property tests of the documents: what they name exists, and figures that can be computed are right."""
import ast
import dataclasses
import functools
import json
import re
import shlex
import sys

import pytest
import torch

import accountant
import autoencoder
import base
import ddpm
import lora
import pretrain
import train
import unet
from conftest import ROOT
from machinery import flags
from support import recipes
from test_settings import paper

sys.path.insert(0, str(ROOT / "tests" / "mutants"))
from mutants import MUTANTS  # noqa: E402

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
DOCUMENTS = [*PAGES, *sorted(ROOT.glob("exercises/*.md"))]


def unwrapped(text):
    """A command may go on after a backslash, and `code` in prose on the next line: each on one line again."""
    parts = text.replace("\\\n", " ").split("```")
    parts[::2] = [re.sub(r"`[^`]*`", join_lines, prose) for prose in parts[::2]]     # the others: code blocks
    return "```".join(parts)


def join_lines(code):
    return code[0].replace("\n", " ")


TEXT = {path: unwrapped(path.read_text()) for path in DOCUMENTS}
README, RECIPES, RESULTS, BASE = (TEXT[ROOT / name] for name in (
    "README.md", "docs/recipes.md", "docs/results.md", "docs/bases.md"))


@functools.cache
def names(path):
    """All functions and classes (and methods) that a file defines."""
    return {node.name for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def anchors(path):
    """GitHub's names of a page's headings."""
    headings = [line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def name_of(path):
    return str(path.relative_to(ROOT))


SETTINGS = {"train.py": train.Settings, "pretrain.py": pretrain.Settings, "sample.py": ddpm.Sampling,
            "evaluate.py": ddpm.Sampling}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_link_and_anchor_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", TEXT[path]):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        page = path.parent / file if file else path
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_function_and_test_that_is_named_exists(path):
    for file, name in re.findall(r"`([\w/]+\.py):(\w+)", TEXT[path]):
        constant = re.search(rf"^{name} =", (ROOT / file).read_text(), re.M)
        assert name in names(ROOT / file) or constant, f"{file}:{name}"
    for file, name in re.findall(r"`(?:tests/)?(test_\w+\.py)::(\w+)", TEXT[path]):
        assert name in names(ROOT / "tests" / file), f"{file}::{name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_command_has_its_script_and_every_flag_exists(path):
    commands = re.findall(r"python ([\w/]+\.py)((?: [^`\n#|&]*)?)", TEXT[path])
    folders = "machinery|drawings|support|attacks"
    modules = re.findall(rf"python -m ((?:{folders})\.\w+)((?: [^`\n#|&]*)?)", TEXT[path])
    commands += [(module.replace(".", "/") + ".py", rest) for module, rest in modules]
    for script, rest in commands:
        source = (ROOT / script).read_text()                             # the script exists
        flags = re.findall(r"(?<= )--([a-zA-Z][\w-]*)", rest)
        known = set(re.findall(r"\"--([a-zA-Z][\w-]*)\"", source)) | {"help"}
        if script in SETTINGS:                                           # a flag for each field
            known |= {field.name.replace("_", "-") for field in dataclasses.fields(SETTINGS[script])}
        assert set(flags) <= known, f"{script}: {set(flags) - known}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_file_that_is_named_exists(path):
    made_by_a_run = {"grid.png", "samples.npz", "samples.png", "adapter_model.bin", "adapter_config.json",
                     "privacy.json", "config.json", "metrics.csv", "checkpoint.pt", "evaluation.json",
                     "neighbours.png"}
    for name in re.findall(r"`([\w./-]+\.(?:py|md|txt|pt|toml|png|npz|csv|bin|json))`", TEXT[path]):
        if name not in made_by_a_run and not name.startswith("runs/"):
            places = (ROOT, path.parent, ROOT / "tests")
            assert any((place / name).exists() for place in places), name


def test_readme_says_the_two_commands():
    for program in ("train.py", "-m pytest"):
        assert f"pip install -r requirements.txt && python {program}\n" in README


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_lines_are_at_most_110_characters(path):
    """Tables and formulas, which Markdown cannot wrap, excepted."""
    lines = path.read_text().splitlines()
    long = [line for line in lines if len(line) > 110 and not line.startswith(("|", "$$", "\\"))]
    assert not long, long


def test_the_readmes_figures_are_the_codes():
    """Those that can be computed again: weights, and the default plan."""
    s = train.check(train.Settings())
    model = base.load(ROOT / s.base).model
    public = sum(p.numel() for p in model.parameters())
    lora.inject(model, s.rank, s.rank)
    trained = sum(p.numel() for p in lora.split(model)[0].values())
    sigma = accountant.calibrate(s.epsilon, s.delta, s.B / s.N, s.steps)
    assert f"{public:,} weights" in BASE
    with torch.device("meta"):
        photos, smears = (unet.UNet(**dict(pretrain.UNETS["photos"], classes=n)) for n in (202, 8))
        for network in (photos, smears, autoencoder.Autoencoder()):
            assert f"{sum(p.numel() for p in network.parameters()):,}" in BASE
    for figure in (f"training {trained:,} of", f"sigma = {sigma:.4f}; C = {s.C:g}, K = {s.K}",
                   f"B = {s.B:,}, q = B/N = {s.B / s.N:.5f}, T = {s.steps} steps", "479,232",
                   f"{len(MUTANTS)} mutants"):
        assert figure in README, figure


@pytest.mark.parametrize("name, K", [("mnist", 12), ("cifar10", 8), ("celeba", 4)])
def test_the_price_of_the_published_multiplicity_is_the_accountants(name, K):
    p = paper(name)
    sigma = accountant.calibrate(10, p.delta, p.B / p.N, p.steps)
    broken = accountant.epsilon(p.B / p.N, sigma / K, p.steps, p.delta)[0]
    assert f"| {K} | {sigma:.3f} | {broken:.0f} | {sigma * K:.2f} |" in RESULTS


@pytest.mark.parametrize("epsilon", [1, 10])
def test_the_table_of_lots_and_draws_is_the_accountants(epsilon):
    """sqrt(K T) B / sigma, in thousands, for T = 150 steps and 650,000 image-draws."""
    row = []
    for K in (1, 4, 16, 64):
        B = round(650_000 / 150 / K)
        sigma = accountant.calibrate(epsilon, 1e-5, B / 60_000, 150)
        row.append(f"{(K * 150) ** 0.5 * B / sigma / 1e3:.1f}")
    found = re.search(rf"^\| epsilon = {epsilon} \|(.*)\|$", RECIPES, re.M)[1]
    assert [cell.strip(" *") for cell in found.split("|")] == row


def cells(line):
    """A row of a Markdown table: its cells, without bold letters."""
    return [cell.strip() for cell in line.replace("**", "").strip("|").split("|")]


def result(name):
    """The cells of the row of results.md for such images: "MNIST, epsilon = 1", adapter or not."""
    return cells(re.search(rf"^\| {re.escape(name)}(?:: `[\w-]+`)? \|.*$", RESULTS, re.M)[0])


def test_readmes_results_are_those_of_the_results_page():
    rows = re.findall(r"^\| (\S*MNIST, epsilon = \d+) \| (.*) \|$", README, re.M)
    assert len(rows) == 4
    for name, rest in rows:
        accuracy, best, fid, best_fid = cells(rest)
        assert result(name)[2:5] == [accuracy, f"{best}; {best_fid}", fid], name


def test_the_headline_figures_of_the_results_page_are_those_of_its_sections():
    lines = re.search(r"^\| private images \|.*\n\n", RESULTS, re.M | re.S)[0].split("\n\n")[0].splitlines()
    columns, rows = cells(lines[0])[1:-1], [cells(line) for line in lines[2:]]
    assert len(rows) == 5 and columns[0] == "public base alone"
    for what, *figures, _ in rows:
        for column, figure in zip(columns, figures, strict=True):
            name = f"{what.removesuffix(' (FID)')}, {column}"
            assert figure == "–" or figure in result(name), name


@pytest.mark.parametrize("name", ["mnist-eps10", "mnist-eps1", "fashion-eps10", "fashion-eps1",
                                  "cells-eps10", "cells-eps1", "cifar10-eps10", "cifar10-eps1",
                                  "faces-eps10", "faces-eps1"])
def test_the_documented_command_is_the_shipped_runs(name):
    """Every flag that results.md gives, and every default that it leaves, is what config.json says."""
    command = re.search(rf"^python train.py (.* --out runs/{name})$", RESULTS, re.M)[1]
    settings = flags.parse(train.Settings, "train.py", train.__doc__, shlex.split(command), recipes.of)
    wanted = dataclasses.asdict(train.check(settings))
    wanted["data"] = wanted["data"].partition(":")[0]                    # a published folder names no place
    used = json.loads((ROOT / "assets" / name / "config.json").read_text())
    # what depends on the machine, or on the data
    free = {"device", "precision", "data_dir", "out", "chunk", "peek", "resume", "classes"}
    for setting in (wanted.keys() & used.keys()) - free:
        assert wanted[setting] == used[setting], setting


@pytest.mark.parametrize("run", ["mnist-eps10", "mnist-eps1", "fashion-eps10", "fashion-eps1", "cells-eps10",
                                 "cells-eps1", "cifar10-eps10", "cifar10-eps1", "faces-eps10", "faces-eps1"])
def test_the_table_of_recipes_is_what_the_shipped_runs_used(run):
    used = json.loads((ROOT / "assets" / run / "config.json").read_text())
    said = re.search(rf"^\| `{run}` \| (.*) \|$", RECIPES, re.M)[1].replace("`", "").split(" | ")
    assert said == [f"{used[name]}" for name in ("train", "draws", "lr", "B", "K", "steps")]
    assert (used["rank"], used["C"]) == (4 if run == "cells-eps1" else 16, 0.003)


def test_no_figure_was_left_to_fill_in():
    assert not [line for text in TEXT.values() for line in text.splitlines() if re.search(r"@\w*@", line)]
