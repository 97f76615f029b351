"""One place to add a thing: what docs/extending.md adds is chosen by flags, and nothing else has to change.

The code is read from the page: an accountant, a sampler, a data set, a public base that learns from a new set
of drawings, a set of trained layers and a distribution of t, each a row of one table.
"""
import importlib
import json
import re
import sys
import types

import numpy as np
import pytest
import torch

import accountant
import base
import ddpm
import evaluate
import pretrain
import sample
import train
from conftest import ROOT
from helpers import call, finetune

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^In (?:the new file )?`?([\w/]+)\.py`?:\n```python\n(.*?)^```", PAGE, re.M | re.S)
TABLES = ("ACCOUNTANTS", "SAMPLERS", "KNOWN", "DRAWN", "TARGETS", "DRAWS")
IMAGES = 200                 # private images, of 400 that are declared


@pytest.fixture(scope="module")
def added():
    """The page's rows in their tables, and table -> the names of its new rows."""
    names = {table: [] for table in TABLES}
    with pytest.MonkeyPatch.context() as m:
        for file, code in BLOCKS:
            name = file.replace("/", ".")
            if not (ROOT / f"{file}.py").exists():                       # a file that the page adds
                m.setitem(sys.modules, name, types.ModuleType(name))
                exec(code, vars(sys.modules[name]))
                continue
            module = importlib.import_module(name)
            new = {table: {} for table in TABLES if hasattr(module, table)}
            exec(code, vars(module) | new)
            for table, rows in new.items():
                for key, row in rows.items():
                    assert key not in getattr(module, table)
                    m.setitem(getattr(module, table), key, row)
                    names[table].append(key)
        yield names


@pytest.fixture(scope="module")
def place(added, tmp_path_factory):
    """A folder with private letters, a base made of the new drawings and a run that chose every row; and the
    t of its private images.
    """
    place = tmp_path_factory.mktemp("extended")
    generator = np.random.default_rng(0)
    (place / "letters").mkdir()
    for split, n in (("train", IMAGES), ("test", 60)):
        pixels = generator.integers(0, 256, (n, 1, 20, 20), dtype=np.uint8)
        np.save(place / "letters" / f"{split}-images.npy", pixels)
        np.save(place / "letters" / f"{split}-labels.npy", np.arange(n) % 3)
    times, with_draws = [], train.with_draws

    def watched(*args):
        found = with_draws(*args)
        times.extend(found[2].flatten().tolist())
        return found
    with pytest.MonkeyPatch.context() as m:
        m.chdir(place)
        m.setattr(train, "with_draws", watched)
        code, _, err = call(pretrain.main, *"--data bars --draws late --steps 2 --batch 4 --device cpu "
                                            "--out bars.pt".split())
        assert code == 0, err
        code, _, err = finetune(*"--out run --data letters --data-dir letters --N 0 --base bars.pt "
                                 "--accountant order8 --train lora+skip --draws late".split())
        assert code == 0, err
    return place, times


def test_every_table_has_one_new_row(added):
    assert {table: len(rows) for table, rows in added.items()} == dict.fromkeys(TABLES, 1)


def test_the_run_chose_every_row(place):
    folder, times = place
    config = json.loads((folder / "run" / "config.json").read_text())
    chosen = dict(data="letters", base="bars.pt", accountant="order8", train="lora+skip", draws="late")
    assert {name: config[name] for name in chosen} == chosen
    assert config["N"] == 400 and config["classes"] == ["a", "b", "c"] and config["labels"] == [0, 1, 2]
    public = base.load(folder / "bars.pt").model
    assert public.classes == 3 and public.config["names"] == ["across", "upright", "blank"]
    adapter = json.loads((folder / "run" / "adapter_config.json").read_text())
    weights = torch.load(folder / "run" / "adapter_model.bin", weights_only=True)
    assert adapter["target_modules"] == ["qkv", "proj", "skip"] and any(".skip.lora_B" in w for w in weights)
    assert min(times) >= 500, "t of private images, of 0 to 999"


def test_the_noise_is_made_for_the_new_accountant_and_the_report_states_it_beside_the_others(place):
    report = json.loads((place[0] / "run" / "privacy.json").read_text())
    definition = accountant.to_epsilon(6 * accountant.rdp(40 / 400, report["sigma"], [8.0]), [8.0], 1e-3)[0]
    assert report["accountant"] == "order8" and report["private"]
    assert report["epsilon"] == report["epsilon_order8"] == definition
    assert 9.99 < definition <= 10 and report["epsilon_rdp"] < definition, "all orders are better than one"
    assert report["epsilon_pld"] < report["epsilon_rdp"]


def test_the_new_sampler_draws_the_runs_pictures(place, monkeypatch):
    monkeypatch.chdir(place[0])
    for name, eta in (("ode", 1), ("ddim", 0), ("ddim", 1)):
        code, _, err = call(sample.main, "run", *f"--n 6 --steps 3 --seed 1 --device cpu --sampler {name} "
                                                 f"--eta {eta} --npz {name}-{eta}.npz".split())
        assert code == 0, err
    ode, ddim, other = (np.load(f"{name}.npz") for name in ("ode-1", "ddim-0", "ddim-1"))
    assert (ode["images"] == ddim["images"]).all() and (ode["images"] != other["images"]).any()
    assert ode["classes"].tolist() == ["a", "b", "c"]


def test_the_new_sampler_and_data_set_are_evaluated(place, monkeypatch):
    monkeypatch.chdir(place[0])
    calls, ode = [], ddpm.SAMPLERS["ode"]
    monkeypatch.setitem(ddpm.SAMPLERS, "ode", lambda *a, **k: calls.append(a) or ode(*a, **k))
    code, _, err = call(evaluate.main, "run", *"--fast --n 30 --no-anchors --device cpu --sampler ode "
                                               "--data-dir letters".split())
    assert code == 0 and calls, err
    result = json.loads((place[0] / "run" / "evaluation.json").read_text())
    assert result["sampler"] == "ode" and result["data"] == "letters" and result["N"] == IMAGES
    assert 0 <= result["rows"]["synthetic"]["CNN"] <= 1


@pytest.mark.parametrize("program, tables", [
    (train, "ACCOUNTANTS KNOWN TARGETS DRAWS"), (pretrain, "DRAWN KNOWN DRAWS"), (sample, "SAMPLERS"),
    (evaluate, "SAMPLERS KNOWN")], ids=["train", "pretrain", "sample", "evaluate"])
def test_help_names_the_new_rows(program, tables, added, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")                        # no name is broken at the end of a line
    code, said, _ = call(program.main, "--help")
    for table in tables.split():
        assert code == 0 and re.search(rf"\W{re.escape(added[table][0])}\W", said), (table, said)
